"""Signals that end a run in order: noted when they come, obeyed by all ranks at the same step."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from enum import IntEnum
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_info


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
