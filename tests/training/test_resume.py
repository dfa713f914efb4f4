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
    AdversarialLoss,
    DataDependentInit,
    DeadCodeRestart,
    DiffAugment,
    EntropyLoss,
    L1Loss,
    LlamaBlocks,
    MarkovVARModule,
    MVARModule,
    NonSaturatingLoss,
    PatchDiscriminator,
    QuantizerLoss,
    SpatialAttention,
    TokenizerModule,
    VARModule,
)
from mvar_lightning.callbacks import EMA, LastCheckpoint

Make = Callable[[Path], L.LightningModule]

MIDDLE, END = "step=4", "step=12"
"""Checkpoints written during the first epoch of six steps, and after the second one with its validation."""


def next_scale(family: Any, tokenizer: Path, **axes: Any) -> L.LightningModule:
    return family(str(tokenizer), **MODEL_SIZES, base_lr=0.05, drop_path=0.3, label_drop=0.3, **axes)


def adversarial(tokenizer: Path) -> L.LightningModule:
    """Everything that has a state or draws numbers; the ramp is still rising at the checkpoint in the middle."""
    loss = AdversarialLoss(
        PatchDiscriminator(8, layers=2),
        loss=NonSaturatingLoss(1.0, penalty_every=3),
        start=2,
        ramp=4,
        lecam=0.1,
        augment=DiffAugment(),
    )
    return TokenizerModule(
        **TOKENIZER_SIZES,
        lr=3e-3,
        adversarial=loss,
        losses=[L1Loss(), QuantizerLoss(), EntropyLoss(max_rows=32)],
        remedies=[DataDependentInit(), DeadCodeRestart(every=3)],
        gradient_clip_val=1.0,
    )


FAMILIES: dict[str, Make] = {
    "adversarial": adversarial,
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
        last = (torch.load(tmp_path / run / "checkpoints/step=18.ckpt", weights_only=True) for run in ("whole", place))
        ends = [
            {part: end[part] for part in ("optimizer_states", "lr_schedulers", "current_model_state")} for end in last
        ]
        assert same(*ends)


def same(ours: Any, theirs: Any) -> bool:
    """Bit by bit, whatever lies in whatever."""
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(value, theirs[key]) for key, value in ours.items())
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    return bool(ours == theirs)


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


class InterruptValidation(L.Callback):
    """The power fails while the weights are judged, at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("power failure")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"val_check_interval": 3}, {"max_steps": 16, "accumulate_grad_batches": 2}])
def test_a_run_that_broke_off_in_a_validation_begins_it_anew(
    changes: dict[str, Any], shards: Path, tokenizer: Path, tmp_path: Path
) -> None:
    """At the end of an epoch, in its middle, and where the run has a number of steps."""
    interrupted_at = {(): 12, ("val_check_interval",): 9}.get(tuple(changes), 6)

    def run(folder: Path, *callbacks: L.Callback, resume: Path | None = None) -> tuple[L.LightningModule, Record]:
        L.seed_everything(0, verbose=False)
        module, record = FAMILIES["var"](tokenizer), Record()
        settings = {"max_epochs": 4, **changes, "enable_checkpointing": True}
        fitting = trainer(folder, record, EMA(decay=0.9), LastCheckpoint(every_steps=4), *callbacks, **settings)
        data = data_module(shards, shuffle_buffer=30)
        try:
            fitting.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
        except RuntimeError as error:
            assert str(error) == "power failure"
        return module, record

    whole, expected = run(tmp_path / "whole")
    run(tmp_path / "broken", InterruptValidation(interrupted_at))
    last = tmp_path / "broken" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == interrupted_at
    resumed, record = run(tmp_path / "again", resume=last)
    assert record.train and record.train == {key: expected.train[key] for key in record.train}
    done = len(expected.train) - len(record.train)
    assert done == interrupted_at * changes.get("accumulate_grad_batches", 1)
    assert record.val == {epoch: expected.val[epoch] for epoch in record.val}
    assert min(record.val) == min(record.train)[0] - (0 if "val_check_interval" in changes else 1)
    assert all(torch.equal(value, copy_of(resumed)[name]) for name, value in copy_of(whole).items())
