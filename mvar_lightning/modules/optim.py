"""Optimizer groups and schedules as VAR trains (`utils/lr_control.py` and `utils/arg_util.py` of its release)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

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
