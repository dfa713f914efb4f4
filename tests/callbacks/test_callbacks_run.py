"""Speed, gradient norm and guards of a run."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from mvar_lightning.callbacks import GradientNorm, NonFiniteLossGuard, Throughput, WritableRunFolder
from mvar_lightning.errors import UserError


def columns(folder: Path) -> dict[str, list[float]]:
    """Logged values by name, blanks left out."""
    lines = (folder / "metrics.csv").read_text().splitlines()
    names, rows = lines[0].split(","), [line.split(",") for line in lines[1:]]
    return {name: [float(row[i]) for row in rows if row[i]] for i, name in enumerate(names)}


class Slow(pl.Callback):
    """Every step takes at least 10 ms, every validation a second."""

    def on_before_backward(self, *args: Any) -> None:
        time.sleep(0.01)

    def on_validation_epoch_end(self, *args: Any) -> None:
        time.sleep(1.0)


def test_throughput_counts_steps_alone(make_trainer: Any, module: Any, data: Any, tmp_path: Path) -> None:
    speed, logger = Throughput(warmup_steps=1), CSVLogger(tmp_path, name="", version="")
    make_trainer(Slow(), speed, logger=logger, num_sanity_val_steps=0).fit(module, datamodule=data)
    seconds = speed.latest["speed/step_seconds"]
    assert 0.01 < seconds < 0.4
    assert speed.latest["speed/images_per_second"] == pytest.approx(15 / seconds, rel=1e-6)
    assert 0 <= speed.latest["speed/data_seconds"] < seconds
    assert 50 < speed.latest["memory/peak_resident_mb"] < 100_000
    logged = columns(tmp_path)
    assert len(logged["speed/step_seconds"]) >= 5 and max(logged["speed/step_seconds"]) < 0.45


def test_gradient_norm_is_that_before_clipping(make_trainer: Any, module: Any, data: Any, tmp_path: Path) -> None:
    class Expect(pl.Callback):
        def __init__(self) -> None:
            self.norms: list[float] = []

        def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self.norms.append(math.sqrt(sum(float(g.square().sum()) for g in gradients)))

    expect, logger = Expect(), CSVLogger(tmp_path, name="", version="")
    trainer = make_trainer(expect, GradientNorm(), logger=logger, gradient_clip_val=1e-3, log_every_n_steps=1)
    trainer.fit(module, datamodule=data)
    assert columns(tmp_path)["train/gradient_norm"] == pytest.approx(expect.norms, rel=1e-4)


@pytest.mark.parametrize(("every", "stops_at"), [(1, 8), (4, 8), (100, 8)])
def test_nan_stops_with_step_and_checkpoint(
    make_trainer: Any, module: Any, data: Any, tmp_path: Path, every: int, stops_at: int
) -> None:
    module.poison_at = stops_at
    keep = ModelCheckpoint(tmp_path / "kept", save_last=True)
    trainer = make_trainer(NonFiniteLossGuard(every), keep, enable_checkpointing=True, max_epochs=3)
    with pytest.raises(UserError, match=r"loss at step 8: not finite; the last good checkpoint is .*last\.ckpt"):
        trainer.fit(module, datamodule=data)
    saved = torch.load(keep.last_model_path, weights_only=True)
    assert saved["global_step"] == 6
    assert all(value.isfinite().all() for value in saved["state_dict"].values() if value.is_floating_point())
    if every == 1:
        weights: Tensor = module.model.linear.weight
        assert weights.isfinite().all() and len(module.losses) == 9


def test_nan_before_any_checkpoint(make_trainer: Any, module: Any, data: Any) -> None:
    module.poison_at = 0
    with pytest.raises(UserError, match="no checkpoint was written"):
        make_trainer(NonFiniteLossGuard()).fit(module, datamodule=data)


def test_guard_lets_good_runs_pass(make_trainer: Any, module: Any, data: Any) -> None:
    make_trainer(NonFiniteLossGuard(), WritableRunFolder()).fit(module, datamodule=data)
    assert len(module.losses) == 12


def test_unwritable_run_folder(make_trainer: Any, module: Any, data: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trainer = make_trainer(WritableRunFolder(), default_root_dir=tmp_path / "file" / "run")
    with pytest.raises(UserError, match="default_root_dir"):
        trainer.fit(module, datamodule=data)
    assert not module.losses


@pytest.mark.parametrize("callback", [Throughput, GradientNorm, NonFiniteLossGuard, WritableRunFolder])
def test_fast_dev_run_and_validate(make_trainer: Any, module: Any, data: Any, callback: Any) -> None:
    rehearsal, evaluation = make_trainer(callback(), fast_dev_run=True), make_trainer(callback())
    rehearsal.fit(module, datamodule=data)
    evaluation.validate(module, datamodule=data, verbose=False)
    assert rehearsal.state.finished and evaluation.state.finished
