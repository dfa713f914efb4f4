"""Recipes of odd shape, and numbers that are no sizes: in recipes, overrides and flags."""
# ruff: noqa: E501, PERF401 - one case a row

from __future__ import annotations

import random
from typing import Any

import yaml

from .assets import sweep_file, var_recipe
from .fault import EITHER, REFUSED, RIGHT, Fault, fault, has_files, put
from .generator_files import RECIPE, TRAIN

TRAINED = has_files("runs/var/model/*.safetensors", 2)
ASSETS = "tok shards"


def dumped(content: object) -> str:
    return yaml.safe_dump(content, sort_keys=False)


BASE = dumped(var_recipe())


def replaced(old: str, new: str) -> str:
    assert old in BASE, old
    return BASE.replace(old, new)


# text of recipes/var.yaml, what is wanted
TEXTS: dict[str, tuple[str | bytes, str]] = {
    "crlf": (BASE.replace("\n", "\r\n"), RIGHT),
    "bom": (b"\xef\xbb\xbf" + BASE.encode(), RIGHT),
    "utf-16": (BASE.encode("utf-16"), EITHER),
    "latin-1": ("# für Größe\n".encode("latin-1") + BASE.encode(), REFUSED),
    "unicode-comment": ("# für 猫\n" + BASE, RIGHT),
    "document-mark": ("---\n" + BASE + "...\n", RIGHT),
    "yaml-header": ("%YAML 1.1\n---\n" + BASE, RIGHT),
    "two-documents": (BASE + "---\nmodel: 1\n", REFUSED),
    "json": (__import__("json").dumps(var_recipe()), RIGHT),
    "flow": (yaml.safe_dump(var_recipe(), default_flow_style=True), RIGHT),
    "anchor": (replaced("depth: 2", "depth: &two 2").replace("heads: 2", "heads: *two"), RIGHT),
    "anchor-unknown": (replaced("depth: 2", "depth: *two"), REFUSED),
    "merge-key": ("common: &c {depth: 2}\n" + BASE, REFUSED),
    "merge-inside": (replaced("    depth: 2\n", "    <<: {depth: 2}\n"), RIGHT),
    "recursive": ("model: &m\n  init_args: *m\n", REFUSED),
    "recursive-list": ("&a [*a]\n", REFUSED),
    "duplicate-key": (replaced("depth: 2", "depth: 2\n    depth: 3"), EITHER),
    "duplicate-section": (BASE + "trainer: {max_epochs: 2}\n", EITHER),
    "tab": (replaced("    depth: 2", "\tdepth: 2"), REFUSED),
    "tab-end": (replaced("depth: 2", "depth: 2\t# two"), RIGHT),
    "python-tag": (replaced("depth: 2", "depth: !!python/object/apply:os.getpid []"), REFUSED),
    "python-tuple": (replaced("depth: 2", "depth: !!python/tuple [2]"), REFUSED),
    "own-tag": (replaced("depth: 2", "depth: !two 2"), REFUSED),
    "int-tag": (replaced("depth: 2", "depth: !!int '2'"), RIGHT),
    "binary-tag": (replaced("tokenizer: tok", "tokenizer: !!binary dG9r"), REFUSED),
    "set-tag": (replaced("depth: 2", "depth: !!set {2}"), REFUSED),
    "octal": (replaced("width: 16", "width: 0o20"), EITHER),
    "hex": (replaced("width: 16", "width: 0x10"), RIGHT),
    "underscore": (replaced("width: 16", "width: 1_6"), EITHER),
    "sexagesimal": (replaced("width: 16", "width: 1:6"), REFUSED),
    "date": (replaced("width: 16", "width: 2026-11-28"), REFUSED),
    "yes": (replaced("enable_progress_bar: false", "enable_progress_bar: no"), RIGHT),
    "off": (replaced("enable_progress_bar: false", "enable_progress_bar: off"), RIGHT),
    "exponent": (replaced("gamma_init: 0.1", "gamma_init: 1e-1"), RIGHT),
    "exponent-whole": (replaced("width: 16", "width: 16e0"), EITHER),
    "quoted-number": (replaced("depth: 2", "depth: '2'"), EITHER),
    "infinite": (replaced("gamma_init: 0.1", "gamma_init: .inf"), REFUSED),
    "not-a-number": (replaced("gamma_init: 0.1", "gamma_init: .nan"), REFUSED),
    "null-model": ("model:\n", REFUSED),
    "null-trainer": (BASE.split("trainer:")[0] + "trainer:\n", EITHER),
    "null-init-args": (replaced("depth: 2", "depth:"), EITHER),
    "empty-key": (replaced("depth: 2", "'': 2"), REFUSED),
    "number-key": (replaced("depth: 2", "2: 2"), REFUSED),
    "null-key": (replaced("depth: 2", "null: 2"), REFUSED),
    "list-key": (replaced("depth: 2", "? [a, b]\n    : 2"), REFUSED),
    "bool-key": (replaced("depth: 2", "yes: 2"), REFUSED),
    "section-list": (replaced("trainer:\n", "trainer:\n  - 1\n  - 2\nmore:\n"), REFUSED),
    "model-list": (dumped({**var_recipe(), "model": [var_recipe()["model"]]}), REFUSED),
    "model-string": (dumped({**var_recipe(), "model": "mvar_lightning.VARModule"}), REFUSED),
    "data-string": (dumped({**var_recipe(), "data": "shards"}), REFUSED),
    "trainer-string": (dumped({**var_recipe(), "trainer": "fast"}), REFUSED),
    "scalar": ("3\n", REFUSED),
    "comment-only": ("# nothing yet\n", REFUSED),
    "list": (dumped([var_recipe()]), REFUSED),
    "unclosed": (BASE + "extra: {a: [1\n", REFUSED),
    "bad-quote": (BASE + "extra: 'x\n", REFUSED),
    "null-byte": (BASE.replace("depth", "de\0pth"), REFUSED),
    "control": (BASE.replace("tok\n", "tok\x07\n"), REFUSED),
    "deep": (BASE + "extra: " + "[" * 2000 + "]" * 2000 + "\n", REFUSED),
    "env": (replaced("path: shards", "path: ${oc.env:FAULT_SHARDS}"), EITHER),
    "env-missing": (replaced("path: shards", "path: ${oc.env:NO_SUCH_NAME}"), REFUSED),
    "env-default": (replaced("path: shards", "path: ${oc.env:NO_SUCH_NAME,shards}"), EITHER),
    "reference": (replaced("heads: 2", "heads: ${model.init_args.depth}"), EITHER),
    "reference-missing": (replaced("heads: 2", "heads: ${model.init_args.nothing}"), REFUSED),
    "reference-circle": (replaced("depth: 2", "depth: ${model.init_args.heads}").replace("heads: 2", "heads: ${model.init_args.depth}"), REFUSED),
    "reference-open": (replaced("path: shards", "path: ${shards"), REFUSED),
    "resolver-unknown": (replaced("depth: 2", "depth: ${now:%Y}"), REFUSED),
    "dollar": (replaced("path: shards", "path: $HOME/shards"), REFUSED),
    "missing-mark": (replaced("depth: 2", "depth: ???"), REFUSED),
    "class-os": (replaced("mvar_lightning.VARModule", "os.system"), REFUSED),
    "class-torch": (replaced("mvar_lightning.VARModule", "torch.nn.Linear"), REFUSED),
    "class-empty": (replaced("mvar_lightning.VARModule", "''"), REFUSED),
    "class-null": (replaced("mvar_lightning.VARModule", "null"), REFUSED),
    "class-number": (replaced("mvar_lightning.VARModule", "3"), REFUSED),
    "class-dots": (replaced("mvar_lightning.VARModule", "mvar_lightning..VARModule"), REFUSED),
    "class-space": (replaced("mvar_lightning.VARModule", "'mvar_lightning.VARModule '"), EITHER),
    "class-short": (replaced("mvar_lightning.VARModule", "VARModule"), EITHER),
    "class-function": (replaced("mvar_lightning.VARModule", "mvar_lightning.generate"), REFUSED),
    "class-module": (replaced("mvar_lightning.VARModule", "mvar_lightning"), REFUSED),
    "class-data": (replaced("mvar_lightning.VARModule", "mvar_lightning.ShardsDataModule"), REFUSED),
    "class-lightning": (replaced("mvar_lightning.VARModule", "lightning.pytorch.LightningModule"), REFUSED),
    "class-demo": (replaced("mvar_lightning.VARModule", "lightning.pytorch.demos.boring_classes.BoringModel"), REFUSED),
}  # fmt: skip


