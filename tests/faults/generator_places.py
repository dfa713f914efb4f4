"""Destinations and streams: permissions, full disks, standard streams that are closed."""
# ruff: noqa: PERF401 - one case a row

from __future__ import annotations

import random
from pathlib import Path

from .fault import (
    EITHER,
    NOBODY,
    REFUSED,
    RIGHT,
    Fault,
    fault,
    has_files,
    make_folder,
    mode,
    open_to_all,
    put,
    shards_hold,
)
from .generator_files import EDIT, EVALUATE, GO_ON, IMPORT, LONG, RECIPE, SAMPLE, TOKENS, TRAIN

SHARDS = "shards make images out --val-fraction 0.2"
IMPORT_VAR = IMPORT.format("official/var.pth", "official/var_tok.pth")
OFFICIAL = "official/var.pth official/var_tok.pth"
EXPORT = "export var --model out.pth --tokenizer out_tok.pth"
RECONSTRUCT = "reconstruct --checkpoint tok ant.png --out out.png"
JUDGE = "evaluate tokenizer --checkpoint tok --data shards --features none --out out"
ANALYZE = "analyze attention --checkpoint var --data shards --out out"

# slug, assets, command, its destination, a check of the whole result
WRITERS = (
    ("sample", "var", SAMPLE.format("var"), "out", has_files("out/0*.png", 2)),
    ("edit", "var ant.png", EDIT, "out", has_files("out/*_*.png", 3)),
    ("shards", "images", SHARDS, "out", shards_hold(20, classes=("ant", "bee"))),
    ("tokens", "tok shards", TOKENS, "out", has_files("out/*/*.npy", 16)),
    ("import", OFFICIAL, IMPORT_VAR, "out", has_files("out/*", 3)),
    ("export", "var", EXPORT, "out.pth", has_files("out*.pth", 2)),
    ("reconstruct", "tok ant.png", RECONSTRUCT, "out.png", has_files("out.png", 1)),
    ("evaluate-images", "npz features.ts", EVALUATE, "out", has_files("out/images.*", 3)),
    ("evaluate-tokenizer", "tok shards", JUDGE, "out", has_files("out/tokenizer.*", 2)),
    ("analyze", "var shards", ANALYZE, "out", has_files("out/attention*", 4)),
    ("train", RECIPE, TRAIN + " --run-folder out", "out", has_files("out/model/*.safetensors", 2)),
)
USER = {"uid": NOBODY}


def readable(folder: Path) -> None:
    """Whoever made the inputs lets everybody read them."""
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def permissions(rng: random.Random) -> list[Fault]:
    """Folders and files that another user may not read or write."""
    made = []
    for slug, assets, argv, out, check in WRITERS:
        if "npz" in assets:
            continue  # the other user cannot load the interpreter's code page for archives
        top = out.split(".")[0]
        blocked = "out|CASE|[Pp]ermission" if slug == "train" else f"{top}|[Pp]ermission"
        made += [
            fault(
                "permissions",
                "writing",
                f"{slug}-parent-closed",
                assets,
                argv,
                readable,
                mode(".", 0o755),
                settings=USER,
                names=top,
            ),
            fault(
                "permissions",
                "writing",
                f"{slug}-all-open",
                assets,
                argv,
                open_to_all,
                settings=USER,
                want=RIGHT,
                check=check,
            ),
            fault(
                "permissions",
                "writing",
                f"{slug}-umask-777",
                assets,
                argv,
                open_to_all,
                settings={**USER, "umask": 0o777},
                want=EITHER,
                check=check,
                names=blocked,
            ),
        ]
        if "." not in out:
            made += [
                fault(
                    "permissions",
                    "writing",
                    f"{slug}-out-read-only",
                    assets,
                    argv,
                    readable,
                    make_folder("out"),
                    mode("out", 0o555),
                    settings=USER,
                    names=blocked,
                ),
                fault(
                    "permissions",
                    "writing",
                    f"{slug}-out-not-listable",
                    assets,
                    argv,
                    readable,
                    make_folder("out"),
                    mode("out", 0o333),
                    settings=USER,
                    want=EITHER,
                    names=blocked,
                ),
                fault(
                    "permissions",
                    "writing",
                    f"{slug}-out-not-enterable",
                    assets,
                    argv,
                    readable,
                    make_folder("out"),
                    mode("out", 0o600),
                    settings=USER,
                    names=blocked,
                ),
            ]
        else:
            made.append(
                fault(
                    "permissions",
                    "writing",
                    f"{slug}-old-closed",
                    assets,
                    argv,
                    readable,
                    put(out, "old"),
                    mode(".", 0o755),
                    settings=USER,
                    names=blocked,
                )
            )
    readers = (
        ("tok/tokenizer.safetensors", "tok ant.png", RECONSTRUCT),
        ("tok/config.json", "tok", "info tok"),
        ("tok", "tok ant.png", RECONSTRUCT),
        ("var/model.safetensors", "var", SAMPLE.format("var")),
        ("official/var.pth", OFFICIAL, IMPORT_VAR),
        ("shards/index.json", "shards", "shards check shards"),
        ("shards/train", "shards", "shards check shards"),
        ("shards/train/000000.tar", "shards tok", TOKENS),
        ("shards/val/000001.tar", "shards", "shards check shards"),
        ("cache/tokens.json", "cache", "tokens check cache"),
        ("cache/train/000001.npy", "cache", "tokens check cache"),
        ("images/ant", "images", SHARDS),
        ("images/bee/03.png", "images", SHARDS),
        ("images", "images", SHARDS),
        ("list.csv", "list.csv images", "shards make list.csv out"),
        ("ant.png", "var ant.png", EDIT),
        ("recipes/var.yaml", RECIPE, TRAIN),
        ("recipes", RECIPE, TRAIN),
        ("runs/long/checkpoints/last.ckpt", LONG, GO_ON),
        ("runs/long/checkpoints", LONG, GO_ON),
        ("recipes/var.yaml", "recipes tok shards", "sweep recipes/sweep.yaml"),
    )
    # the other user's interpreter cannot load what a whole training needs
    made = [one for one in made if not one.id.endswith(("train-all-open", "train-out-not-listable"))]
    for number, (target, assets, argv) in enumerate(readers):
        names = target.split("/")[-1].replace(".", r"\.")
        made.append(
            fault(
                "permissions",
                "reading",
                f"closed-{target.replace('/', '.')}-{number}",
                assets,
                argv,
                open_to_all,
                mode(target, 0),
                settings=USER,
                names=names,
            )
        )
    return made


