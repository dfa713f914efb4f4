"""Callbacks that recipes of tests name: one writes down every loss, one harms the run at a step.

``SABOTAGE=SIGNAL@STEP`` sends the process a signal in the middle of that step, ``SIGNAL@STEP@RANK`` that rank alone;
``group:SIGNAL@STEP`` signals its whole process group, data workers included, as schedulers do.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from mvar_lightning.metrics import FeatureExtractor


class LossLog(L.Callback):
    """Appends "epoch batch loss rank" for every batch, and "epoch val loss rank", to a file that survives a kill."""

    def __init__(self, path: str = "losses.txt") -> None:
        self.path = Path(path)

    def write(self, trainer: L.Trainer, *words: object) -> None:
        with self.path.open("a") as file:
            file.write(" ".join(map(str, [trainer.current_epoch, *words, trainer.global_rank])) + "\n")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.write(trainer, batch_idx, float(outputs["loss"]).hex())

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.write(trainer, "val", float(trainer.callback_metrics["val/loss"]).hex())


class Colors(FeatureExtractor):
    """Mean of each color: features that take no training."""

    def __init__(self) -> None:
        super().__init__("colors", 3)

    def extract(self, image_B3HW: Tensor) -> Tensor:
        return image_B3HW.mean(dim=(2, 3))


class Sabotage(L.Callback):
    """Harms the run as the environment says, once."""

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self.act(trainer, "")

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.act(trainer, "validation:")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.act(trainer, "end:")

    def act(self, trainer: L.Trainer, where: str) -> None:
        order = os.environ.get("SABOTAGE", "")
        if not order.startswith(where) or (not where and order.startswith(("validation:", "end:"))) or not order:
            return
        what, step, *rank = order.removeprefix(where).split("@")
        if trainer.global_step != int(step) or (rank and trainer.global_rank != int(rank[0])):
            return
        done = Path(f"sabotaged {order}")
        if done.exists():
            return
        done.touch()
        number = getattr(signal, what.removeprefix("group:"))
        if what.startswith("group:"):
            signal_group(number)
        else:
            os.kill(os.getpid(), number)


def signal_group(number: int) -> None:
    """From another process: data workers obey their parent, but nobody else."""
    assert os.getpgrp() == os.getpid() > 1, "only a group that the test has made for this process"
    code = "import os, sys; os.killpg(int(sys.argv[1]), int(sys.argv[2]))"
    command = [sys.executable, "-S", "-E", "-c", code, str(os.getpgrp()), str(int(number))]
    subprocess.run(command, start_new_session=True, check=True)


def losses(path: Path) -> dict[tuple[str, str, str], str]:
    """Losses by (epoch, batch, rank); of what was done twice the last."""
    rows = [line.split() for line in path.read_text().splitlines()]
    return {(epoch, batch, rank): loss for epoch, batch, loss, rank in rows}
