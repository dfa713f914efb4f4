"""Optimizer groups and schedules as VAR trains (`utils/lr_control.py` and `utils/arg_util.py` of its release)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer import AdversarialLoss, MultiScaleTokenizer

WITHOUT_DECAY = ("positions.", "modulation.offset", "log_scale")
"""Parts of parameter names that never decay: positions and levels, shared-AdaLN offsets, query scales."""


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to biases, 1-D tensors or `WITHOUT_DECAY` (word and class embeddings do)."""
    return parameter.ndim > 1 and not name.endswith("bias") and not any(part in name for part in WITHOUT_DECAY)


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Two AdamW groups, ``decay`` and ``no_decay``, of the parameters that require a gradient."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            groups[decays(name, parameter)].append(parameter)
    return [
        {"name": "decay", "params": groups[True], "decay_scale": 1.0},
        {"name": "no_decay", "params": groups[False], "decay_scale": 0.0, "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay over a run ("lin0" of the release).

    Attributes:
        total_steps: optimizer steps of the run.
        warmup_steps: linear warm-up from ``start_ratio`` of the peak.
        hold: share of the steps after the warm-up at the peak; then linear down to ``final_ratio``.
        weight_decay, weight_decay_end: half a cosine from one to the other over the whole run.
    """

    total_steps: int
    warmup_steps: int
    final_ratio: float
    weight_decay: float
    weight_decay_end: float
    start_ratio: float = 0.005
    hold: float = 0.05

    def learning_rate_factor(self, step: int) -> float:
        """Factor on the peak learning rate at a step counted from 0."""
        if step < self.warmup_steps:
            return self.start_ratio + (1 - self.start_ratio) * step / self.warmup_steps
        passed = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - 1 - self.warmup_steps))
        if passed < self.hold:
            return 1.0
        return self.final_ratio + (1 - self.final_ratio) * (1 - passed) / (1 - self.hold)

    def weight_decay_at(self, step: int) -> float:
        passed = min(1.0, step / max(1, self.total_steps - 1))
        cosine = 0.5 + 0.5 * math.cos(math.pi * passed)
        return self.weight_decay_end + (self.weight_decay - self.weight_decay_end) * cosine


class ScheduledAdamW(LRScheduler):
    """Applies a `Schedule` to an optimizer's groups: closed form in the step, so a resumed run is on the curve."""

    def __init__(self, optimizer: Optimizer, schedule: Schedule, last_epoch: int = -1) -> None:
        self.schedule = schedule
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.schedule.weight_decay_at(self.last_epoch) * group["decay_scale"]
        factor = self.schedule.learning_rate_factor(self.last_epoch)
        return [base * factor for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Plain values only: the schedule itself comes from the recipe."""
        return {key: value for key, value in super().state_dict().items() if key != "schedule"}


# Optimizers and schedules of tokenizer training: one pair for the tokenizer, perhaps one for its discriminator.


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
