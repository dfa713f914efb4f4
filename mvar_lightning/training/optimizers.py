"""AdamW of the transformer and of the tokenizer, its groups and its schedules.

The transformer's are VAR's (`utils/lr_control.py` and `utils/arg_util.py` of its release).
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mvar_lightning.compat import lets_clip
from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer import AdversarialLoss, MultiScaleTokenizer
from mvar_lightning.transformer.transformer import without_decay

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule(ABC):
    """Learning rate at each step, as a factor on its peak: a warm-up in a straight line, then a shape.

    Attributes:
        total_steps: optimizer steps of the run, infinite where it has no end: then there is no way down.
        warmup_steps: of the warm-up.
        final_ratio: the factor at the end.
    """

    total_steps: float
    warmup_steps: int
    final_ratio: float

    def factor(self, step: float) -> float:
        """At a step counted from 0."""
        return self.warmup(step) if step < self.warmup_steps else self.shape(step - self.warmup_steps)

    @abstractmethod
    def warmup(self, step: float) -> float: ...

    @abstractmethod
    def shape(self, step: float) -> float:
        """At a step counted from the end of the warm-up."""


class HeldLine(Schedule):
    """VAR's "lin0": from 1/200 to the peak, there for 5% of the rest, then a straight line."""

    start, hold = 0.005, 0.05

    def warmup(self, step: float) -> float:
        return self.start + (1 - self.start) * step / self.warmup_steps

    def shape(self, step: float) -> float:
        passed = min(1.0, step / max(1, self.total_steps - 1 - self.warmup_steps))
        if passed < self.hold:
            return 1.0
        return self.final_ratio + (1 - self.final_ratio) * (1 - passed) / (1 - self.hold)


class HalfCosine(Schedule):
    """The tokenizer's: from 1 / warmup_steps to the peak, then half a cosine."""

    def warmup(self, step: float) -> float:
        return (step + 1) / self.warmup_steps

    def shape(self, step: float) -> float:
        return half_cosine(1.0, self.final_ratio, step / max(1.0, self.total_steps - self.warmup_steps))