def full(rng: random.Random) -> list[Fault]:
    """Disks that are full after so many megabytes of a file, and streams that cannot be written."""
    made = []
    for slug, assets, argv, _, check in WRITERS:
        for size in (0.002, 0.008, 0.03, 0.1, 0.3, 0.6):
            if slug == "train" and size < 0.008:
                continue  # what is said would fill the file of the harness
            made.append(
                fault(
                    "full",
                    "writing",
                    f"{slug}-file-{size}",
                    assets,
                    argv,
                    want=EITHER,
                    check=check,
                    names=r"out|[Nn]o space|large|[Ss]pace",
                    settings={"file_mb": size, "stdout": "/dev/null"},
                )
            )
    return made


def resumed_after_full(rng: random.Random) -> list[Fault]:
    """After the disk was full the same command makes what an undisturbed one makes."""
    same = {
        "shards": ("out/*",),
        "tokens": ("out/*",),
        "sample": ("out/*.png", "out/sampling.json"),
        "train": ("out/model/*",),
        "import": ("out/*",),
        "export": ("out*.safetensors",),
    }
    made = []
    for slug, assets, argv, _, check in WRITERS:
        if slug in same:
            for size in (0.008, 0.03, 0.1, 0.4):
                made.append(
                    fault(
                        "resumed",
                        "after a full disk",
                        f"{slug}-file-{size}",
                        assets,
                        argv,
                        want=RIGHT,
                        check=check,
                        settings={"file_mb": size, "stdout": "/dev/null"},
                        any_first=True,
                        again=argv,
                        same_as=same[slug],
                        may_change=("out*",),
                    )
                )
    return made


def streams(rng: random.Random) -> list[Fault]:
    """Standard streams that are closed, full, or not there: the work is done all the same, or one line says why not."""
    quick = (
        ("info", "tok", "info tok", None),
        ("help", "", "sample --help", None),
        ("version", "", "--version", None),
        ("check", "shards", "shards check shards", None),
        ("tokens-check", "cache", "tokens check cache", None),
        ("refused", "", "info nowhere", None),
    )
    writers = tuple((slug, assets, argv, check) for slug, assets, argv, _, check in WRITERS)
    made = []
    for slug, assets, argv, check in (*quick, *writers):
        for stream in ("stdout", "stderr"):
            for kind in ("closed", "full", "shut") if stream == "stdout" else ("closed", "full"):
                want = REFUSED if slug == "refused" else EITHER
                settings = {stream: kind}
                if slug == "refused" and stream == "stderr":
                    continue
                made.append(
                    fault(
                        "streams",
                        "printing",
                        f"{slug}-{stream}-{kind}",
                        assets,
                        argv,
                        command=slug,
                        want=want,
                        check=check if kind == "shut" else None,
                        settings=settings,
                    )
                )
    return made
