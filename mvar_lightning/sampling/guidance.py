"""Classifier-free guidance: schedules over the scales, and the rows that a schedule needs.

Guided logits are (1 + t) conditional - t unconditional, with one strength t for each scale (VAR, `models/var.py`).

B images, R rows (B, or 2B while the unconditional half is run), l tokens of one scale, K scales, V vocabulary,
Z code dim.
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from mvar_lightning.attention import CachePolicy
from mvar_lightning.axis import AxisMember
from mvar_lightning.errors import UserError, check_kind
from mvar_lightning.transformer import NextScaleTransformer


class GuidanceSchedule(AxisMember, ABC):
    """How strong guidance is at each scale."""

    def __init__(self, cfg: float = 1.5) -> None:
        if not (math.isfinite(cfg) and cfg >= 0):
            raise UserError(f"cfg {cfg}: must be 0 (no guidance) or a positive number (published: 1.5)")
        self.cfg = float(cfg)

    @abstractmethod
    def strength(self, scale: int, num_scales: int) -> float:
        """t at ``scale`` (counted from 0); 0 is no guidance."""

    def check(self, num_scales: int) -> None:
        """Raise `UserError` where this schedule does not fit a pyramid of so many scales."""


class LinearGuidance(GuidanceSchedule):
    """t = cfg k / (K - 1): none at the first scale, ``cfg`` at the last (VAR, MVAR, Markov-VAR)."""

    def strength(self, scale: int, num_scales: int) -> float:
        return self.cfg * scale / max(1, num_scales - 1)


class ConstantGuidance(GuidanceSchedule):
    """t = cfg at every scale."""

    def strength(self, scale: int, num_scales: int) -> float:
        return self.cfg


class CutoffGuidance(GuidanceSchedule):
    """Guidance in a range of scales only; after it the unconditional half is not computed any more.

    Args:
        cfg: its strength.
        first_scale, last_scale: both guided, counted from 0; None means the pyramid's last.
        linear: inside the range, grow as `LinearGuidance` does, or else be ``cfg`` throughout.
    """

    def __init__(
        self, cfg: float = 1.5, first_scale: int = 0, last_scale: int | None = None, linear: bool = True
    ) -> None:
        if first_scale < 0 or (last_scale is not None and last_scale < first_scale):
            raise UserError(
                f"CutoffGuidance: first_scale={first_scale}, last_scale={last_scale}; "
                "scales are counted from 0, and the last must not come before the first"
            )
        super().__init__(cfg)
        self.first_scale, self.last_scale, self.linear = first_scale, last_scale, linear

    def strength(self, scale: int, num_scales: int) -> float:
        last = num_scales - 1 if self.last_scale is None else self.last_scale
        if not self.first_scale <= scale <= last:
            return 0.0
        return LinearGuidance(self.cfg).strength(scale, num_scales) if self.linear else self.cfg

    def check(self, num_scales: int) -> None:
        for name in ("first_scale", "last_scale"):
            scale = getattr(self, name)
            if scale is not None and scale >= num_scales:
                raise UserError(f"CutoffGuidance: {name}={scale}; the model has scales 0 to {num_scales - 1}")


def as_schedule(cfg: float | GuidanceSchedule | None) -> GuidanceSchedule:
    """A number is the published linear schedule; None and 0 switch guidance off."""
    if isinstance(cfg, GuidanceSchedule):
        return cfg
    check_kind("cfg", 0.0 if cfg is None else cfg, numbers.Real, "a number or a schedule such as ConstantGuidance(1.5)")
    return LinearGuidance(cfg or 0.0)


def named_schedule(cfg: float, guidance: str = "linear", scales: tuple[int, int] | None = None) -> GuidanceSchedule:
    """The schedule that commands and the page name: ``linear`` or ``constant``, perhaps of a range of scales alone.

    Raises:
        UserError: another name, a strength below 0, or scales that do not follow each other.
    """
    if guidance not in ("linear", "constant"):
        raise UserError(f"``guidance`` {guidance}: choose linear or constant")
    if scales is not None:
        return CutoffGuidance(cfg, *scales, guidance == "linear")
    return (LinearGuidance if guidance == "linear" else ConstantGuidance)(cfg)


def unconditional_scales(strengths: list[float], crosses_scales: bool) -> range:
    """The scales at which the unconditional rows are run.

    They end where guidance ends. Where keys are read across scales they begin with the first scale, or the keys
    would be missing later; else with the first guided scale.
    """
    guided = [scale for scale, strength in enumerate(strengths) if strength != 0]
    if not guided:
        return range(0)
    # to spare one small scale is not worth a second start (its modulations are a third of the weights)
    first = 0 if crosses_scales or guided[0] <= 1 else guided[0]
    return range(first, guided[-1] + 1)


class GuidedRows:
    """Runs the conditional rows and, while guidance needs them, as many unconditional ones below them.

    These are taken up, and dropped again, where the range of their scales begins and ends.

    Args:
        label_B: int64, the model's "no class" (index num_classes) allowed.
        schedule: 0 everywhere runs B rows throughout.
        entered: inputs of the scales that another model drew, (B, l, Z) each, None for the first: this one goes on.
        stop: the first scale that another model draws after it.
        policy: which keys and values are kept, where any are.
    """

    def __init__(
        self,
        model: NextScaleTransformer,
        label_B: Tensor,
        schedule: GuidanceSchedule,
        entered: Sequence[Tensor | None] = (),
        stop: int | None = None,
        policy: CachePolicy | None = None,
    ) -> None:
        num_scales = model.pyramid.num_scales
        schedule.check(num_scales)
        self.model = model
        self.label_B = label_B
        self.strengths = [schedule.strength(scale, num_scales) for scale in range(num_scales)]
        self.unconditional = unconditional_scales(self.strengths, model.backend.plan.crosses_scales)
        self.first, self.stop, self.policy = len(entered), stop, policy
        self.state = model.begin(self._labels(self.first), len(label_B), stop, policy)
        if entered:
            model.catch_up(self.state, entered)

    def step(self, scale: int, x_BlZ: Tensor | None) -> Tensor:
        """Guided logits of ``scale``, float32 (B, l, V)."""
        return self.logits(self.features(scale, x_BlZ), scale, slice(0, len(self.label_B)))

    def features(self, scale: int, x_BlZ: Tensor | None) -> Tensor:
        """What the head's last product reads at ``scale``, (R, l, C): a fraction of the logits' size."""
        if scale > self.first and scale == self.unconditional.start:
            history = self.state.history  # it is of images, not of rows, so it serves both halves
            self.state = self.model.begin(self._labels(scale), len(self.label_B), self.stop, self.policy)
            self.state.history = history
        elif scale > self.first and scale == self.unconditional.stop:
            self.state = self.state.rows(slice(0, len(self.label_B)))
        return self.model.step_features(self.state, scale, x_BlZ)

    def logits(self, h_RlC: Tensor, scale: int, images: slice) -> Tensor:
        """Guided logits of some images, float32 (b, l, V)."""
        conditional_BlC, unconditional_BlC = h_RlC[: len(self.label_B)], h_RlC[len(self.label_B) :]
        classify, strength = self.model.head.classify, self.strengths[scale]
        logits_blV = classify(conditional_BlC[images])
        if strength == 0:
            return logits_blV
        # in place: these are the largest tensors of sampling, and nobody else holds them
        return logits_blV.mul_(1 + strength).sub_(classify(unconditional_BlC[images]), alpha=strength)

    def _labels(self, scale: int) -> Tensor:
        if scale not in self.unconditional:
            return self.label_B
        return torch.cat([self.label_B, torch.full_like(self.label_B, self.model.num_classes)])
