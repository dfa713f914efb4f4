"""Things that are missing, and one thing where another is wanted."""
# ruff: noqa: E501, PERF401 - one case a row

from __future__ import annotations

import random

from .fault import EITHER, REFUSED, Fault, fault, has_files, remove
from .generator_files import RECIPE, SAMPLE, TOKENS, TRAIN
from .generator_places import EXPORT, IMPORT_VAR, OFFICIAL, RECONSTRUCT


def missing(rng: random.Random) -> list[Fault]:
    """A part of something that is not there."""
    parts = (
        ("tok/config.json", "tok ant.png", ("info tok", RECONSTRUCT)),
        ("tok/tokenizer.safetensors", "tok ant.png", ("info tok", RECONSTRUCT)),
        ("var/model.safetensors", "var", ("info var", SAMPLE.format("var"))),
        ("var/tokenizer.safetensors", "var", (SAMPLE.format("var"), EXPORT)),
        ("shards/index.json", RECIPE, ("shards check shards", TRAIN, TOKENS)),
        ("shards/val", RECIPE, ("shards check shards", TOKENS)),
        ("shards/train/000002.tar", RECIPE, ("shards check shards", TRAIN, TOKENS)),
        ("cache/tokens.json", "cache", ("tokens check cache",)),
        ("cache/train/000002.npy", "cache", ("tokens check cache",)),
        ("cache/val/000002.labels.npy", "cache", ("tokens check cache",)),
        ("recipes/var.yaml", "recipes tok shards", ("sweep recipes/sweep.yaml", TRAIN)),
        ("official/var.pth", OFFICIAL, (IMPORT_VAR,)),
        ("official/var_tok.pth", OFFICIAL, (IMPORT_VAR,)),
        ("tok", RECIPE, (TRAIN, TOKENS)),
        ("shards", RECIPE, (TRAIN, TOKENS)),
        ("runs/var/checkpoints/last.ckpt", "runs/var", ("info runs/var/checkpoints/last.ckpt",)),
        ("images/ant", "images list.csv", ("shards make list.csv out",)),
    )
    made = []
    for target, assets, commands in parts:
        for number, argv in enumerate(commands):
            names = "|".join({target.split("/")[-1], target.split("/")[0] + ":"}).replace(".", r"\.")
            want = EITHER if argv.startswith("info") and target.endswith("safetensors") else REFUSED
            made.append(
                fault(
                    "missing",
                    "reading",
                    f"{target.replace('/', '.')}-{number}",
                    assets,
                    argv,
                    remove(target),
                    want=want,
                    names=names,
                )
            )
    model = ("runs/var/model", "runs/var/checkpoints")
    for gone in model:
        made.append(
            fault(
                "missing",
                "reading",
                f"run-without-{gone.split('/')[-1]}",
                "runs/var",
                SAMPLE.format("runs/var"),
                remove(gone),
                want=EITHER,
                check=has_files("out/0*.png", 2),
                names="runs/var",
            )
        )
    made.append(
        fault(
            "missing",
            "reading",
            "run-without-either",
            "runs/var",
            SAMPLE.format("runs/var"),
            *map(remove, model),
            names="runs/var",
        )
    )
    return made


# --- one thing where another is wanted -----------------------------------------------------------------------------------

