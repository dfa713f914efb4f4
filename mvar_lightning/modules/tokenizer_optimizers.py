"""Optimizers and schedules of tokenizer training: one pair for the tokenizer, perhaps one for its discriminator."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer import AdversarialLoss, MultiScaleTokenizer

log = logging.getLogger(__name__)


def warmup_cosine(step: int, warmup_steps: int, total_steps: float, final_ratio: float) -> float:
    """Factor of the learning rate at a step: linear from 1 / warmup_steps to 1, then half a cosine to ``final_ratio``.

    Stays at 1 after the warm-up where the number of steps is not known (infinite).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1.0, total_steps - warmup_steps))
    return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and the course of its learning rate; see ``TokenizerModule``.

    Raises:
        UserError: a value out of its range.
    """

    lr: float
    betas: tuple[float, float]
    weight_decay: float
    warmup: float
    final_lr_ratio: float

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise UserError(f"lr {self.lr}: must be positive")
        if not 0 <= self.warmup < 1:
            raise UserError(f"warmup {self.warmup}: the share of steps with a rising learning rate must be in [0, 1)")

    def factor(self, steps: float, step: int) -> float:
        """Of the learning rate, at one of ``steps``."""
        warmup_steps = 0 if math.isinf(steps) else round(self.warmup * steps)
        return warmup_cosine(step, warmup_steps, steps, self.final_lr_ratio)


def tokenizer_optimizers(
    tokenizer: MultiScaleTokenizer, adversarial: AdversarialLoss | None, settings: OptimizerSettings, steps: float
) -> OptimizerLRScheduler:
    """As Lightning takes them: the tokenizer's, and after it the discriminator's over the steps from its start on."""
    ours = scheduled_adamw(tokenizer.parameters(), settings, steps)
    if adversarial is None:
        return cast(OptimizerLRScheduler, ours)
    adversarial.plan(steps)
    start = adversarial.start_step
    if start >= steps:
        rank_zero_only(log.warning)(
            f"adversarial.start: the discriminator would start at step {start}, but the run ends at step {steps}: "
            "it never starts; train longer or set an earlier start"
        )
    own = replace(settings, lr=adversarial.lr or settings.lr, betas=adversarial.betas, weight_decay=0.0)
    theirs = scheduled_adamw(adversarial.discriminator.parameters(), own, max(1, steps - start), "lr-discriminator")
    return cast(OptimizerLRScheduler, (ours, theirs))


def scheduled_adamw(
    parameters: Iterable[nn.Parameter], settings: OptimizerSettings, steps: float, name: str | None = None
) -> dict[str, Any]:
    """An optimizer with its schedule; ``name`` is the learning rate's in the log.

    Only convolution weights decay: no biases, norms and codes.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim == 4], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim != 4], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=settings.lr, betas=settings.betas, fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: settings.factor(steps, step))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": name}}
