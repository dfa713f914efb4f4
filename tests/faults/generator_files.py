"""Files that are cut, damaged, of another kind, or hold wrong values."""
# ruff: noqa: E501 - one case a row

from __future__ import annotations

import random
from collections.abc import Callable

from .fault import EITHER, REFUSED, RIGHT, Fault, edit, fault, put, set_json

HTML = b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>Sign in to continue</body></html>\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 12345\n"

Change = Callable[[bytes], bytes]

CUTS: dict[str, Change] = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "one-byte-short": lambda data: data[:-1],
    "first-40-bytes": lambda data: data[:40],
    "web-page": lambda data: HTML,
    "lfs-pointer": lambda data: POINTER,
    "zeros": lambda data: bytes(len(data)),
    "middle-zeroed": lambda data: data[: len(data) // 3] + bytes(len(data) // 3) + data[2 * (len(data) // 3) :],
    "text-mode-newlines": lambda data: data.replace(b"\n", b"\r\n"),
}
BINARY = tuple(CUTS)
TEXT = ("empty", "half", "web-page", "lfs-pointer", "zeros")

EDIT = "edit --checkpoint var --image ant.png --box 0,0,0.5,0.5 --count 1 --out out"
SAMPLE = "sample --checkpoint {} --count 1 --out out"
IMPORT = "import --architecture var --model {} --tokenizer {} --patch-nums 1,2 --out out"
EVALUATE = (
    "evaluate images --images npz/images.npz --reference npz/others.npz --features features.ts --no-floor --out out"
)
TOKENS = "tokens make --checkpoint tok --data shards --out out --resize-ratio 1.0 --num-workers 0"
TRAIN = "train recipes/var.yaml"
RECIPE = "recipes/var.yaml tok shards"
LONG, GO_ON = "recipes/long.yaml runs/long tok shards", "train recipes/long.yaml"
"""A run that was cut short in its second epoch."""

# target, what is damaged how, assets, commands that read it
TARGETS: tuple[tuple[str, tuple[str, ...], str, tuple[str, ...]], ...] = (
    (
        "tok/tokenizer.safetensors",
        BINARY,
        "tok shards ant.png",
        ("info tok", TOKENS, "reconstruct --checkpoint tok ant.png"),
    ),
    ("var/model.safetensors", BINARY, "var ant.png", ("info var", SAMPLE.format("var"), EDIT)),
    ("var/config.json", TEXT, "var ant.png", ("info var", SAMPLE.format("var"))),
    (
        "official/var.pth",
        BINARY,
        "official/var.pth official/var_tok.pth",
        (IMPORT.format("official/var.pth", "official/var_tok.pth"),),
    ),
    (
        "official/var_tok.pth",
        BINARY,
        "official/var.pth official/var_tok.pth",
        (IMPORT.format("official/var.pth", "official/var_tok.pth"),),
    ),
    (
        "official/var.safetensors",
        BINARY,
        "official/var.safetensors official/var_tok.pth",
        (IMPORT.format("official/var.safetensors", "official/var_tok.pth"),),
    ),
    (
        "runs/long/checkpoints/last.ckpt",
        BINARY,
        LONG,
        (GO_ON, "info runs/long/checkpoints/last.ckpt"),
    ),
    ("shards/index.json", TEXT, RECIPE, ("shards check shards", TOKENS, TRAIN)),
    ("shards/train/000000.tar", BINARY, RECIPE, ("shards check shards", TOKENS)),
    ("cache/tokens.json", TEXT, "cache tok", ("tokens check cache",)),
    ("cache/train/000000.npy", BINARY, "cache tok", ("tokens check cache",)),
    ("cache/train/000001.labels.npy", BINARY, "cache tok", ("tokens check cache",)),
    ("npz/images.npz", BINARY, "npz features.ts", (EVALUATE,)),
    ("ant.png", BINARY, "var ant.png tok", (EDIT, "reconstruct --checkpoint tok ant.png")),
    ("features.ts", BINARY, "npz features.ts", (EVALUATE,)),
    ("recipes/var.yaml", TEXT, RECIPE, (TRAIN, "fit --config recipes/var.yaml")),
    ("recipes/sweep.yaml", TEXT, "recipes tok shards", ("sweep recipes/sweep.yaml",)),
    ("list.csv", ("web-page", "lfs-pointer", "zeros", "empty"), "list.csv images", ("shards make list.csv out",)),
    ("runs/var/metrics.json", TEXT, RECIPE + " runs/var", (TRAIN,)),
    ("runs/var/run.json", TEXT, RECIPE + " runs/var", (TRAIN,)),
    (
        "runs/var/config.yaml",
        TEXT,
        "runs/var shards",
        ("analyze attention --checkpoint runs/var --data shards --out out",),
    ),
)
MAY_BE_FINE = {"middle-zeroed", "text-mode-newlines", "one-byte-short"}
"""What a reader without checksums need not notice, or a format may allow."""
REPORTS = ("runs/var/metrics.json", "runs/var/run.json")
"""What a finished run may write anew."""


