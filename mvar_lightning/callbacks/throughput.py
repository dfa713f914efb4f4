"""Speed, memory and gradient norm of a run, to the logger."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer


class Throughput(pl.Callback):
    """Images per second, seconds per training step, the part of it spent waiting for data, and peak memory.

    Means over the steps since the last log; validation, checkpoints and the first ``warmup_steps`` are not counted.
    Logged as ``speed/images_per_second`` (all ranks), ``speed/step_seconds``, ``speed/data_seconds`` and
    ``memory/peak_gpu_mb`` (PyTorch's allocations) or ``memory/peak_resident_mb`` (the process, on a CPU), in MB of
    10^6 bytes. ``latest`` holds the last values, and the means over the whole run at its end.
    """

    def __init__(self, warmup_steps: int = 2) -> None:
        self.warmup_steps = warmup_steps
        self.latest: dict[str, float] = {}
        self._window = _Tally()
        self._run = _Tally()
        self._steps_seen = 0
        self._mark: float | None = None
        self._batch_started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._window, self._run, self._steps_seen, self._mark = _Tally(), _Tally(), 0, None
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch_started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._steps_seen += 1
        # the logger takes values of these steps only, as for Lightning's own monitors
        logs_now = bool(trainer._logger_connector.should_update_logs)
        if logs_now and pl_module.device.type == "cuda":
            # the device runs behind; a window must hold the work it is charged for
            torch.cuda.synchronize(pl_module.device)
        now = time.perf_counter()
        if self._mark is not None and self._steps_seen > self.warmup_steps:
            images = batch_size_of(batch) * trainer.world_size
            for tally in (self._window, self._run):
                tally.add(images, seconds=now - self._mark, waiting=self._batch_started - self._mark)
        self._mark = now
        if logs_now and self._window.steps:
            self._log(trainer, pl_module)

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.latest = self._window.means() | peak_memory(pl_module.device)
        self._window = _Tally()
        pl_module.log_dict(self.latest, on_step=True, on_epoch=False, rank_zero_only=True)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # what lies between two training steps here is not the loader's doing
        self._mark = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._run.steps:
            self.latest = self._run.means() | peak_memory(pl_module.device)


class _Tally:
    """Images and seconds of some steps."""

    def __init__(self) -> None:
        self.steps = 0
        self.images = 0
        self.seconds = 0.0
        self.waiting = 0.0

    def add(self, images: int, seconds: float, waiting: float) -> None:
        self.steps += 1
        self.images += images
        self.seconds += seconds
        self.waiting += waiting

    def means(self) -> dict[str, float]:
        return {
            "speed/images_per_second": self.images / self.seconds,
            "speed/step_seconds": self.seconds / self.steps,
            "speed/data_seconds": self.waiting / self.steps,
        }


class GradientNorm(pl.Callback):
    """The norm of all gradients before clipping, after unscaling: ``train/gradient_norm``.

    With several optimizers the number is of the one that steps last.
    """

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            norm: Tensor = get_total_norm(gradients)
            if isinstance(norm, DTensor):  # of sharded gradients: summed over the ranks
                norm = norm.full_tensor()
            pl_module.log("train/gradient_norm", norm.detach(), on_step=True, on_epoch=False, rank_zero_only=True)


def batch_size_of(batch: Any) -> int:
    """Length of the first tensor in a batch (0 if it has none)."""
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else [batch]
    return next((len(value) for value in values if isinstance(value, Tensor) and value.dim() > 0), 0)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory so far, in MB of 10^6 bytes, by its logged name."""
    name = "memory/peak_gpu_mb" if device.type == "cuda" else "memory/peak_resident_mb"
    return {name: peak_memory_bytes(device) / 1e6}


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: the allocator's on a GPU, the resident set of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