def half_cosine(start: float, end: float, passed: float) -> float:
    """From ``start`` to ``end`` while ``passed`` goes from 0 to 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, passed)))


class ScheduledAdamW(LRScheduler):
    """Applies a schedule to an optimizer's groups: closed form in the step, so a resumed run is on the curve.

    Args:
        optimizer: groups at their peak learning rate.
        schedule: of the learning rate.
        weight_decay: first and last, with half a cosine over the whole run in between, as VAR can train; each group has
            its share of it as ``decay_scale``. None leaves the groups' own.
        images: of one step over all processes, where it is known.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Schedule,
        weight_decay: tuple[float, float] | None = None,
        images: int | None = None,
    ) -> None:
        self.schedule, self.weight_decay = schedule, weight_decay
        self.images, self.total_steps = images, schedule.total_steps
        self.moved = 0.0
        """Steps that the curves are ahead of the count: what a checkpoint has done counts by its images."""
        super().__init__(optimizer)
        self._of_recipe = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]

    def get_lr(self) -> list[float | Tensor]:
        step = self.last_epoch + self.moved
        if self.weight_decay is not None:
            passed = step / max(1, self.schedule.total_steps - 1)
            for group in self.optimizer.param_groups:
                group["weight_decay"] = half_cosine(*self.weight_decay, passed) * group["decay_scale"]
        factor = self.schedule.factor(step)
        return [base * factor for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Plain values only: the curves themselves come from the recipe."""
        left_out = ("schedule", "weight_decay", "_of_recipe")
        return {key: value for key, value in super().state_dict().items() if key not in left_out}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the place on the curves; the curves, their peak and all settings of the optimizer (whose state is
        loaded before) stay the recipe's. With another number of images a step that place is moved to where as many
        images have been seen, unless the run's length is given in steps. Another peak is told.
        """
        own = {name: getattr(self, name) for name in ("base_lrs", "images", "total_steps")}
        super().load_state_dict(state_dict)
        theirs = {name: state_dict.get(name, value) for name, value in own.items()}
        vars(self).update(own)
        counted = bool(theirs["images"] and own["images"]) and theirs["total_steps"] != own["total_steps"]
        moved = counted and theirs["images"] != own["images"]
        if moved:
            self.moved = (self.last_epoch + self.moved) * theirs["images"] / own["images"] - self.last_epoch
        new = moved or theirs["base_lrs"] != own["base_lrs"]
        # else the step at hand keeps what its schedule gave it when it was saved
        kept = () if new else ("lr", "weight_decay") if self.weight_decay is not None else ("lr",)
        for group, settings in zip(self.optimizer.param_groups, self._of_recipe, strict=True):
            group.update({name: value for name, value in settings.items() if name not in kept})
        if new:
            self._last_lr = self.get_lr()
            for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
                group["lr"] = rate
        if theirs["base_lrs"] != own["base_lrs"]:
            rank_zero_info(
                f"learning rate: the peak of the checkpoint was {theirs['base_lrs'][0]:.4g}, this run's is "
                f"{own['base_lrs'][0]:.4g}, as its recipe and its global batch give it"
            )


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two AdamW groups, ``decay`` and ``no_decay``, of the parameters that require a gradient.

    No decay for biases, 1-D tensors, and what modules name themselves (`without_decay`); embeddings do decay.
    """
    left_out = without_decay(model)
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1 and not name.endswith("bias") and name not in left_out].append(parameter)
    return [
        {"name": "decay", "params": groups[True], "decay_scale": 1.0},
        {"name": "no_decay", "params": groups[False], "decay_scale": 0.0, "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class TokenizerAdamW:
    """AdamW of a tokenizer or its discriminator, and the course of its learning rate; see ``TokenizerModule``.

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

    def optimizer(
        self, parameters: Iterable[nn.Parameter], steps: float, images: int | None, name: str | None = None
    ) -> dict[str, Any]:
        """With its schedule, as Lightning takes them; ``images`` are those of a step, ``name`` is the learning rate's
        in the log.

        Only convolution weights decay: no biases, norms and codes.
        """
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        decaying, others = [p for p in trained if p.ndim == 4], [p for p in trained if p.ndim != 4]
        pairs = ((decaying, self.weight_decay), (others, 0.0))
        groups = [{"params": params, "weight_decay": decay} for params, decay in pairs if params]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=True)
        warmup_steps = 0 if math.isinf(steps) else round(self.warmup * steps)
        schedule = HalfCosine(steps, warmup_steps, self.final_lr_ratio)
        scheduler = ScheduledAdamW(optimizer, schedule, images=images)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": name}}


def tokenizer_optimizers(
    tokenizer: MultiScaleTokenizer,
    adversarial: AdversarialLoss | None,
    settings: TokenizerAdamW,
    steps: float,
    images: int | None = None,
) -> OptimizerLRScheduler:
    """As Lightning takes them: the tokenizer's, and after it the discriminator's over the steps from its start on."""
    ours = settings.optimizer(tokenizer.parameters(), steps, images)
    if adversarial is None:
        return cast(OptimizerLRScheduler, ours)
    adversarial.plan(steps)
    if (start := adversarial.start_step) >= steps:
        rank_zero_only(log.warning)(
            f"adversarial.start: the discriminator would start at step {start}, but the run ends at step {steps}: "
            "it never starts; train longer or set an earlier start"
        )
    own = replace(settings, lr=adversarial.lr or settings.lr, betas=adversarial.betas, weight_decay=0.0)
    theirs = own.optimizer(adversarial.discriminator.parameters(), max(1, steps - start), images, "lr-discriminator")
    return cast(OptimizerLRScheduler, (ours, theirs))


def next_scale_optimizer(module: Any, trained: nn.Module, steps: int, images: int) -> OptimizerLRScheduler:
    """AdamW of ``trained`` and its schedule of a next-scale module's settings, for so many steps and images a step."""
    groups, lr = parameter_groups(trained), module.base_lr * images / 256
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=module.betas, weight_decay=module.weight_decay, fused=True)
    lets_clip(optimizer)
    schedule = HeldLine(steps, round(module.warmup * steps), module.final_lr_ratio)
    scheduler = ScheduledAdamW(optimizer, schedule, (module.weight_decay, module.weight_decay_end), images=images)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
