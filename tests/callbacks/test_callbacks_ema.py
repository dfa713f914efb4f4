"""Averaged weights: what is averaged, when they are in place, what a checkpoint holds, and exact resumption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn

from mvar_lightning.callbacks import EMA
from mvar_lightning.errors import UserError

State = dict[str, Tensor]


def copy_of(module: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Watch(pl.Callback):
    """Keeps the raw weights after every step and the weights that validation callbacks see."""

    def __init__(self) -> None:
        self.raw: list[State] = []
        self.seen: list[State] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.raw.append(copy_of(pl_module))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.seen.append(copy_of(pl_module))


def averaged(raw: list[State], start: State, decays: list[float], name: str = "model.linear.weight") -> Tensor:
    average = start[name].clone()
    for state, decay in zip(raw, decays, strict=True):
        average = decay * average + (1 - decay) * state[name]
    return average


@pytest.mark.parametrize("ema_first", [True, False])
def test_validation_callbacks_see_the_average(make_trainer: Any, module: Any, data: Any, ema_first: bool) -> None:
    watch, ema = Watch(), EMA(decay=0.9, warmup=False)
    start = copy_of(module)
    callbacks = [ema, watch] if ema_first else [watch, ema]
    make_trainer(*callbacks, max_epochs=1).fit(module, datamodule=data)
    expected = averaged(watch.raw, start, [0.9] * 6)
    assert torch.allclose(watch.seen[0]["model.linear.weight"], expected, atol=1e-6)
    assert torch.allclose(module.model.linear.weight, expected, atol=1e-6)
    assert not torch.allclose(watch.raw[-1]["model.linear.weight"], expected, atol=1e-4)


def test_decay_rises_from_a_tenth(make_trainer: Any, module: Any, data: Any) -> None:
    watch, start = Watch(), copy_of(module)
    make_trainer(watch, EMA(decay=0.25, warmup=True), max_epochs=1).fit(module, datamodule=data)
    expected = averaged(watch.raw, start, [1 / 10, 2 / 11, 3 / 12, 0.25, 0.25, 0.25])
    assert torch.allclose(module.model.linear.weight, expected, atol=1e-6)


def test_average_follows_the_weights_before_it_starts(make_trainer: Any, module: Any, data: Any) -> None:
    watch = Watch()
    make_trainer(watch, EMA(decay=0.9, warmup=False, start_step=100), max_epochs=1).fit(module, datamodule=data)
    assert equal(watch.seen[0], watch.raw[-1])


def test_frozen_tokenizer_stays_bit_identical(make_trainer: Any, module: Any, data: Any) -> None:
    before = copy_of(module.tokenizer)
    make_trainer(EMA(decay=0.999)).fit(module, datamodule=data)
    assert equal(copy_of(module.tokenizer), before)


def test_lightnings_own_average_changes_frozen_parts(make_trainer: Any, module: Any, data: Any) -> None:
    """The reason why the class exists; if this fails, Lightning has mended it and the subclass may shrink."""
    before = copy_of(module.tokenizer)
    make_trainer(EMAWeightAveraging(decay=0.999)).fit(module, datamodule=data)
    after = copy_of(module.tokenizer)
    assert not torch.equal(after["weight"], before["weight"]) or not torch.equal(after["count"], before["count"])


def test_checkpoint_holds_both_sets(make_trainer: Any, module: Any, data: Any, tmp_path: Path) -> None:
    watch, keep = Watch(), ModelCheckpoint(tmp_path, save_last=True)
    make_trainer(EMA(decay=0.9), watch, keep, enable_checkpointing=True).fit(module, datamodule=data)
    saved = torch.load(keep.last_model_path, weights_only=True)
    assert equal(saved["state_dict"], copy_of(module))
    assert equal(saved["current_model_state"], watch.raw[-1])
    assert int(saved["averaging_state"]["n_averaged"]) == 12


def test_checkpoint_after_training_still_holds_the_raw_weights(
    make_trainer: Any, module: Any, data: Any, tmp_path: Path
) -> None:
    watch = Watch()
    trainer = make_trainer(EMA(decay=0.9), watch)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "late.ckpt")
    saved = torch.load(tmp_path / "late.ckpt", weights_only=True)
    assert equal(saved["current_model_state"], watch.raw[-1])
    assert equal(saved["state_dict"], copy_of(module))


def test_resumed_run_equals_uninterrupted(
    make_trainer: Any, make_module: Callable[[], Any], data: Any, tmp_path: Path
) -> None:
    def run(max_epochs: int, folder: str, resume: str | None = None) -> tuple[Any, str]:
        module, keep = make_module(), ModelCheckpoint(tmp_path / folder, save_last=True)
        trainer = make_trainer(Seeded(), EMA(decay=0.9), keep, enable_checkpointing=True, max_epochs=max_epochs)
        trainer.fit(module, datamodule=data, ckpt_path=resume)
        return module, keep.last_model_path

    whole, _ = run(4, "whole")
    first, path = run(2, "first")
    second, _ = run(4, "second", resume=path)
    assert first.losses + second.losses == whole.losses
    assert equal(copy_of(second), copy_of(whole))


class Seeded(pl.Callback):
    """Dropout that depends on the step alone, so that only the weights can differ."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        torch.manual_seed(trainer.global_step)


def test_checkpoint_without_average_starts_one(make_trainer: Any, make_module: Any, data: Any, tmp_path: Path) -> None:
    plain = make_module()
    trainer = make_trainer(max_epochs=1)
    trainer.fit(plain, datamodule=data)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    ema, module = EMA(decay=0.5), make_module()
    make_trainer(ema, max_epochs=1).fit(module, datamodule=data, ckpt_path=str(tmp_path / "plain.ckpt"))
    assert equal(copy_of(module), copy_of(plain))


def test_validate_alone_and_after_fit(make_trainer: Any, module: Any, data: Any) -> None:
    ema, watch = EMA(decay=0.9), Watch()
    trainer = make_trainer(ema, watch)
    trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    after = copy_of(module)
    trainer.validate(module, datamodule=data, verbose=False)
    assert equal(watch.seen[-1], after) and equal(copy_of(module), after)


def test_decay_out_of_range() -> None:
    with pytest.raises(UserError, match=r"EMA decay 1\.5"):
        EMA(decay=1.5)
