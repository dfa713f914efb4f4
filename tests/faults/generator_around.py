"""The environment around a command, and the names of files, folders and classes."""
# ruff: noqa: E501, PERF401 - one case a row

from __future__ import annotations

import random
from pathlib import Path

from .fault import EITHER, REFUSED, RIGHT, Fault, both, edit, fault, make_folder, move, shards_hold
from .generator_files import EVALUATE, RECIPE
from .generator_places import SHARDS, WRITERS

ENVIRONMENTS: dict[str, tuple[dict[str, str | None], str]] = {
    "rank-word": ({"RANK": "first"}, EITHER),
    "rank-alone": ({"RANK": "1"}, EITHER),
    "rank-negative": ({"RANK": "-1", "WORLD_SIZE": "1"}, EITHER),
    "local-rank-alone": ({"LOCAL_RANK": "0"}, RIGHT),
    "local-rank-word": ({"LOCAL_RANK": "x"}, EITHER),
    "world-zero": ({"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0"}, EITHER),
    "world-one": ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}, RIGHT),
    "world-empty": ({"WORLD_SIZE": ""}, EITHER),
    "slurm-interactive": ({"SLURM_JOB_ID": "12", "SLURM_JOB_NAME": "bash", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}, RIGHT),
    "slurm-one": ({"SLURM_JOB_ID": "12", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1"}, RIGHT),
    "slurm-salloc": ({"SLURM_JOB_ID": "12", "SLURM_NNODES": "1", "SLURM_NODELIST": "node1"}, RIGHT),
    "slurm-ntasks-word": ({"SLURM_JOB_ID": "12", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "many", "SLURM_PROCID": "0"}, EITHER),
    "slurm-procid-empty": ({"SLURM_JOB_ID": "12", "SLURM_NTASKS": "1", "SLURM_PROCID": ""}, EITHER),
    "no-home": ({"HOME": None}, RIGHT),
    "home-gone": ({"HOME": "/nonexistent"}, RIGHT),
    "tmp-gone": ({"TMPDIR": "/nonexistent"}, RIGHT),
    "tmp-file": ({"TMPDIR": "/etc/hostname"}, RIGHT),
    "dumb-terminal": ({"TERM": "dumb"}, RIGHT),
    "no-terminal-name": ({"TERM": None}, RIGHT),
    "odd-terminal": ({"TERM": "xterm-mine"}, RIGHT),
    "columns-one": ({"COLUMNS": "1"}, RIGHT),
    "columns-zero": ({"COLUMNS": "0"}, RIGHT),
    "columns-word": ({"COLUMNS": "wide"}, RIGHT),
    "columns-negative": ({"COLUMNS": "-5"}, RIGHT),
    "force-color": ({"FORCE_COLOR": "1"}, RIGHT),
    "force-terminal": ({"TTY_COMPATIBLE": "1"}, RIGHT),
    "no-color": ({"NO_COLOR": "1"}, RIGHT),
    "locale-turkish": ({"LC_ALL": "tr_TR.UTF-8"}, RIGHT),
    "locale-unknown": ({"LC_ALL": "xx_XX", "LANG": "xx"}, RIGHT),
    "global-seed-word": ({"PL_GLOBAL_SEED": "lucky"}, EITHER),
    "global-seed-negative": ({"PL_GLOBAL_SEED": "-5"}, EITHER),
    "global-seed-huge": ({"PL_GLOBAL_SEED": "99999999999999"}, EITHER),
    "threads-word": ({"OMP_NUM_THREADS": "all"}, RIGHT),
    "threads-zero": ({"OMP_NUM_THREADS": "0"}, RIGHT),
    "devices-junk": ({"CUDA_VISIBLE_DEVICES": "GPU-none"}, RIGHT),
    "devices-none": ({"CUDA_VISIBLE_DEVICES": ""}, RIGHT),
    "matplotlib-gone": ({"MPLCONFIGDIR": "/nonexistent"}, RIGHT),
    "cache-gone": ({"XDG_CACHE_HOME": "/nonexistent", "XDG_CONFIG_HOME": "/nonexistent"}, RIGHT),
    "zone": ({"TZ": "Mars/Base"}, RIGHT),
    "no-path": ({"PATH": ""}, RIGHT),
    "epoch": ({"SOURCE_DATE_EPOCH": "soon"}, RIGHT),
    "no-user": ({"USER": None, "LOGNAME": None}, RIGHT),
    "num-nodes": ({"NODE_RANK": "1"}, EITHER),
    "group-rank": ({"GROUP_RANK": "x"}, EITHER),
    "jsonargparse-warnings": ({"PYTHONWARNINGS": "default"}, RIGHT),
    "jsonargparse-env": ({"JSONARGPARSE_DEFAULT_ENV": "true", "MVAR_DEPTH": "9"}, RIGHT),
    "traceback-empty": ({"MVAR_TRACEBACK": ""}, RIGHT),
}  # fmt: skip
VARIABLES = "RANK|WORLD_SIZE|SLURM|SEED|seed|LOCAL|NODE|TMP|process|OMP|rank"


def environment(rng: random.Random) -> list[Fault]:
    made = []
    writers = {slug: (assets, argv, check) for slug, assets, argv, _, check in WRITERS}
    for name, (variables, want) in ENVIRONMENTS.items():
        launch = any(part in name for part in ("rank", "world", "slurm", "seed", "nodes", "jsonargparse"))
        for slug in (
            ("train",) if launch else rng.sample(["sample", "shards", "evaluate-images", "analyze", "tokens"], 2)
        ):
            assets, argv, check = writers[slug]
            made.append(
                fault(
                    "environment",
                    "starting",
                    f"{slug}-{name}",
                    assets,
                    argv,
                    want=want,
                    check=check,
                    names=VARIABLES,
                    settings={"env": variables, "seconds": 25},
                )
            )
        if launch and rng.random() < 0.5:
            slug = rng.choice(["tokens", "sample", "evaluate-images"])
            assets, argv, check = writers[slug]
            made.append(
                fault(
                    "environment",
                    "starting",
                    f"{slug}-{name}",
                    assets,
                    argv,
                    want=want,
                    check=check if want == RIGHT else None,
                    names=VARIABLES,
                    settings={"env": variables, "seconds": 25},
                )
            )
    for slug, argv in {
        "help": "--help",
        "version": "--version",
        "info": "info nothing",
        "sample": "sample --checkpoint x --out out",
        "shards": "shards check x",
        "train": "train x",
    }.items():
        want = RIGHT if slug in ("help", "version") else REFUSED
        made.append(
            fault(
                "environment",
                "starting",
                f"{slug}-folder-deleted",
                "",
                argv,
                make_folder("gone"),
                want=want,
                command=slug,
                names="nothing|x|folder|directory",
                settings={"cwd": "gone", "delete_cwd": True},
            )
        )
    for slug in ("sample", "shards", "import", "export", "train", "reconstruct"):
        assets, argv, check = writers[slug]
        for umask in (0o077, 0o027):
            made.append(
                fault(
                    "environment",
                    "writing",
                    f"{slug}-umask-{umask:o}",
                    assets,
                    argv,
                    want=RIGHT,
                    check=both(check, modes_follow(umask)),
                    settings={"umask": umask},
                )
            )
        made.append(
            fault(
                "environment",
                "writing",
                f"{slug}-umask-022",
                assets,
                argv,
                want=RIGHT,
                check=both(check, modes_follow(0o022)),
                settings={"umask": 0o022},
            )
        )
    return made


def modes_follow(umask: int):
    """Results have the modes that the user's mask asks for: others can read them, or cannot."""

    def check(folder: Path, answer) -> str | None:
        for path in [*folder.glob("out*"), *folder.glob("out/**/*")]:
            if path.name.startswith(".") or "tensorboard" in str(path):
                continue
            wanted = (0o777 if path.is_dir() else 0o666) & ~umask
            found = path.stat().st_mode & 0o777
            if found != wanted:
                return f"{path.relative_to(folder)} has mode {found:o}, not {wanted:o}"
        return None

    return check


# --- names -------------------------------------------------------------------------------------------------------------------

NAMES = {
    "unicode": "猫-Größe",
    "combining": "e\u0301te\u0301",
    "spaces": "my  results ",
    "leading-dash": "./-out",
    "newline": "a\nb",
    "tab": "a\tb",
    "percent": "100%s%d",
    "braces": "run{0}{name}",
    "range": "part{000..003}",
    "brackets": "run[1]",
    "bold": "run[bold]x[/bold]",
    "closing-tag": "run[/red]",
    "colons": "a::b",
    "star": "what*?",
    "hash": "a#b",
    "ampersand": "a&b;c",
    "equals": "lr=0.1",
    "quote": "it's",
    "double-quote": 'a"b',
    "backslash": "a\\b",
    "dollar": "$HOME",
    "interpolation": "${x}",
    "tilde": "~",
    "dots": "v1.0.tar",
    "slash": "deep/er/",
    "up": "down/../up",
    "long": "x" * 200,
    "comma": "a,b",
    "at": "me@host",
    "plus": "a+b%20c",
    "dot": ".hidden",
    "word": "null",
    "number": "007",
    "surrogate": "caf\udce9",
}  # fmt: skip
USES = (
    ("out", "sample", "var", ["sample", "--checkpoint", "var", "--count", "1", "--out", "NAME"], None, "0*.png", 2),
    ("out", "shards", "images", ["shards", "make", "images", "NAME"], None, "*/*.tar", None),
    ("out", "tokens", "tok shards", ["tokens", "make", "--checkpoint", "tok", "--data", "shards", "--out", "NAME", "--num-workers", "0"], None, "*/*.npy", 16),
    ("out", "train", RECIPE, ["train", "recipes/var.yaml", "--run-folder", "NAME"], None, "model/*.safetensors", 2),
    ("out", "evaluate", "npz features.ts", [*EVALUATE.split()[:-1], "NAME"], None, "images.*", 3),
    ("in", "checkpoint", "var", ["sample", "--checkpoint", "NAME", "--count", "1", "--out", "out"], "var", "0*.png", 2),
    ("in", "data", "tok shards", ["tokens", "make", "--checkpoint", "tok", "--data", "NAME", "--out", "out", "--num-workers", "0"], "shards", "*/*.npy", 16),
    ("in", "training-data", RECIPE, ["train", "recipes/var.yaml", "--run-folder", "out", "--data", "NAME"], "shards", "model/*.safetensors", 2),
    ("in", "images", "images", ["shards", "make", "NAME", "out"], "images", "*/*.tar", None),
    ("in", "check", "shards", ["shards", "check", "NAME"], "shards", "", None),
    ("in", "evaluation", "npz features.ts", ["evaluate", "images", "--images", "NAME", "--reference", "npz/others.npz", "--features", "features.ts", "--no-floor", "--out", "out"], "npz/images.npz", "images.*", 3),
)  # fmt: skip


def names(rng: random.Random) -> list[Fault]:
    made = []
    for slug, name in NAMES.items():
        for side, use, assets, words, moved, pattern, count in USES:
            here = name.rstrip("/") if side == "in" else name
            if use == "evaluation":
                here += ".npz"
            steps = [move(moved, here)] if moved else []
            place = here if side == "out" else "out"
            check = files_in(place, pattern, count) if pattern else None
            # what has a meaning of its own in the product's arguments may be refused, in one line
            special = use == "training-data" and slug in (
                "interpolation",
                "word",
                "number",
                "braces",
                "range",
                "colons",
                "equals",
            )
            argv = [here if word == "NAME" else word for word in words]
            want = EITHER if special or slug in ("surrogate", "newline") else RIGHT
            made.append(
                fault(
                    "names",
                    "parsing",
                    f"{side}-{use}-{slug}",
                    assets,
                    argv,
                    *steps,
                    want=want,
                    check=check,
                    may_change=(),
                )
            )
    return made + odd_classes()


def files_in(place: str, pattern: str, count: int | None):
    def check(folder: Path, answer) -> str | None:
        found = len(list((folder / place).glob(pattern)))
        return None if (found == count if count else found) else f"{found} files {pattern} in {place!r}, not {count}"

    return check


def odd_classes() -> list[Fault]:
    """Class folders and lists whose names a text format could take apart."""
    made = []
    for slug, name in {
        "unicode": "猫",
        "space": "tabby cat",
        "comma": "cat, tabby",
        "quote": 'the "cat"',
        "number": "7",
        "dash": "-cat",
        "dot": "cat.v2",
        "tab": "a\tcat",
        "newline": "a\ncat",
        "upper": "ZEBRA",
        "emoji": "🐱",
        "long": "c" * 200,
        "percent": "100%",
    }.items():
        classes = sorted(["ant", name])
        check = shards_hold(20, classes=classes, colors=classes[0] == "ant")
        made.append(
            fault(
                "names",
                "making",
                f"class-{slug}",
                "images",
                SHARDS,
                move("images/bee", f"images/{name}"),
                want=EITHER if slug == "newline" else RIGHT,
                check=check,
                names="cat",
            )
        )
    lists = {
        "crlf": (lambda data: data.replace(b"\n", b"\r\n"), RIGHT),
        "bom": (lambda data: b"\xef\xbb\xbf" + data, RIGHT),
        "no-last-newline": (lambda data: data.rstrip(), RIGHT),
        "blank-lines": (lambda data: data.replace(b"\n", b"\n\n"), EITHER),
        "spaces": (lambda data: data.replace(b",", b", "), EITHER),
        "quoted": (lambda data: b"".join(b'"%s","%s"\n' % tuple(line.split(b",")) for line in data.split()), RIGHT),
        "header": (lambda data: b"path,class\n" + data, EITHER),
        "semicolons": (lambda data: data.replace(b",", b";"), REFUSED),
        "one-column": (lambda data: b"".join(line.split(b",")[0] + b"\n" for line in data.split()), REFUSED),
        "missing-image": (lambda data: data + b"images/ant/99.png,ant\n", REFUSED),
        "twice": (lambda data: data + data.splitlines()[0] + b"\n", EITHER),
        "two-classes": (lambda data: data + b"images/ant/00.png,bee\n", EITHER),
        "empty-class": (lambda data: data + b"images/ant/00.png,\n", REFUSED),
        "numbers": (lambda data: data.replace(b",ant", b",0").replace(b",bee", b",1"), RIGHT),
        "numbers-gap": (lambda data: data.replace(b",ant", b",0").replace(b",bee", b",2"), REFUSED),
        "numbers-from-one": (lambda data: data.replace(b",ant", b",1").replace(b",bee", b",2"), REFUSED),
        "utf-16": (lambda data: data.decode().encode("utf-16"), EITHER),
        "latin-1": (lambda data: data.replace(b",bee", ",bée".encode("latin-1")), REFUSED),
        "split-typo": (lambda data: data.replace(b",ant\n", b",ant,valid\n"), REFUSED),
        "split-mixed": (lambda data: data + b"images/ant/00.png,ant,val\n", EITHER),
        "null-byte": (lambda data: data.replace(b"ant/01", b"ant\0/01"), REFUSED),
        "up": (lambda data: data.replace(b"images/", b"../case/images/"), RIGHT),
        "open-quote": (lambda data: data + b'"images/ant/00.png,ant\n', REFUSED),
    }
    for slug, (change, want) in lists.items():
        made.append(
            fault(
                "names",
                "reading",
                f"list-{slug}",
                "list.csv images",
                "shards make list.csv out --val-fraction 0.2",
                edit("list.csv", change),
                want=want,
                check=shards_hold(20) if want == RIGHT else None,
                names=r"list\.csv|99\.png|b.e",
            )
        )
    return made
