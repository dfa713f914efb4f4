"""The checkpoints that are best by a metric of the validation, kept beside the last."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import lightning.pytorch as pl

from mvar_lightning.errors import UserError

LARGE = ("accuracy", "psnr", "ssim", "consistency", "usage", "perplexity", "inception", "precision", "recall")
"""Words in the names of metrics that are to be large."""


class BestCheckpoints:
    """Keeps those that are best by ``monitor``: hard links to what `LastCheckpoint` wrote before the validation, whose
    weights are the ones that were judged.

    Raises:
        UserError: a ``top_k`` or ``mode`` that means nothing.
    """

    def __init__(self, monitor: str | None, top_k: int = 1, mode: str | None = None) -> None:
        if top_k < 1:
            raise UserError(f"checkpoint.top_k {top_k}: must be at least 1")
        if mode not in (None, "min", "max"):
            raise UserError(f"checkpoint.mode {mode}: give min or max, or null to go by the metric's name")
        self.monitor, self.top_k = monitor, top_k
        self.large = mode == "max" or (mode is None and any(word in (monitor or "") for word in LARGE))
        self.kept: list[tuple[float, str]] = []
        """Values and names of files, the best first."""

    def judge(self, trainer: pl.Trainer, last: Path) -> None:
        """After a validation: keep ``last``, the checkpoint before it, if it is among the best.

        Raises:
            UserError: the validation logs no such metric; on all ranks.
        """
        if self.monitor is None:
            return
        logged = trainer.callback_metrics
        if self.monitor not in logged:
            names = ", ".join(sorted(name for name in logged if "_scale_" not in name and name.startswith("val/")))
            raise UserError(f"checkpoint.monitor {self.monitor}: the validation logs none of this name, but {names}")
        value, name = float(logged[self.monitor]), f"best-step={trainer.global_step}.ckpt"
        if not math.isfinite(value):
            return
        others = [kept for kept in self.kept if kept[1] != name]  # a run that went on before its validation
        ranked = sorted([*others, (value, name)], key=lambda kept: -kept[0] if self.large else kept[0])
        dropped, self.kept = ranked[self.top_k :], ranked[: self.top_k]
        if not trainer.is_global_zero:
            return
        if (value, name) in self.kept:
            _link(last, last.parent / name)
        for _, file in dropped:
            (last.parent / file).unlink(missing_ok=True)

    def report(self, folder: Path) -> dict[str, object]:
        """What a run's report says: the metric, and value, step and file of the best; nothing without a monitor."""
        if self.monitor is None or not self.kept:
            return {}
        value, name = self.kept[0]
        step = int(name.removeprefix("best-step=").removesuffix(".ckpt"))
        return {"best": {"monitor": self.monitor, "value": value, "step": step, "checkpoint": str(folder / name)}}


def _link(source: Path, target: Path) -> None:
    """The same file under another name, or where the file system has no links a copy."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
