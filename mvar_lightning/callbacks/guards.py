"""Guards: stop a run that cannot come to a good end, with one line that says why."""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from mvar_lightning.callbacks.access import is_rehearsal, run_folder
from mvar_lightning.errors import UserError
from mvar_lightning.modules.manual_steps import last_checkpoint

NEVER = torch.iinfo(torch.int64).max


class NonFiniteLossGuard(pl.Callback):
    """Stops the run at a loss that is NaN or infinite, before its gradient is taken; no checkpoint is written after it.

    On a GPU looking at a loss waits for the device. With ``every_n_steps`` above 1 the first bad step is only noted on
    the device, looked at every so many steps and before each checkpoint, so that no checkpoint holds weights that
    have seen it.
    """

    def __init__(self, every_n_steps: int = 1) -> None:
        if every_n_steps < 1:
            raise UserError(f"every_n_steps {every_n_steps}: must be at least 1; remove the guard to switch it off")
        self.every_n_steps = every_n_steps
        self._first_bad: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_bad = torch.full((), NEVER, device=pl_module.device)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        assert self._first_bad is not None
        bad = ~loss.detach().isfinite().all()
        step = torch.where(bad, trainer.global_step, NEVER)
        self._first_bad = torch.minimum(self._first_bad, step)
        if trainer.global_step % self.every_n_steps == 0:
            self._check(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # a checkpoint may be written by one rank alone: no talk with the others here
        if self._first_bad is not None and int(self._first_bad) != NEVER:
            self._stop(trainer, int(self._first_bad))

    def _check(self, trainer: pl.Trainer) -> None:
        assert self._first_bad is not None
        # all ranks stop together, else the healthy ones would wait for the sick one's gradients
        step = int(trainer.strategy.reduce(self._first_bad, reduce_op="min"))
        if step != NEVER:
            self._stop(trainer, step)

    def _stop(self, trainer: pl.Trainer, step: int) -> None:
        raise UserError(
            f"loss at step {step}: not finite; {last_checkpoint(trainer)}; "
            "lower the learning rate, clip gradients harder, or try precision 32-true"
        )


class WritableRunFolder(pl.Callback):
    """Refuses to start a run whose folder cannot be written, before hours are spent on it."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not trainer.is_global_zero or is_rehearsal(trainer):
            return
        folder = run_folder(trainer)
        probe = folder / f".writable.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"run folder {folder}: cannot be written ({error.strerror}); "
                "choose another with --trainer.default_root_dir"
            ) from error
