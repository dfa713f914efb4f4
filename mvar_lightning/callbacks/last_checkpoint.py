"""The checkpoint that a run goes on from, written often enough and at steps from which it can go on exactly.

Three parts: the callback that decides when, the signals that ask for it, and the writer that loses none by a fault.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from mvar_lightning.callbacks.base import is_rehearsal, run_folder
from mvar_lightning.callbacks.best import BestCheckpoints
from mvar_lightning.compat import epoch_ends_here, logs_now
from mvar_lightning.errors import UserError
from mvar_lightning.tools.compute import runs_behind
from mvar_lightning.tools.files import write

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
        monitor: a metric of the validation, such as val/loss: the ``top_k`` checkpoints that are best by it are kept
            beside the last, ``checkpoints/best-step=N.ckpt``.
        top_k: how many.
        mode: ``min`` or ``max``; null goes by the metric's name (accuracy, PSNR and the like are to be large).
    """

    def __init__(
        self,
        every_steps: int | None = None,
        every_minutes: float | None = 15.0,
        monitor: str | None = None,
        top_k: int = 1,
        mode: str | None = None,
    ) -> None:
        if every_steps is not None and every_steps < 1:
            raise UserError(f"checkpoint.every_steps {every_steps}: must be at least 1, or null for none")
        if every_minutes is not None and every_minutes < 0:
            raise UserError(f"checkpoint.every_minutes {every_minutes}: must not be negative; null for none")
        self.best = BestCheckpoints(monitor, top_k, mode)
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self.last_model_path = ""
        self.seconds = 0.0
        self.metrics: dict[str, float] = {}
        """The last values of all that was logged, also before a run was taken up again, as of the last `_save`."""
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
        if epoch_ends_here(trainer):
            return  # what follows writes a checkpoint, too
        if trainer.world_size > 1 and runs_behind(pl_module.device) and not logs_now(trainer):
            return  # the vote waits for the device: there it is taken where values are logged, which waits anyway
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

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and not is_rehearsal(trainer):
            self.best.judge(trainer, Path(self.last_model_path))

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
        self.keep_metrics(trainer)
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
        best = {} if self.best.monitor is None else {"best": list(self.best.kept)}
        return {"seconds": self.seconds, "metrics": dict(self.metrics), **best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self.metrics = float(state_dict["seconds"]), dict(state_dict.get("metrics", {}))
        self.best.kept = [(float(value), str(name)) for value, name in state_dict.get("best", [])]

    def keep_metrics(self, trainer: pl.Trainer) -> None:
        """Take note of what was logged last; Lightning forgets it where `fit` or `validate` begins."""
        self.metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Before a validation, say that it has begun: Lightning then begins it anew when it goes on from here."""
        if not self._before_validation:
            return
        progress = checkpoint["loops"]["fit_loop"][VALIDATION]
        done = progress["total"]["completed"]
        # Lightning's own counts at this point say that no validation is under way, and it would skip this one
        begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        total = {name: done + count for name, count in begun.items()}
        checkpoint["loops"]["fit_loop"][VALIDATION] = {"total": total, "current": begun, "is_last_batch": False}


# Signals that end a run in order: noted when they come, obeyed by all ranks at the same step.


class Wish(IntEnum):
    """What should happen at the end of a step; of several wishes, over all ranks, the largest counts."""

    GO_ON = 0
    SAVE = 1
    STOP = 2
    REQUEUE = 3


class ToldToStop(SystemExit):
    """The run was told to stop and has kept its place."""


class StopSignals:
    """Notes SIGTERM (stop) and SIGUSR1 (stop and, under SLURM, put the job back into the queue).

    Lightning acts within its handlers: it saves wherever the step happens to be, and talks to other ranks there, which
    can be in the middle of something else. Here a handler only takes a note.
    """

    def __init__(self) -> None:
        self.wish = Wish.GO_ON
        self._launcher: Any = None

    def listen(self, trainer: pl.Trainer) -> None:
        """Take the signals over from Lightning, which gives back what was before when the trainer ends."""
        if threading.current_thread() is not threading.main_thread():
            return
        # not earlier: Lightning puts its own handlers in place when a run begins
        signal.signal(signal.SIGTERM, self._stop)
        environment = getattr(trainer.strategy, "cluster_environment", None)
        slurm = environment if isinstance(environment, SLURMEnvironment) else None
        signal.signal((slurm and slurm.requeue_signal) or signal.SIGUSR1, self._requeue)
        self._launcher = trainer.strategy.launcher

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._note(Wish.STOP, number)

    def _requeue(self, number: int, frame: FrameType | None) -> None:
        self._note(Wish.REQUEUE, number)

    def _note(self, wish: Wish, number: int) -> None:
        if self.wish < Wish.STOP and self._launcher is not None:
            self._launcher.kill(number)  # to the ranks that Lightning started from here
        self.wish = max(self.wish, wish)

    def obey(self, trainer: pl.Trainer, wish: Wish) -> None:
        """End this process, on all ranks together; the job goes back into the queue first where that was asked for."""
        if wish < Wish.STOP:
            return
        if wish == Wish.REQUEUE and trainer.is_global_zero:
            requeue(trainer)
        raise ToldToStop(f"told to stop at step {trainer.global_step}")


def agreed(trainer: pl.Trainer, wish: Wish) -> Wish:
    """The largest wish of all ranks, which must call this together."""
    if trainer.world_size == 1:
        return wish
    value = torch.tensor(int(wish), device=trainer.strategy.root_device)
    return Wish(int(trainer.strategy.reduce(value, reduce_op="max")))


def requeue(trainer: pl.Trainer) -> None:
    """`scontrol requeue` for this job, where it is one of SLURM's and may be requeued."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    job = os.environ.get("SLURM_JOB_ID", "")
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue or not job:
        return
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    if not re.fullmatch(r"[0-9_]+", job):
        return
    try:
        status = subprocess.run(["scontrol", "requeue", job], check=False).returncode
    except OSError as error:
        rank_zero_info(f"scontrol requeue {job}: {error.strerror}; start the job again yourself")
        return
    rank_zero_info(f"scontrol requeue {job}: {'done' if status == 0 else f'failed with status {status}'}")


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's reader, and a writer that a crash, a kill or a full disk cannot make lose the checkpoint before.

    Lightning's own writer goes through the system's temporary folder. Where that is another file system (on most
    clusters), its last act is a copy over the old checkpoint, and a kill in the middle of it leaves neither. Here the
    file is written beside the old one, straight to the disk: 2B parameters with their moments are 24 GB, which another
    copy in memory would double. Twice the size of a checkpoint must be free.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises `UserError` where the disk is full or cannot be written; the checkpoint before is then intact."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, lambda file: torch.save(checkpoint, file), durable=True)
        except OSError as error:
            before = "the one written before it is intact" if path.is_file() else "there is none yet"
            raise UserError(
                f"checkpoint {path}: could not be written ({error.strerror}; {_free(path)} free); {before}; make room "
                "or mend the disk, then run the same command again"
            ) from error


def _free(path: Path) -> str:
    try:
        room = os.statvfs(path.parent)
    except OSError:
        return "unknown"
    return f"{room.f_bavail * room.f_frsize / 1e9:.1f} GB"
