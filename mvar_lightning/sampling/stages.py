"""Several models in one image: one drafts the coarse scales, another finishes (CoDe, arXiv 2411.17787).

A model that takes over is given what was drawn before: its history takes in every earlier scale, and where its strategy
reads keys across scales, one pass over all of them fills its cache. The model before and its cache are let go.

B images, R rows (B, or 2B while the unconditional half is run), l tokens of one scale, K scales, Z code dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mvar_lightning.attention import CachePolicy
from mvar_lightning.checkpoints.source import Source
from mvar_lightning.errors import UserError, check_kind
from mvar_lightning.pyramid import ScalePyramid
from mvar_lightning.sampling.guidance import GuidanceSchedule, GuidedRows
from mvar_lightning.tokenizer import MultiScaleTokenizer, check_pair, fingerprint
from mvar_lightning.transformer import NextScaleTransformer

Drawers = NextScaleTransformer | Sequence[tuple[range, NextScaleTransformer]]
"""One model for all scales, or each with its scales, which count from 0 and follow each other to the last."""


@dataclass(frozen=True)
class Stages:
    """Which model draws which scales.

    Raises:
        UserError: scales that do not follow each other from the first to the last, or models that cannot work together:
            another tokenizer's, other scales or classes, another device, twice the same in a row.
    """

    stages: tuple[tuple[range, NextScaleTransformer], ...]

    @classmethod
    def of(cls, given: Drawers | Stages) -> Stages:
        """Stages as they are given to `generate`; a model alone draws all scales."""
        if isinstance(given, Stages):
            return given
        if isinstance(given, NextScaleTransformer):
            return cls(((range(given.pyramid.num_scales), given),))
        check_kind("model", given, (list, tuple), "a transformer, or a list of (range, transformer)")
        for stage in given:
            if not (isinstance(stage, (list, tuple)) and len(stage) == 2 and isinstance(stage[0], range)):
                raise UserError(f"model: {type(stage).__name__} in a list of stages; give (range(0, 8), transformer)")
            check_kind("model", stage[1], NextScaleTransformer, "a transformer")
        return cls(tuple((scales, model) for scales, model in given))

    def __post_init__(self) -> None:
        told = ", ".join(f"{scales.start} to {scales.stop - 1}" for scales, _ in self.stages) or "none"
        last = self.stages[-1][1].pyramid.num_scales if self.stages else 0
        starts, stops = ([getattr(scales, end) for scales, _ in self.stages] for end in ("start", "stop"))
        if not last or [0, *stops] != [*starts, last] or any(not s or s.step != 1 for s, _ in self.stages):
            raise UserError(f"scales {told}: the models' scales must follow each other from 0 to {max(0, last - 1)}")
        first = self.first
        for (_, before), (scales, model) in zip(self.stages, self.stages[1:], strict=False):
            if model is before:
                raise UserError(
                    f"scales {told}: the model of scale {scales.start} is the one before it; join their scales"
                )
            for name in ("pyramid", "vocab_size", "code_dim", "num_classes"):
                ours, theirs = getattr(first, name), getattr(model, name)
                if ours != theirs:
                    name = "scales" if name == "pyramid" else name
                    raise UserError(f"{name}: the first model has {ours}, that of scale {scales.start} {theirs}")
            hashes = first.tokenizer_hash, model.tokenizer_hash
            if None not in hashes and hashes[0] != hashes[1]:
                raise UserError(
                    f"model: that of scale {scales.start} was trained with another tokenizer ({str(hashes[1])[:12]}, "
                    f"the first with {str(hashes[0])[:12]}); both must read the same tokens"
                )
            if (ours := next(first.parameters()).device) != (theirs := next(model.parameters()).device):
                raise UserError(f"device: the first model is on {ours}, that of scale {scales.start} on {theirs}")

    @property
    def first(self) -> NextScaleTransformer:
        """The model of the first scale: all have its pyramid, classes and device."""
        return self.stages[0][1]

    @property
    def models(self) -> tuple[NextScaleTransformer, ...]:
        return tuple(model for _, model in self.stages)

    @property
    def pyramid(self) -> ScalePyramid:
        return self.first.pyramid

    def check_policy(self, policy: CachePolicy | None) -> None:
        """Raise `UserError` where no model keeps what a policy could drop, or it does not fit one that does."""
        if policy is None:
            return
        keeping = [model for model in self.models if model.backend.plan.cache_tokens]
        for model in keeping or self.models:
            policy.check(model.backend.plan, model.depth)

    def check_together(self, tokenizer: MultiScaleTokenizer) -> None:
        """Raise `UserError` where models and tokenizer cannot work together: other tokens, or another device."""
        check_pair(self.first, tokenizer)
        ours, theirs = (next(module.parameters()).device for module in (self.first, tokenizer))
        if ours != theirs:
            raise UserError(f"device: the model is on {ours}, the tokenizer on {theirs}; move one")


def load_stages(source: Source, device: torch.device) -> tuple[Stages, MultiScaleTokenizer]:
    """The model or models that a source names, and the tokenizer of all, on ``device``.

    Raises:
        UserError: as `Source.load` and `Stages`; a refiner of another tokenizer, or a first scale that it cannot have.
    """
    model, tokenizer = source.load(device)
    if source.refiner is None or source.from_scale is None:
        return Stages.of(model), tokenizer
    first, last = source.from_scale, model.pyramid.num_scales - 1
    if not 1 <= first <= last:
        raise UserError(f"``from_scale`` {first}: the refiner begins with one of 1 to {last}; scales count from 0")
    refiner, its_tokenizer = Source(source.refiner).load(device)
    if (ours := fingerprint(tokenizer)) != (its := fingerprint(its_tokenizer)):
        raise UserError(
            f"``refiner`` {source.refiner}: was trained with another tokenizer ({its[:12]}, {source.path} with "
            f"{ours[:12]}); both must read the same tokens"
        )
    return Stages(((range(first), model), (range(first, last + 1), refiner))), tokenizer


class StagedRows:
    """The guided rows of the model whose turn it is. Of one model alone they are its `GuidedRows`."""

    def __init__(
        self, stages: Stages, label_B: Tensor, schedule: GuidanceSchedule, policy: CachePolicy | None = None
    ) -> None:
        self.label_B, self.schedule, self.policy = label_B, schedule, policy
        self.waiting = list(stages.stages[1:])
        self.inputs: list[Tensor | None] = []  # of all scales so far, while a model waits that needs them
        self.rows = GuidedRows(stages.first, label_B, schedule, stop=stages.stages[0][0].stop, policy=policy)

    def features(self, scale: int, x_BlZ: Tensor | None) -> Tensor:
        """As of `GuidedRows`, by the model whose scale it is."""
        if self.waiting and scale == self.waiting[0][0].start:
            scales, model = self.waiting.pop(0)
            del self.rows  # with its cache, before the next one is made
            self.rows = GuidedRows(model, self.label_B, self.schedule, self.inputs, scales.stop, self.policy)
        if self.waiting:
            self.inputs.append(x_BlZ)
        return self.rows.features(scale, x_BlZ)

    def logits(self, h_RlC: Tensor, scale: int, images: slice) -> Tensor:
        """As of `GuidedRows`."""
        return self.rows.logits(h_RlC, scale, images)