def damaged(rng: random.Random) -> list[Fault]:
    made = []
    for target, kinds, assets, commands in TARGETS:
        for argv in commands:
            for kind in kinds:
                lenient = kind in MAY_BE_FINE or target in REPORTS or target.endswith("config.yaml")
                lenient |= argv.startswith("info") and target.endswith("safetensors")  # it reads no weights
                made.append(
                    fault(
                        "damaged",
                        "reading",
                        f"{target.replace('/', '.')}-{kind}",
                        assets,
                        argv,
                        edit(target, CUTS[kind]),
                        want=EITHER if lenient else REFUSED,
                        names=target.split("/")[-1].split(".")[0] if lenient else name_of(target),
                        may_change=("runs/var/*", "runs/var/model/*", "runs/var/checkpoints/*")
                        if target in REPORTS
                        else (),
                    )
                )
    return made


def name_of(target: str) -> str:
    """Pattern of the file's name; a folder that is read as a whole may be named instead of a file in it."""
    parts = target.split("/")
    return f"{parts[-1]}|{parts[0]}/?:|{'/'.join(parts[:-1]) or parts[0]}:".replace(".", r"\.")


# --- wrong values in JSON ----------------------------------------------------------------------------------------------

MODEL = "var/config.json"
CONFIG_VALUES: tuple[tuple[str, tuple[object, ...]], ...] = (
    (
        "tokenizer.scales",
        (None, "1,2", [], [2, 1], [1, 2.5], [0, 2], [1, 1, 2], [1, 40000], {"1": 2}, [True, 2], [1, [2]]),
    ),
    ("tokenizer.vocab_size", ("16", 0, -16, 17, 10**12, True, 16.5, None, [16])),
    ("tokenizer.code_dim", (0, 5, "four", 10**9)),
    ("tokenizer.channels", (0, 33, -32, 10**7, "32")),
    ("tokenizer.channel_multipliers", ([], [1], [0, 1, 1], "1,1,1", [1, 1, 10**6], None)),
    ("tokenizer.norm_groups", (0, 7, -1, "many")),
    ("tokenizer.num_res_blocks", (-1, 10**6, 1.5)),
    ("tokenizer.phi_layers", (0, -4, 10**7)),
    ("tokenizer.codes", ("spherical", 3, None)),
    ("tokenizer", (None, [], "tok", {})),
    ("model.scales", ([1, 3], None, [1, 2, 4], "12")),
    ("model.num_classes", (0, -2, 3, "two", 10**11)),
    ("model.depth", (0, -1, 3, 10**7, "2", 1.5, None)),
    ("model.width", (0, 18, 10**8, "16")),
    ("model.heads", (0, 3, -2, 1.0, None)),
    ("model.drop_path", ("none", -0.5, 1.5, None)),
    ("model.attention", (None, "FullAttention", {}, {"class": "os.system"}, {"class": "Unknown"}, {"class": 3}, [])),
    ("model.attention.kernel", (3,)),
    ("model.history", ({"class": "SlidingWindowHistory"}, {"class": "SlidingWindowHistory", "size": -1}, 0)),
    ("model.blocks.mlp_ratio", (0, -4.0, "4", 1e9, None)),
    ("model.extra", (1,)),
    ("model", (..., None, [])),
    ("kind", ("tokenizer", "other", None, 3)),
    ("format", (2, "1", None, -1)),
    ("library", ("diffusers", None)),
    ("tokenizer_hash", (..., "00", None, 5)),
)

INDEX_VALUES: tuple[tuple[str, tuple[object, ...]], ...] = (
    ("format", ("mvar-shards-2", None, 1)),
    ("class_names", (None, [], ["ant"], "ant,bee", ["ant", "ant"], [1, 2], {"ant": 0})),
    ("splits", (None, {}, [], "train")),
    ("splits.train", (..., None, {}, [])),
    ("splits.train.shards", (None, [], "train/000000.tar", {}, [None])),
    ("splits.train.samples", (17, "16", -1)),
    ("splits.train.shards.0.name", (None, "", "/etc/hostname", "../shards/train/000000.tar", "train", 5)),
    ("splits.train.shards.0.samples", (0, -4, "4", 5, None, 10**12, 4.5)),
    ("splits.train.shards.0.bytes", (0, -1, "10240", 10241, None)),
    ("splits.train.shards.0.sha256", ("", None, 5, "xyz")),
)

