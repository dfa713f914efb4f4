"""Tiny files of every format that the product reads, made once by the product that is under test.

The names are those that a fault copies into its own folder: ``images`` (20 flat pictures whose color tells their class
and number), ``shards``, ``bare`` (the same without an index), ``tok``, ``tok2``, ``tok16``, ``var``, ``mvar``,
``markov``, ``official`` (released names), ``cache``, ``work`` (recipes and finished runs), ``npz``, ``features.ts``.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from .harness import Harness

CLASSES = ("ant", "bee")
PER_CLASS = 10
SIDE = 8
"""Pixels of the tiny models' images."""

MODELS = """
import torch
from mvar_lightning import MultiScaleTokenizer, NextScaleTransformer, save
from mvar_lightning import AdjacentAttention, SlidingWindowHistory, SpatialAttention, LlamaBlocks

def tokenizer(seed, scales=(1, 2), vocab=16):
    torch.manual_seed(seed)
    made = MultiScaleTokenizer(scales=list(scales), vocab_size=vocab, code_dim=4, channels=32,
                               channel_multipliers=[1, 1, 1], num_res_blocks=1, norm_groups=32)
    torch.nn.init.normal_(made.quantizer.codebook.weight, std=0.5)
    return made

def transformer(scales=(1, 2), vocab=16, **axes):
    torch.manual_seed(0)
    return NextScaleTransformer(list(scales), vocab_size=vocab, code_dim=4, num_classes=2, depth=2, width=16,
                                heads=2, gamma_init=0.1, **axes)

tok, tok2, tok16 = tokenizer(0), tokenizer(1), tokenizer(0, (1, 2, 4), 32)
save("tok", None, tok)
save("tok2", None, tok2)
save("tok16", None, tok16)
save("var", transformer(), tok)
save("mvar", transformer((1, 2, 4), 32, attention=SpatialAttention(kernel_size=3, scales=1)), tok16)
save("markov", transformer(attention=AdjacentAttention(), history=SlidingWindowHistory(3), blocks=LlamaBlocks()), tok)

def features(image):
    pooled = torch.nn.functional.adaptive_avg_pool2d(image, 2).flatten(1)
    return torch.cat([pooled, pooled * pooled], 1)[:, :8]

torch.jit.trace(features, torch.rand(2, 3, 8, 8)).save("features.ts")
"""


CUT_SHORT = """
import os, signal, sys
left = 2
def watch(event, arguments):
    global left
    if event == "os.rename" and str(arguments[1]).endswith("last.ckpt"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
from mvar_lightning.cli import main
main(["train", "recipes/long.yaml"])
"""
"""A run of two epochs that ends in its second: its checkpoint is that of the first."""


def color(label: int, number: int) -> tuple[int, int, int]:
    """The color of a picture: red or blue by its class, green by its number."""
    return (200, 10 * number, 30) if label == 0 else (30, 10 * number, 200)


def write_images(folder: Path, side: int = 16) -> None:
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(PER_CLASS):
            Image.new("RGB", (side, side), color(label, number)).save(folder / name / f"{number:02d}.png")


def data_section() -> dict:
    arguments = {"path": "shards", "image_size": SIDE, "batch_size": 4, "num_workers": 0, "resize_ratio": 1.0}
    return {"class_path": "mvar_lightning.ShardsDataModule", "init_args": arguments}


def var_recipe(epochs: int = 1) -> dict:
    """A recipe of four steps an epoch; faults change it."""
    model = {"tokenizer": "tok", "depth": 2, "width": 16, "heads": 2, "gamma_init": 0.1}
    return {
        "seed_everything": 0,
        "model": {"class_path": "mvar_lightning.VARModule", "init_args": model},
        "data": data_section(),
        "trainer": {
            "max_epochs": epochs,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }


def tokenizer_recipe(epochs: int = 1) -> dict:
    sizes = {
        "scales": [1, 2],
        "vocab_size": 16,
        "code_dim": 4,
        "channels": 32,
        "channel_multipliers": [1, 1, 1],
        "num_res_blocks": 1,
        "norm_groups": 32,
    }
    return {**var_recipe(epochs), "model": {"class_path": "mvar_lightning.TokenizerModule", "init_args": sizes}}


def sweep_file() -> dict:
    return {
        "recipe": "recipes/var.yaml",
        "seeds": [0],
        "variants": {
            "full": {"model.attention": "FullAttention"},
            "adjacent": {"model.attention": "AdjacentAttention"},
        },
        "columns": [{"metric": "val/loss", "title": "loss", "format": ".3f"}],
        "plot": ["val/loss"],
    }


def write_yaml(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def write_npz(folder: Path) -> None:
    """Images as an archive, and moments of eight features."""
    folder.mkdir()
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (20, SIDE, SIDE, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", arr_0=images)
    np.savez(folder / "others.npz", arr_0=random.integers(0, 256, (20, SIDE, SIDE, 3), dtype=np.uint8))
    np.savez(folder / "moments.npz", mu=random.normal(size=8), sigma=np.eye(8))


def make(folder: Path, harness: Harness) -> Path:
    """The folder of all assets; what is whole from an earlier call is kept."""
    if (folder / "whole").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_images(folder / "images")
    write_npz(folder / "npz")
    lines = [f"images/{name}/{n:02d}.png,{name}" for name in CLASSES for n in range(PER_CLASS)]
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    for number, (label, name) in enumerate(enumerate(CLASSES)):
        Image.new("RGB", (16, 16), color(label, number)).save(folder / f"{name}.png")
    write_yaml(folder / "recipes/var.yaml", var_recipe())
    write_yaml(folder / "recipes/long.yaml", var_recipe(epochs=2))
    write_yaml(folder / "recipes/tok.yaml", tokenizer_recipe())
    write_yaml(folder / "recipes/sweep.yaml", sweep_file())

    def run(*argv: object) -> None:
        answer = harness.ask(*argv, cwd=folder, seconds=120)
        if answer.status:
            raise RuntimeError(f"mvar {' '.join(map(str, argv))}: {answer.err}")

    made = harness.ask(cwd=folder, code=MODELS, seconds=120)
    if made.status:
        raise RuntimeError(made.err)
    run("shards", "make", "images", "shards", "--val-fraction", 0.2, "--samples-per-shard", 8)
    (folder / "bare").mkdir()
    for split in ("train", "val"):
        for shard in sorted((folder / "shards" / split).glob("*.tar")):
            shutil.copy(shard, folder / "bare" / f"{split}-{shard.name}")
    (folder / "official").mkdir()
    for name in ("var", "mvar", "markov"):
        run("export", name, "--model", f"official/{name}.pth", "--tokenizer", f"official/{name}_tok.pth")
    run("export", "var", "--model", "official/var.safetensors", "--tokenizer", "official/var_tok.safetensors")
    run(
        *[
            "tokens",
            "make",
            "--checkpoint",
            "tok",
            "--data",
            "shards",
            "--out",
            "cache",
            "--resize-ratio",
            "1.0",
            "--num-workers",
            "0",
        ]
    )
    run("train", "recipes/tok.yaml")
    run("train", "recipes/var.yaml")
    cut = harness.ask(cwd=folder, code=CUT_SHORT, seconds=120)
    if cut.status != -9 or not (folder / "runs/long/checkpoints/last.ckpt").exists():
        raise RuntimeError(f"the run was not cut short: {cut.err}")
    (folder / "whole").touch()
    return folder