THINGS = {
    "tokenizer": "tok",
    "other-model": "mvar",
    "shards": "shards",
    "bare-shards": "bare",
    "cache": "cache",
    "images": "images",
    "archive": "npz/images.npz",
    "picture": "ant.png",
    "recipe": "recipes/var.yaml",
    "run-tokenizer": "runs/tok",
    "checkpoint": "runs/var/checkpoints/last.ckpt",
    "tokenizer-checkpoint": "runs/tok/checkpoints/last.ckpt",
    "script": "features.ts",
    "released": "official/var.pth",
    "released-tokenizer": "official/var_tok.pth",
    "list": "list.csv",
    "shard": "shards/train/000000.tar",
    "part": "cache/train/000000.npy",
    "weights": "tok/tokenizer.safetensors",
}
# slug, assets, command with a hole, things that are right there
HOLES = (
    ("sample-model", "", "sample --checkpoint {} --count 1 --out out", {"other-model", "checkpoint"}),
    (
        "tokens-tokenizer",
        "shards",
        "tokens make --checkpoint {} --data shards --out out --resize-ratio 1.0 --num-workers 0",
        {"tokenizer", "other-model", "run-tokenizer", "checkpoint", "tokenizer-checkpoint"},
    ),
    ("tokens-data", "tok", "tokens make --checkpoint tok --data {} --out out --num-workers 0", {"shards"}),
    ("train-data", "recipes/var.yaml tok", "train recipes/var.yaml --data {}", {"shards"}),
    ("train-recipe", "tok shards", "train {}", {"recipe"}),
    (
        "train-tokenizer",
        "recipes/var.yaml shards",
        "train recipes/var.yaml --model.tokenizer={}",
        {"tokenizer", "run-tokenizer", "tokenizer-checkpoint", "checkpoint", "other-model"},
    ),
    ("sweep-file", "tok shards", "sweep {}", set()),
    ("edit-image", "var", "edit --checkpoint var --image {} --box 0,0,0.5,0.5 --count 1 --out out", {"picture"}),
    ("edit-mask", "var bee.png", "edit --checkpoint var --image bee.png --mask {} --count 1 --out out", {"picture"}),
    (
        "evaluate-images",
        "npz/others.npz features.ts",
        "evaluate images --images {} --reference npz/others.npz --features features.ts --out out --no-floor",
        {"archive"},
    ),
    (
        "evaluate-reference",
        "npz/others.npz features.ts",
        "evaluate images --images npz/others.npz --reference {} --features features.ts --out out --no-floor",
        {"archive", "shards"},
    ),
    (
        "evaluate-features",
        "npz",
        "evaluate images --images npz/images.npz --reference npz/others.npz --features {} --out out --no-floor",
        {"script"},
    ),
    (
        "evaluate-tokenizer",
        "shards",
        "evaluate tokenizer --checkpoint {} --data shards --features none --out out",
        {"tokenizer", "other-model", "run-tokenizer", "checkpoint", "tokenizer-checkpoint", "released-tokenizer"},
    ),
    (
        "import-model",
        "official/mvar_tok.pth",
        "import --architecture var --model {} --tokenizer official/mvar_tok.pth --patch-nums 1,2 --out out",
        {"released"},
    ),
    (
        "import-tokenizer",
        "official/var.pth",
        "import --architecture var --model official/var.pth --tokenizer {} --patch-nums 1,2 --out out",
        {"released-tokenizer"},
    ),
    ("export-checkpoint", "", "export {} --model out.pth --tokenizer out_tok.pth", {"other-model", "checkpoint"}),
    ("shards-check", "", "shards check {}", {"shards"}),
    ("shards-source", "", "shards make {} out", {"images", "list"}),
    ("tokens-check", "", "tokens check {}", {"cache"}),
    ("info", "", "info {}", {"tokenizer", "other-model", "run-tokenizer", "checkpoint", "tokenizer-checkpoint"}),
    ("reconstruct-image", "tok", "reconstruct --checkpoint tok {} --out out.png", {"picture"}),
    ("scaling", "", "analyze scaling {} --out out", set()),
)


def swapped(rng: random.Random) -> list[Fault]:
    made = []
    for slug, assets, argv, right in HOLES:
        for name, thing in THINGS.items():
            if name in right:
                continue
            needs = " ".join(dict.fromkeys([*assets.split(), thing]))
            if any(thing.startswith(f"{asset}/") for asset in assets.split()):
                needs = assets
            lenient = (slug, name) in {("export-checkpoint", "released"), ("edit-mask", "shard")}
            made.append(
                fault(
                    "swapped",
                    "reading",
                    f"{slug}-{name}",
                    needs,
                    argv.format(thing),
                    want=EITHER if lenient else REFUSED,
                    names=thing.split("/")[-1].replace(".", r"\."),
                )
            )
    return made
