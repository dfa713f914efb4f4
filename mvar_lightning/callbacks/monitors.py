"""What watches a run: its speed, memory and gradients for the logger, and what stops it before it goes wrong."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from mvar_lightning.callbacks.base import is_rehearsal, run_folder
from mvar_lightning.compat import logs_now
from mvar_lightning.errors import UserError
from mvar_lightning.tools.compute import peak_memory, runs_behind
from mvar_lightning.tools.console import SECONDS_BETWEEN_LINES
from mvar_lightning.training.manual_steps import last_checkpoint


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
        logs = logs_now(trainer)
        if logs and pl_module.device.type == "cuda":
            # the device runs behind; a window must hold the work it is charged for
            torch.cuda.synchronize(pl_module.device)
        now = time.perf_counter()
        if self._mark is not None and self._steps_seen > self.warmup_steps:
            images = batch_size_of(batch) * trainer.world_size
            for tally in (self._window, self._run):
                tally.add(images, seconds=now - self._mark, waiting=self._batch_started - self._mark)
        self._mark = now
        if logs and self._window.steps:
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


class ProgressLines(pl.Callback):
    """Where nobody watches a bar (a SLURM job, ``| tee``): now and then a line on standard error with epoch, step,
    loss, learning rate, images a second and the time left. Rank zero alone; where standard error is gone, silently.

    Args:
        seconds: between two lines. An instance in a recipe takes the place of the one that every run has.
    """

    def __init__(self, seconds: float = SECONDS_BETWEEN_LINES) -> None:
        self.seconds = seconds
        self._speaks = False
        self._batches = self._images = 0
        self._begun = self._last = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        first = next(each for each in cast(Any, trainer).callbacks if isinstance(each, ProgressLines))
        self._speaks = trainer.is_global_zero and first is self and not is_terminal(sys.stdout)
        self._begun = self._last = time.monotonic()
        self._batches = self._images = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1
        self._images += batch_size_of(batch) * trainer.world_size
        now = time.monotonic()
        if self._speaks and now - self._last >= self.seconds:
            self._last = now
            seconds = max(now - self._begun, 1e-9)
            epochs = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
            loss = float(trainer.callback_metrics.get("train/loss", math.nan))
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            batches_of_step = getattr(pl_module, "accumulate_grad_batches", trainer.accumulate_grad_batches)
            left = _left(trainer, batch_idx + 1, batches_of_step, self._batches / seconds)
            self._say(
                f"epoch {trainer.current_epoch + 1}{epochs}, step {trainer.global_step:,}: loss {loss:.4g}, "
                f"learning rate {rate:.3g}, {self._images / seconds:,.1f} images a second, {left} left"
            )

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self._speaks and time.monotonic() - self._last >= self.seconds and not trainer.sanity_checking:
            self._last = time.monotonic()
            place = f"epoch {trainer.current_epoch + 1}, step {trainer.global_step:,}"
            self._say(f"{place}: validating, batch {args[2] + 1:,}")

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or never there
            print(line, file=sys.stderr, flush=True)


def _left(trainer: pl.Trainer, batches: int, batches_of_step: int, per_second: float) -> str:
    """Until the end of the run at this speed, after so many batches of the epoch."""
    of_epoch, epochs = trainer.num_training_batches, trainer.max_epochs or -1
    left = of_epoch * (epochs - trainer.current_epoch) - batches if epochs > 0 else math.inf
    if trainer.max_steps > 0:
        left = min(left, (trainer.max_steps - trainer.global_step) * batches_of_step)
    if math.isinf(left):
        return "no end"
    minutes = int(left / per_second / 60 + 0.5)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def is_terminal(stream: Any) -> bool:
    """Whether somebody watches; False of a stream that is closed or none."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


@dataclass
class _Tally:
    """Images and seconds of some steps."""

    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    waiting: float = 0.0

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


# Guards: they stop a run that cannot come to a good end, with one line that says why.

NEVER = torch.iinfo(torch.int64).max
"""The step of a loss that is not finite, as long as there is none: the smallest over ranks is then still right."""


class NonFiniteLossGuard(pl.Callback):
    """Stops the run at a loss that is NaN or infinite, before its gradient is taken; no checkpoint is written after it.

    On a GPU looking at a loss waits for the device. With ``every_n_steps`` above 1 the first bad step of any process is
    only noted on the devices, looked at every so many steps and before each checkpoint, so that no checkpoint holds
    weights that have seen it. None looks at every step on a CPU, elsewhere where values are logged.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(f"every_n_steps {every_n_steps}: must be at least 1; remove the guard to switch it off")
        self.every_n_steps = every_n_steps
        self._first_bad: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_bad = torch.full((), NEVER, device=pl_module.device)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        assert self._first_bad is not None
        # no `if` on the loss itself: reading it would make every step wait for the device
        bad = ~loss.detach().isfinite().all()
        step = torch.where(bad, trainer.global_step, NEVER)
        # all ranks stop together, else the healthy ones would wait for the sick one's gradients
        first_bad = trainer.strategy.reduce(torch.minimum(self._first_bad, step), reduce_op="min")
        self._first_bad = cast(Tensor, first_bad)
        look = logs_now(trainer) or not runs_behind(loss.device)
        if self.every_n_steps is not None:
            look = trainer.global_step % self.every_n_steps == 0
        if look:
            self._check(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # a checkpoint may be written by one rank alone: no talk with the others here
        if self._first_bad is not None and int(self._first_bad) != NEVER:
            self._stop(trainer, int(self._first_bad))

    def _check(self, trainer: pl.Trainer) -> None:
        assert self._first_bad is not None
        step = int(self._first_bad)
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
