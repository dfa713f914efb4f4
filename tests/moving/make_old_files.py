"""Makes the files in ``made_by_0_1``: what version 0.1.0 wrote before its files were moved, in small.

It was run once, on a16be38 (version 0.1.0), from a clone of that commit:

    PYTHONPATH=. OMP_NUM_THREADS=1 python .../tests/moving/make_old_files.py .../tests/moving/made_by_0_1

and is kept to tell what is in the files. It is not to be run on a later commit: the files would not be old any more.

    recipes/            a tokenizer, VAR and Markov-VAR on 40 digits; one recipe with class paths of inner modules
    data/digits         image shards
    data/tokens         a token cache of these, by the tokenizer of runs/tokenizer
    runs/NAME           run.json, metrics.json, config.yaml, model/ and checkpoints/last.ckpt of each `mvar train`
    expected.json       what 0.1.0 makes of them: losses of two more steps, tokens, samples, orders
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from mvar_lightning import ShardsDataModule, TokenShards, generate, load
from mvar_lightning.cli import main as mvar

RUNS = ("tokenizer", "var", "markov_var")
TRAIN, VAL, SIDE = 40, 10, 8

TOKENIZER: dict[str, Any] = {
    "scales": [1, 2, 4],
    "vocab_size": 16,
    "code_dim": 4,
    "channels": 4,
    "channel_multipliers": [1, 2],
    "num_res_blocks": 1,
    "phi_layers": 1,
    "norm_groups": 2,
    "remedies": [{"class_path": "mvar_lightning.DataDependentInit"}, {"class_path": "mvar_lightning.DeadCodeRestart"}],
}
MODEL: dict[str, Any] = {
    "tokenizer": "runs/tokenizer/model",
    "depth": 1,
    "width": 16,
    "heads": 2,
    "drop_path": 0.1,
    "base_lr": 3e-1,
    "gamma_init": 0.1,
}
IMAGES = {"path": "data/digits", "image_size": SIDE, "batch_size": 8, "num_workers": 0, "shuffle_buffer": 20}
TRAINER: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 2,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
AVERAGE = {"class_path": "mvar_lightning.callbacks.EMA", "init_args": {"decay": 0.5}}


def main(folder: Path) -> None:
    """Make everything in ``folder``, anew."""
    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)
    write_recipes()
    write_pictures(Path("pictures"))
    command("shards", "make", "pictures", "data/digits", "--samples-per-shard", "20", "--workers", "1")
    shutil.rmtree("pictures")
    for run in RUNS:
        command("train", f"recipes/{run}.yaml", "--run-folder", f"runs/{run}")
    command(
        *("tokens", "make", "--checkpoint", "runs/tokenizer", "--data", "data/digits", "--out", "data/tokens"),
        *("--views", "2", "--flip", "--accelerator", "cpu", "--devices", "1", "--num-workers", "0"),
    )
    expected = {"resumed": {run: resumed(run) for run in RUNS}, **of_weights(), **of_data()}
    Path("expected.json").write_text(json.dumps(expected) + "\n")
    shutil.rmtree("again")
    for leftover in ("tensorboard", ".lock"):
        for path in Path("runs").rglob(leftover):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def command(*arguments: str) -> None:
    assert mvar(arguments) == 0, arguments


def write_recipes() -> None:
    """The recipes, by their public names, and one by the names of the modules that classes were in."""
    Path("recipes").mkdir()
    tokenizer = {"class_path": "mvar_lightning.TokenizerModule", "init_args": TOKENIZER}
    var = {"class_path": "mvar_lightning.VARModule", "init_args": MODEL}
    history = {"class_path": "mvar_lightning.SlidingWindowHistory", "init_args": {"size": 2}}
    markov_var = {
        "class_path": "mvar_lightning.MarkovVARModule",
        "init_args": {**MODEL, "width": 8, "history": history},
    }
    images = {"class_path": "mvar_lightning.ShardsDataModule", "init_args": IMAGES}
    inner_var = {"class_path": "mvar_lightning.modules.VARModule", "init_args": MODEL}
    inner_images = {"class_path": "mvar_lightning.data.modules.ShardsDataModule", "init_args": IMAGES}
    for name, model, data in (
        ("tokenizer", tokenizer, images),
        ("var", var, images),
        ("markov_var", markov_var, images),
        ("var_inner_paths", inner_var, inner_images),
    ):
        averaged = {} if name == "markov_var" else {"callbacks": [AVERAGE]}  # two weights a checkpoint make it large
        content = {"seed_everything": 0, "model": model, "data": data, "trainer": TRAINER | averaged}
        Path("recipes", f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def write_pictures(folder: Path) -> None:
    """Some digits of scikit-learn as PNG files, three classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = [(number, int(label)) for number, label in enumerate(digits.target) if label < 3]
    for place, (number, label) in enumerate(chosen[: TRAIN + VAL]):
        path = folder / ("train" if place < TRAIN else "val") / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[number] * 15.9).astype(np.uint8)).save(path)


def resumed(run: str) -> list[float]:
    """Losses of two more steps from the run's checkpoint."""
    command(*resume(run, f"recipes/{run}.yaml", "again"))
    with Path("again", run, "log", "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def resume(run: str, recipe: str, folder: str) -> list[str]:
    """Arguments of `mvar fit` for two more steps from the run's checkpoint, in a folder of its own, with a log."""
    kind = "lightning.pytorch.loggers.CSVLogger"
    logger = f"{{class_path: {kind}, init_args: {{save_dir: {folder}/{run}, name: log, version: ''}}}}"
    more = ["--trainer.max_epochs=4", "--trainer.max_steps=12", f"--trainer.logger={logger}"]
    last = f"runs/{run}/checkpoints/last.ckpt"
    return ["fit", "--config", recipe, "--ckpt-path", last, "--run-folder", f"{folder}/{run}", *more]


def of_weights() -> dict[str, Any]:
    """Tokens of the validation images, and of four seeds of each model."""
    data = ShardsDataModule("data/digits", SIDE, batch_size=VAL, num_workers=0)
    data.prepare_data()
    data.setup("fit")
    images = next(iter(data.val_dataloader()))["image"]
    samples = {}
    for run in RUNS[1:]:
        model, tokenizer = load(f"runs/{run}/model")
        assert model is not None
        _, drawn = generate(model, tokenizer, [0, 1, 2, -1], cfg=1.5, top_k=8, top_p=0.9, seeds=[1, 2, 3, 4])
        samples[run] = drawn.tolist()
    _, tokenizer = load("runs/tokenizer")
    return {"tokens": tokenizer.encode(images).tolist(), "samples": samples}


def of_data() -> dict[str, Any]:
    """Labels of the training streams over two epochs, and all tokens that a cache gives for validation."""
    found: dict[str, Any] = {}
    images = ShardsDataModule("data/digits", SIDE, batch_size=8, num_workers=0, shuffle_buffer=20, seed=1)
    tokens = TokenShards("data/tokens", batch_size=8, num_workers=0, shuffle_window=20, seed=1)
    for name, data in (("images", images), ("tokens", tokens)):
        data.prepare_data()
        data.setup("fit")
        loader = data.train_dataloader()
        found[f"order of {name}"] = [batch["label"].tolist() for _ in range(2) for batch in loader]
    found["cached"] = [row for batch in tokens.val_dataloader() for row in batch["tokens"].tolist()]
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