CACHE_VALUES: tuple[tuple[str, tuple[object, ...]], ...] = (
    ("format", ("mvar-tokens-9", None)),
    ("settings", (None, {}, [])),
    ("settings.scales", (None, [1, 3], "1 2", [])),
    ("settings.vocab_size", (4, 0, "16", None)),
    ("settings.views", (0, 2, "1", None)),
    ("settings.extra", (1,)),
    ("settings.tokenizer_hash", (None, 3)),
    ("class_names", (["ant"], None)),
    ("splits.val", (..., None)),
    ("splits.train.parts.0.samples", (0, 5, "4", -1)),
    ("splits.train.parts.0.name", ("../cache/train/000000", None, "train/none")),
    ("splits.train.parts.0.damaged", (None, "none", 3)),
    ("splits.train.parts", ([], None)),
)


def shown(value: object) -> str:
    return "gone" if value is ... else repr(value).replace(" ", "")[:24].replace("/", "|")


def json_values(rng: random.Random) -> list[Fault]:
    tables = (
        (MODEL, CONFIG_VALUES, "var", (SAMPLE.format("var"), "info var"), r"config\.json|\bvar\b"),
        ("shards/index.json", INDEX_VALUES, RECIPE, (TOKENS, "shards check shards", TRAIN), r"index\.json|\bshards\b"),
        (
            "cache/tokens.json",
            CACHE_VALUES,
            "cache tok",
            ("tokens check cache --checkpoint tok",),
            r"tokens\.json|\bcache\b",
        ),
    )
    made = []
    for target, table, assets, commands, names in tables:
        for place, values in table:
            for value in values:
                argv = rng.choice(commands)
                # sizes that agree with the weights by chance, numbers of the right value, or lists that hold less
                lenient = (
                    argv.startswith("info")
                    or isinstance(value, (float, bool))
                    or value is ...
                    or value in (None, "", 17, 5)
                    or place in LENIENT
                )
                unread = place.endswith((".bytes", ".sha256")) and "check" not in argv  # sums are for the check
                lenient |= unread
                made.append(
                    fault(
                        "json",
                        "reading",
                        f"{target.split('/')[-1]}-{place}-{shown(value)}",
                        assets,
                        argv,
                        set_json(target, place, value),
                        want=EITHER if lenient else REFUSED,
                        names=names,
                    )
                )
    made += whole_documents()
    return made


LENIENT = {
    "model.drop_path",
    "tokenizer.codes",
    "splits.train.samples",
    "library",
    "tokenizer_hash",
    "splits.train.parts.0.damaged",
    "settings.tokenizer_hash",
    "model.extra",
    "settings.extra",
    "class_names",
    "splits.train.shards.0.name",
    "model.attention.kernel",
    "model.attention",
}


def whole_documents() -> list[Fault]:
    """Documents that are JSON, but not of the shape; and shapes that JSON allows."""
    documents = {
        "list": "[]",
        "number": "3",
        "null": "null",
        "nan": "NaN",
        "text": '"config"',
        "deep": "[" * 3000 + "]" * 3000,
        "latin-1": '{"library": "mvar_lightning é"}'.encode("latin-1"),
        "trailing-comma": '{"library": "mvar_lightning",}',
        "comment": '// config\n{"library": "mvar_lightning"}',
        "long-number": '{"format": ' + "9" * 6000 + "}",
    }
    readers = ((MODEL, "var", "info var"), ("shards/index.json", "shards", "shards check shards"))
    made = [
        fault(
            "json", "reading", f"{target.split('/')[-1]}-document-{name}", assets, argv, put(target, text), names=assets
        )
        for name, text in documents.items()
        for target, assets, argv in readers
    ]
    for name, change in {
        "bom": lambda data: b"\xef\xbb\xbf" + data,
        "crlf": lambda data: data.replace(b"\n", b"\r\n"),
        "spaces-after": lambda data: data + b"\n\n  \n",
    }.items():
        for target, assets, argv in readers:
            want = EITHER if name == "bom" else RIGHT
            made.append(
                fault(
                    "json",
                    "reading",
                    f"{target.split('/')[-1]}-{name}",
                    assets,
                    argv,
                    edit(target, change),
                    want=want,
                    names=assets,
                )
            )
    return made