def with_trainer(**more: Any) -> str:
    recipe = var_recipe()
    recipe["trainer"] |= more
    return dumped(recipe)


def callback(name: str, **arguments: Any) -> str:
    return with_trainer(callbacks=[{"class_path": name, "init_args": arguments}])


OURS = "mvar_lightning.callbacks."
SECTIONS: dict[str, tuple[str, str]] = {
    "callbacks-map": (with_trainer(callbacks={"class_path": OURS + "EMA"}), EITHER),
    "callbacks-name": (with_trainer(callbacks=OURS + "EMA"), EITHER),
    "callbacks-null": (with_trainer(callbacks=[None]), REFUSED),
    "callbacks-number": (with_trainer(callbacks=[3]), REFUSED),
    "callbacks-twice": (with_trainer(callbacks=[{"class_path": OURS + "EMA"}] * 2), EITHER),
    "callbacks-nested": (with_trainer(callbacks=[[{"class_path": OURS + "EMA"}]]), REFUSED),
    "callback-no-arguments": (with_trainer(callbacks=[{"class_path": OURS + "EMA", "init_args": None}]), RIGHT),
    "callback-strategy": (callback("mvar_lightning.FullAttention"), REFUSED),
    "callback-early-stop": (callback("lightning.pytorch.callbacks.EarlyStopping", monitor="val/loss"), EITHER),
    "callback-early-stop-typo": (callback("lightning.pytorch.callbacks.EarlyStopping", monitor="val/los"), REFUSED),
    "callback-checkpoint-typo": (callback("lightning.pytorch.callbacks.ModelCheckpoint", monitor="val/los"), REFUSED),
    "callback-checkpoint": (callback("lightning.pytorch.callbacks.ModelCheckpoint", monitor="val/loss", dirpath="best"), EITHER),
    "callback-ema-one": (callback(OURS + "EMA", decay=1), REFUSED),
    "callback-ema-text": (callback(OURS + "EMA", decay="0.9x"), REFUSED),
    "callback-ema-negative": (callback(OURS + "EMA", decay=-0.1), REFUSED),
    "logger-false": (with_trainer(logger=False), EITHER),
    "logger-wandb": (with_trainer(logger={"class_path": "lightning.pytorch.loggers.WandbLogger"}), REFUSED),
    "logger-csv": (with_trainer(logger={"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "logs"}}), EITHER),
    "profiler": (with_trainer(profiler="simple"), EITHER),
    "profiler-typo": (with_trainer(profiler="simpel"), REFUSED),
    "fast-dev-run": (with_trainer(fast_dev_run=True), EITHER),
    "overfit": (with_trainer(overfit_batches=1), EITHER),
    "limit-val-none": (with_trainer(limit_val_batches=0), EITHER),
    "limit-train-none": (with_trainer(limit_train_batches=0), EITHER),
    "limit-train-part": (with_trainer(limit_train_batches=0.01), EITHER),
    "max-time": (with_trainer(max_time="00:00:00:01"), EITHER),
    "max-time-typo": (with_trainer(max_time="1 hour"), REFUSED),
    "val-never": (with_trainer(check_val_every_n_epoch=99), EITHER),
    "val-check-large": (with_trainer(val_check_interval=1000), EITHER),
    "precision-16": (with_trainer(precision="16-mixed"), EITHER),
    "precision-64": (with_trainer(precision="64-true"), EITHER),
    "precision-bf16": (with_trainer(precision="bf16-mixed"), EITHER),
    "accelerator-gpu": (with_trainer(accelerator="gpu"), REFUSED),
    "accelerator-mps": (with_trainer(accelerator="mps"), REFUSED),
    "devices-four": (with_trainer(accelerator="gpu", devices=4), REFUSED),
    "devices-list": (with_trainer(accelerator="cpu", devices=[0, 1]), REFUSED),
    "deterministic": (with_trainer(deterministic=True), RIGHT),
    "detect-anomaly": (with_trainer(detect_anomaly=True), RIGHT),
    "min-epochs": (with_trainer(min_epochs=3), EITHER),
    "barebones": (with_trainer(barebones=True), EITHER),
    "plugin-typo": (with_trainer(plugins=["slrum"]), REFUSED),
    "default-root": (with_trainer(default_root_dir="elsewhere"), EITHER),
}  # fmt: skip
PATHS = r"recipes/var\.yaml|EMA|model|data|trainer|callback|override|depth|shards"


def recipes(rng: random.Random) -> list[Fault]:
    made = []
    for table in (TEXTS, SECTIONS):
        for name, (text, want) in table.items():
            argv = (
                "fit --config recipes/var.yaml" if table is TEXTS and rng.random() < 0.25 and want == REFUSED else TRAIN
            )
            check = TRAINED if want == RIGHT else None
            settings = {"env": {"FAULT_SHARDS": "shards"}} if name == "env" else {}
            made.append(
                fault(
                    "recipes",
                    "reading",
                    name,
                    ASSETS,
                    argv,
                    put("recipes/var.yaml", text),
                    want=want,
                    names=PATHS,
                    check=check,
                    settings=settings,
                )
            )
    return made + sweeps()


def sweep(**changes: Any) -> str:
    return dumped({key: value for key, value in {**sweep_file(), **changes}.items() if value is not ...})


def column(**changes: Any) -> str:
    return sweep(
        columns=[
            {
                key: value
                for key, value in {"metric": "val/loss", "title": "loss", "format": ".3f", **changes}.items()
                if value is not ...
            }
        ]
    )


def sweeps() -> list[Fault]:
    texts: dict[str, tuple[str, str]] = {
        "no-recipe": (sweep(recipe=...), REFUSED),
        "recipe-missing": (sweep(recipe="recipes/none.yaml"), REFUSED),
        "recipe-itself": (sweep(recipe="recipes/sweep.yaml"), REFUSED),
        "recipe-number": (sweep(recipe=3), REFUSED),
        "no-variants": (sweep(variants=...), REFUSED),
        "variants-empty": (sweep(variants={}), REFUSED),
        "variants-list": (sweep(variants=["full"]), REFUSED),
        "variant-text": (sweep(variants={"full": "model.attention=FullAttention"}), REFUSED),
        "variant-list": (sweep(variants={"full": ["--model.depth=1"]}), REFUSED),
        "variant-slash": (sweep(variants={"a/b": {"model.depth": 1}}), REFUSED),
        "variant-up": (sweep(variants={"..": {"model.depth": 1}}), REFUSED),
        "variant-long": (sweep(variants={"x" * 300: {"model.depth": 1}}), REFUSED),
        "variant-empty-name": (sweep(variants={"": {"model.depth": 1}}), REFUSED),
        "variant-typo": (sweep(variants={"a": {"model.dpeth": 1}}), REFUSED),
        "variant-value": (sweep(variants={"a": {"model.depth": "two"}}), REFUSED),
        "seeds-text": (sweep(seeds="0"), REFUSED),
        "seeds-empty": (sweep(seeds=[]), REFUSED),
        "seeds-negative": (sweep(seeds=[-1]), REFUSED),
        "seeds-float": (sweep(seeds=[0.5]), REFUSED),
        "seeds-twice": (sweep(seeds=[0, 0], variants={"a": {"model.depth": 1}}), EITHER),
        "seeds-number": (sweep(seeds=2), REFUSED),
        "seeds-huge": (sweep(seeds=[2**70]), REFUSED),
        "columns-text": (sweep(columns="val/loss"), REFUSED),
        "columns-names": (sweep(columns=["val/loss"]), REFUSED),
        "column-no-metric": (column(metric=...), REFUSED),
        "column-format": (column(format="3f."), REFUSED),
        "column-format-type": (column(format=3), REFUSED),
        "column-format-d": (column(format="d"), REFUSED),
        "column-divide-zero": (column(divide=0), REFUSED),
        "column-divide-text": (column(divide="MiB"), REFUSED),
        "column-extra": (column(colour="red"), REFUSED),
        "plot-map": (sweep(plot={"val/loss": 1}), REFUSED),
        "plot-text": (sweep(plot="val/loss"), REFUSED),
        "curves-number": (sweep(curves=[3]), REFUSED),
        "extra-section": (sweep(variant={}), REFUSED),
    }
    names = "sweep|recipe|variant|seed|column|plot|curve|none"
    # checked before anything is trained: a sweep that is wrong costs no run
    return [
        fault(
            "recipes",
            "reading",
            name,
            "recipes/var.yaml tok shards",
            "sweep recipes/sweep.yaml",
            put("recipes/sweep.yaml", text),
            want=want,
            names=names,
            settings={"seconds": 45},
        )
        for name, (text, want) in texts.items()
    ]


# --- numbers -------------------------------------------------------------------------------------------------------------

WILD = (
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1e400",
    "1_0",
    "٣",
    "0x10",
    "",
    " ",
    "two",
    "1.5",
    "99999999999999999999",
    "1e3",
    "--",
    "True",
    "1,5",
    "+1",
    "1e-400",
    "½",
    "1e9",
)
# command with a hole, flag, assets, values that are right there, values that may be (in some sense)
SAMPLING = "sample --checkpoint var --out out --count 1 --classes 0 --{}={}"
FLAGS: tuple[tuple[str, str, str, str, str], ...] = (
    ("sample --checkpoint var --out out --classes 0 --{}={}", "count", "var", "+1", "1_0 ٣"),
    (SAMPLING, "cfg", "var", "0 +1 1.5 1e-400", "-1 1_0 ٣ 1e3 1e9"),
    (SAMPLING, "top-k", "var", "0 +1", "1_0 ٣ 99999999999999999999"),
    (SAMPLING, "top-p", "var", "+1", "٣ 1e-400 0"),
    (SAMPLING, "temperature", "var", "+1 1.5", "1_0 ٣ 1e3 1e9"),
    (SAMPLING, "seed", "var", "0 +1", "1_0 ٣"),
    (SAMPLING, "batch-size", "var", "+1", "1_0 ٣ 99999999999999999999"),
    (SAMPLING, "devices", "var", "+1", "1_0 ٣"),
    (SAMPLING, "guided-scales", "var", "", "0 +1 -1 ٣ 1_0"),
    ("sample --checkpoint var --out out --count 1 --{}={}", "classes", "var", "0 +1", "-1 1_0 ٣"),
    ("edit --checkpoint var --image ant.png --box 0,0,4,4 --out out --{}={}", "count", "var ant.png", "+1", "1_0 ٣"),
    ("edit --checkpoint var --image ant.png --box 0,0,4,4 --count 1 --out out --{}={}", "class", "var ant.png", "0 +1", "-1 1_0 ٣"),
    ("shards make images out --{}={}", "val-fraction", "images", "", "0 1e-400"),
    ("shards make images out --{}={}", "samples-per-shard", "images", "+1", "1_0 ٣ 99999999999999999999"),
    ("shards make images out --{}={}", "mb-per-shard", "images", "+1 1.5 1e3", "1_0 ٣ 1e9 99999999999999999999 1e-400"),
    ("shards make images out --{}={}", "resize", "images", "", "1_0 ٣ +1"),
    ("shards make images out --{}={}", "seed", "images", "0 +1", "1_0 ٣ 99999999999999999999 -1"),
    ("shards make images out --{}={}", "workers", "images", "+1", "1_0 ٣ 0"),
    ("tokens make --checkpoint tok --data shards --out out --num-workers 0 --{}={}", "views", "tok shards", "+1", "1_0 ٣"),
    ("tokens make --checkpoint tok --data shards --out out --num-workers 0 --{}={}", "resize-ratio", "tok shards", "+1 1.5", "1_0 ٣"),
    ("tokens make --checkpoint tok --data shards --out out --num-workers 0 --{}={}", "batch-size", "tok shards", "+1", "1_0 ٣ 99999999999999999999"),
    ("tokens make --checkpoint tok --data shards --out out --num-workers 0 --{}={}", "seed", "tok shards", "0 +1", "1_0 ٣"),
    ("evaluate tokenizer --checkpoint tok --data shards --features none --out out --{}={}", "images", "tok shards", "+1", "1_0 ٣ 99999999999999999999"),
    ("evaluate tokenizer --checkpoint tok --data shards --features none --out out --{}={}", "resize-ratio", "tok shards", "+1 1.5", "1_0 ٣"),
    ("evaluate tokenizer --checkpoint tok --data shards --features none --out out --{}={}", "progressive-images", "tok shards", "+1", "1_0 ٣ 0 99999999999999999999"),
    ("evaluate images --images npz/images.npz --reference npz/others.npz --features features.ts --out out --{}={}", "batch-size", "npz features.ts", "+1", "1_0 ٣ 99999999999999999999"),
    ("evaluate images --images npz/images.npz --reference npz/others.npz --features features.ts --out out --{}={}", "feature-size", "npz features.ts", "", "1_0 ٣ +1"),
    ("reconstruct --checkpoint tok --data shards --out out.png --{}={}", "images", "tok shards", "+1", "1_0 ٣ 99999999999999999999"),
    ("reconstruct --checkpoint tok ant.png --out out.png --{}={}", "image-size", "tok ant.png", "", "1_0 ٣"),
    ("analyze attention --checkpoint var --data shards --out out --{}={}", "images", "var shards", "+1", "1_0 ٣ 99999999999999999999"),
)  # fmt: skip


SAID_AS = {
    "val-fraction": "fraction",
    "classes": "class",
    "class": "class",
    "mb-per-shard": "mb|MB",
    "progressive-images": "images",
}


def flags(rng: random.Random) -> list[Fault]:
    made = []
    for template, flag, assets, right, maybe in FLAGS:
        for value in WILD:
            want = RIGHT if value in right.split() else EITHER if value in maybe.split() else REFUSED
            if (value == "+1" and want == EITHER) or (value in ("1e9", "1e3") and "count" in flag):
                continue  # large, and nothing is wrong with it
            words = [word.format(flag, value) for word in template.split()]
            made.append(
                fault(
                    "flags",
                    "parsing",
                    f"{flag}-{value or 'empty'}-{assets.split()[0]}",
                    assets,
                    words,
                    want=want,
                    names=SAID_AS.get(flag, flag.replace("-", "[-_ ]")),
                    settings={"seconds": 15},
                )
            )
    unique = {one.id: one for one in made}
    return list(unique.values())


# name, values that are wrong, values that are right
SETTINGS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("model.depth", ("0", "-1", "1.5", "null", "two", "1e400"), ("1", "+2")),
    ("model.width", ("0", "-16", "18", "1e3x"), ("32",)),
    ("model.heads", ("0", "3", "-2"), ("1", "4")),
    ("model.drop_path", ("1", "-0.1", "nan", "1.5"), ("0.5",)),
    ("model.base_lr", ("nan", "-1", "inf", "fast"), ("1e-3", "0")),
    ("model.gamma_init", ("nan", "inf"), ("0", "1e-5")),
    ("model.top_p", ("0", "-1", "1.5", "nan"), ("0.5", "null")),
    ("model.top_k", ("-1", "1.5"), ("1", "null")),
    ("model.label_drop", ("1.5", "-0.1", "nan"), ("0.2",)),
    ("model.weight_decay", ("nan", "-1"), ("0",)),
    ("model.betas", ("[0.9]", "[2,3]", "0.9"), ("[0.9,0.95]",)),
    ("data.batch_size", ("0", "-4", "1.5", "17", "nan"), ("1", "16")),
    ("data.image_size", ("0", "-8", "16", "8.5"), ("8",)),
    ("data.resize_ratio", ("0", "0.5", "-1", "nan", "inf"), ("1.5",)),
    ("data.num_workers", ("-1", "0.5", "nan"), ("0",)),
    ("data.epoch_samples", ("0", "-1", "3"), ("8",)),
    ("data.crop", ("centre", "1", "[center]"), ("center",)),
    ("data.seed", ("-1.5", "x"), ("3",)),
    ("trainer.max_epochs", ("-2", "1.5", "nan"), ("1",)),
    ("trainer.max_steps", ("-2", "1.5"), ("2",)),
    ("trainer.gradient_clip_val", ("-1", "nan", "x"), ("0.5", "null")),
    ("trainer.accumulate_grad_batches", ("0", "-1", "1.5"), ("2",)),
    ("trainer.log_every_n_steps", ("-1", "x"), ("1",)),
    ("trainer.check_val_every_n_epoch", ("0", "-1", "1.5"), ("1",)),
    ("trainer.num_nodes", ("0", "2"), ("1",)),
    ("trainer.devices", ("0", "-2", "x"), ("1",)),
    ("seed_everything", ("-1", "1.5", "99999999999", "x"), ("7", "false")),
    ("checkpoint.every_minutes", ("-1", "nan", "x"), ("0.5", "null")),
    ("checkpoint.every_steps", ("0", "-1", "1.5"), ("2",)),
)


def overrides(rng: random.Random) -> list[Fault]:
    made = []
    for name, wrong, right in SETTINGS:
        for value in (*wrong, *right):
            unsure = value in ("0", "-1", "nan") and name.split(".")[-1] in (
                "gradient_clip_val",
                "num_workers",
                "log_every_n_steps",
                "every_steps",
                "devices",
                "label_drop",
            )
            want = RIGHT if value in right else EITHER if unsure else REFUSED
            if value in ("+2", "false", "0") and want == RIGHT:
                want = EITHER
            check = has_files("out/model/*.safetensors", 2) if want == RIGHT else None
            names = name.split(".")[-1] + ("|epochs" if name.endswith("max_steps") else "")
            made.append(
                fault(
                    "overrides",
                    "parsing",
                    f"{name}={value}",
                    RECIPE,
                    [*TRAIN.split(), "--run-folder", "out", f"--{name}={value}"],
                    want=want,
                    names=names,
                    check=check,
                    settings={"seconds": 20},
                )
            )
    for words in (
        "--model.depth",
        "--model.depth=",
        "--model",
        "--model.",
        "--.depth=1",
        "--model..depth=1",
        "--=1",
        "--model.depth=1=2",
        "-model.depth=1",
        "--model={}",
        "--model.init_args=3",
        "--trainer=null",
        "--trainer.callbacks+=x",
        "--data.path",
        "--config=recipes/none.yaml",
        "--trainer.callbacks=[",
        '--model={"depth": 1',
        "--model.depth=[1",
        "--model.attention={}",
        "--print_config=x",
        "--ckpt_path=none.ckpt",
    ):
        made.append(
            fault(
                "overrides",
                "parsing",
                f"shape-{words.replace('/', '|')}",
                RECIPE,
                [*TRAIN.split(), words],
                names="model|data|trainer|=1|config|ckpt|depth|print",
                settings={"seconds": 20},
            )
        )
    return made
