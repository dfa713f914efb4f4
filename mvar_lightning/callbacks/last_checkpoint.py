"""The checkpoint that a run goes on from, written often enough and at steps from which it can go on exactly."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from mvar_lightning.callbacks.access import is_rehearsal, run_folder
from mvar_lightning.callbacks.stop_signals import StopSignals, Wish, agreed
from mvar_lightning.errors import UserError

VALIDATION = "epoch_loop.val_loop.batch_progress"


class LastCheckpoint(Checkpoint):
    """Keeps ``checkpoints/last.ckpt`` in the run's folder, from which the same command goes on as if never stopped.

    Written after each epoch; before each validation in it (a run killed there goes on with that validation); inside an
    epoch every so many steps or minutes; and when the process is told to stop by SIGTERM or, under SLURM, by the
    requeue signal. Inside an epoch only after an optimizer step: between two, accumulated gradients would be lost.

    It differs from Lightning's ``ModelCheckpoint`` in the places where that one cannot resume exactly: amid accumulated
    gradients, at an epoch's last batch (whose validation is then skipped), or within a signal handler.

    Args:
        every_steps: optimizer steps between checkpoints inside an epoch; null leaves it to the minutes.
        every_minutes: the same in minutes; null leaves it to the steps.
    """

    def __init__(self, every_steps: int | None = None, every_minutes: float | None = 15.0) -> None:
        if every_steps is not None and every_steps < 1:
            raise UserError(f"checkpoint.every_steps {every_steps}: must be at least 1, or null for none")
        if every_minutes is not None and every_minutes < 0:
            raise UserError(f"checkpoint.every_minutes {every_minutes}: must not be negative; null for none")
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self.last_model_path = ""
        self.seconds = 0.0
        self._signals = StopSignals()
        self._before_validation = False
        self._step_before = 0
        self._steps_since = 0
        self._saved_at = self._counted_at = time.monotonic()

    # -- the signals

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._signals.listen(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._signals.listen(trainer)
        self._saved_at = self._counted_at = time.monotonic()
        self._steps_since = 0

    # -- the places where a run may be taken up again

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step_before or is_rehearsal(trainer):
            return
        self._steps_since += 1
        if _epoch_ends_here(trainer):
            return  # what follows writes a checkpoint, too
        wish = agreed(trainer, max(self._signals.wish, Wish.SAVE if self._due() else Wish.GO_ON))
        if wish >= Wish.SAVE:
            self._save(trainer)
        self._signals.obey(trainer, wish)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._before_validation = True
            self._save(trainer)
            self._before_validation = False
            self._signals.obey(trainer, agreed(trainer, self._signals.wish))

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        # all is written: no need to wait for the other ranks, whose number of batches may be another
        if trainer.state.fn == TrainerFn.FITTING:
            self._signals.obey(trainer, self._signals.wish)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)
        self._signals.obey(trainer, agreed(trainer, self._signals.wish))

    def _due(self) -> bool:
        minutes = (time.monotonic() - self._saved_at) / 60
        by_steps = self.every_steps is not None and self._steps_since >= self.every_steps
        return by_steps or (self.every_minutes is not None and minutes >= self.every_minutes)

    def _save(self, trainer: pl.Trainer) -> None:
        """All ranks write together and, if rank zero cannot, end together."""
        if is_rehearsal(trainer):
            return
        path = run_folder(trainer) / "checkpoints" / "last.ckpt"
        problem = None
        try:
            trainer.save_checkpoint(path, weights_only=False)
        except UserError as error:
            problem = str(error)
            trainer.strategy.barrier()  # the other ranks wait there, inside `save_checkpoint`
        problem = trainer.strategy.broadcast(problem)
        if problem is not None:
            raise UserError(problem)
        self.last_model_path = str(path)
        self._saved_at, self._steps_since = time.monotonic(), 0

    # -- what the checkpoint holds

    def state_dict(self) -> dict[str, Any]:
        now = time.monotonic()
        self.seconds += now - self._counted_at
        self._counted_at = now
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = float(state_dict["seconds"])

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Before a validation, say that it has begun: Lightning then begins it anew when it goes on from here."""
        if not self._before_validation:
            return
        progress = checkpoint["loops"]["fit_loop"][VALIDATION]
        done = progress["total"]["completed"]
        begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        total = {name: done + count for name, count in begun.items()}
        checkpoint["loops"]["fit_loop"][VALIDATION] = {"total": total, "current": begun, "is_last_batch": False}


def _epoch_ends_here(trainer: pl.Trainer) -> bool:
    """Whether a validation or the end of the epoch follows this batch."""
    loop: Any = trainer.fit_loop.epoch_loop
    return loop._num_ready_batches_reached() or loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
