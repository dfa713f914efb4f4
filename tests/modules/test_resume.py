"""A run that was stopped and taken up again by new objects is the run that was not stopped."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_run import MODEL_SIZES, TOKENIZER_SIZES, Record, copy_of, data_module, trainer

from mvar_lightning import (
    AdjacentAttention,
    LlamaBlocks,
    MarkovVARModule,
    MVARModule,
    SpatialAttention,
    TokenizerModule,
    VARModule,
)
from mvar_lightning.callbacks import EMA

Make = Callable[[Path], L.LightningModule]

MIDDLE, END = "step=4", "step=12"
"""Checkpoints written during the first epoch of six steps, and after the second one with its validation."""


def next_scale(family: Any, tokenizer: Path, **axes: Any) -> L.LightningModule:
    return family(str(tokenizer), **MODEL_SIZES, base_lr=0.05, drop_path=0.3, label_drop=0.3, **axes)


FAMILIES: dict[str, Make] = {
    "var": partial(next_scale, VARModule),
    "mvar": partial(next_scale, MVARModule, attention=SpatialAttention(3, scales=1)),
    "markov_var": partial(next_scale, MarkovVARModule, attention=AdjacentAttention(), blocks=LlamaBlocks()),
    "tokenizer": lambda tokenizer: TokenizerModule(**TOKENIZER_SIZES, lr=3e-3),
}


def fit(make: Make, tokenizer: Path, shards: Path, folder: Path, **changes: Any) -> tuple[L.LightningModule, Record]:
    """Eighteen steps in three epochs, from the start or from ``resume``, all objects new."""
    resume = changes.pop("resume", None)
    L.seed_everything(0, verbose=False)
    if resume is not None:
        torch.manual_seed(12345)  # a resumed run must not live on the state of the generator
    module, record = make(tokenizer), Record()
    keep = {"dirpath": folder / "checkpoints", "filename": "step={step}", "auto_insert_metric_name": False}
    during = ModelCheckpoint(**keep, save_top_k=-1, every_n_train_steps=4)
    after = ModelCheckpoint(**keep, save_top_k=-1, every_n_epochs=1, save_last=True)
    run = trainer(folder, record, EMA(decay=0.9), during, after, enable_checkpointing=True, **changes)
    run.fit(module, datamodule=data_module(shards, shuffle_buffer=30), ckpt_path=resume, weights_only=True)
    return module, record


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_resumed_run_equals_the_uninterrupted_one(family: str, shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    make = FAMILIES[family]
    whole, expected = fit(make, tokenizer, shards, tmp_path / "whole")
    assert len(expected.train) == 18
    for place, remaining in ((MIDDLE, 14), (END, 6)):
        checkpoint = tmp_path / "whole" / "checkpoints" / f"{place}.ckpt"
        resumed, record = fit(make, tokenizer, shards, tmp_path / place, resume=str(checkpoint))
        assert len(record.train) == remaining
        assert record.train == {key: expected.train[key] for key in record.train}
        assert record.val == {epoch: expected.val[epoch] for epoch in record.val} and 2 in record.val
        final, ours = copy_of(whole), copy_of(resumed)
        assert final.keys() == ours.keys()
        assert all(torch.equal(final[name], ours[name]) for name in final)


class Interrupt(L.Callback):
    """The power fails at a step."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, n: int) -> None:
        if trainer.global_step == 9:
            raise RuntimeError("power failure")


@pytest.mark.slow
def test_a_run_that_broke_off_goes_on_from_its_last_checkpoint(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    """With accumulated gradients, and a power failure some steps after the checkpoint."""
    make = FAMILIES["var"]
    changes: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 4}
    whole, expected = fit(make, tokenizer, shards, tmp_path / "whole", **changes)
    broken = tmp_path / "broken"
    with pytest.raises(RuntimeError, match="power failure"):
        fit_interrupted(make, tokenizer, shards, broken, **changes)
    resumed, record = fit(
        make, tokenizer, shards, tmp_path / "again", resume=str(broken / "checkpoints" / "last.ckpt"), **changes
    )
    assert record.train and record.train == {key: expected.train[key] for key in record.train}
    assert (3, 5) in record.train and (0, 0) not in record.train
    assert all(torch.equal(value, copy_of(resumed)[name]) for name, value in copy_of(whole).items())


def fit_interrupted(make: Make, tokenizer: Path, shards: Path, folder: Path, **changes: Any) -> None:
    L.seed_everything(0, verbose=False)
    keep = ModelCheckpoint(folder / "checkpoints", save_last=True, every_n_train_steps=4, filename="{step}")
    run = trainer(folder, EMA(decay=0.9), keep, Interrupt(), enable_checkpointing=True, **changes)
    run.fit(make(tokenizer), datamodule=data_module(shards, shuffle_buffer=30))


class FirstBatch(L.Callback):
    """Keeps the first images of a fit."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, n: int) -> None:
        self.image = getattr(self, "image", batch["image"])


def test_a_data_module_that_resumed_once_starts_a_new_run_at_its_start(
    shards: Path, tokenizer: Path, tmp_path: Path
) -> None:
    data, path = data_module(shards), str(tmp_path / "two.ckpt")
    first, resumed, new = FirstBatch(), FirstBatch(), FirstBatch()
    run = trainer(tmp_path, first, max_steps=2, limit_val_batches=0)
    run.fit(FAMILIES["var"](tokenizer), datamodule=data)
    run.save_checkpoint(path)
    run = trainer(tmp_path, resumed, max_steps=3, limit_val_batches=0)
    run.fit(FAMILIES["var"](tokenizer), datamodule=data, ckpt_path=path, weights_only=True)
    run = trainer(tmp_path, new, max_steps=1, limit_val_batches=0)
    run.fit(FAMILIES["var"](tokenizer), datamodule=data)
    assert torch.equal(new.image, first.image) and not torch.equal(resumed.image, first.image)
