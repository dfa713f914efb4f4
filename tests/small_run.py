"""A small real run: some handwritten digits as shards, a tokenizer small enough for tests, quiet trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from mvar_lightning import L1Loss, L2Loss, MultiScaleTokenizer, QuantizerLoss, ShardsDataModule, save
from mvar_lightning.data.making.embedded import digits
from mvar_lightning.data.making.shards import ShardLimits, ShardsRequest, make_shards
from mvar_lightning.data.making.sources import Source

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
"""For tests of the GPU tier: what they do is tried on a CPU, so that no slip waits for a GPU."""

TOKENIZER_SIZES: dict[str, Any] = {
    "scales": [1, 2, 4],
    "vocab_size": 32,
    "code_dim": 8,
    "channels": 8,
    "channel_multipliers": [1, 1, 2],
    "num_res_blocks": 1,
    "norm_groups": 4,
}
"""16 x 16 pixels, 21 tokens."""


def plain() -> dict[str, Any]:
    """Settings of VAR's plain form, without remedies."""
    return {"losses": [L1Loss(), L2Loss(), QuantizerLoss()], "remedies": []}


MODEL_SIZES: dict[str, Any] = {"num_classes": 10, "depth": 2, "width": 32, "heads": 2, "gamma_init": 0.1}
BATCH, TRAIN, VAL = 16, 96, 32


def write_digits(folder: Path, val: int = VAL) -> Path:
    """Shards of a few of the embedded digits."""
    whole = digits()
    few = Source(whole.class_names, whole.train[:TRAIN], whole.val[:val])
    make_shards(ShardsRequest(few, folder, ShardLimits(samples=40)))
    return folder


def write_tokenizer(folder: Path, seed: int = 0) -> Path:
    """An untrained tokenizer whose codes are spread like its latents, so that an image uses many of them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = MultiScaleTokenizer(**TOKENIZER_SIZES)
        torch.nn.init.normal_(tokenizer.quantizer.codebook.weight, std=0.5)
    save(folder, None, tokenizer)
    return folder


def data_module(folder: Path, **changes: Any) -> ShardsDataModule:
    settings: dict[str, Any] = {"image_size": 16, "batch_size": BATCH, "num_workers": 0, "resize_ratio": 1.125}
    return ShardsDataModule(str(folder), **{**settings, **changes})


def trainer(folder: Path, *callbacks: L.Callback, **changes: Any) -> L.Trainer:
    """Six steps an epoch on the small digits; silent, without a logger."""
    settings: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 3,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(callbacks=list(callbacks), **{**settings, **changes})


class Record(L.Callback):
    """Loss of every batch by (epoch, batch), and the validation loss by epoch."""

    def __init__(self) -> None:
        self.train: dict[tuple[int, int], float] = {}
        self.val: dict[int, float] = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.train[trainer.current_epoch, batch_idx] = float(outputs["loss"])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.val[trainer.current_epoch] = float(trainer.callback_metrics["val/loss"])


def copy_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}
