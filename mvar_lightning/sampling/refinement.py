"""Refinement in passes: after the first draw of a map its least probable tokens are drawn anew, knowing the others
(HMAR, arXiv 2506.04421; written from its description alone).

A schedule such as 1, 1, 2, 5 for a 3 x 3 map: one token stays as first drawn, the other eight are drawn again by the
refinement, of which the most probable one stays, and so on; the last five are drawn last. No guidance.

B images, l tokens of one scale, V vocabulary, Z code dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mvar_lightning.checkpoints.refinement import belongs, load_refinement
from mvar_lightning.errors import UserError, check_kind
from mvar_lightning.sampling.draws import ImageNoise, sample_tokens
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.tokenizer.quantizer import MultiScaleQuantizer
from mvar_lightning.transformer.refinement import Refinement, sizes_of

if TYPE_CHECKING:
    from mvar_lightning.sampling.stages import Stages

PASSES: dict[tuple[int, int], list[int]] = {(2, 2): [1, 3], (3, 3): [1, 1, 2, 5]}
"""As published, by shape of the map: 2 x 2 in two draws, 3 x 3 in four, all others in one."""


@dataclass(frozen=True)
class InPasses:
    """A sampler's refinement.

    Args:
        refinement: the trained head, of the model that draws the first scales.
        passes: for each refined scale, counted from 0, how many of its tokens each draw leaves for good; the published
            ones, of those of its model's scales that are 2 x 2 and 3 x 3, if not given.

    Raises:
        UserError: a schedule that is no list of numbers of at least 1, or one of the first scale.
    """

    refinement: Refinement
    passes: Mapping[int, Sequence[int]] | None = None

    def __post_init__(self) -> None:
        check_kind("refinement", self.refinement, Refinement, "what load_refinement gives")
        check_kind(
            "passes", {} if self.passes is None else self.passes, Mapping, "numbers by scale, such as {1: [1, 3]}"
        )
        for scale, counts in (self.passes or {}).items():
            listed = isinstance(counts, (list, tuple)) and bool(counts)
            if type(scale) is not int or not listed or not all(type(count) is int and count >= 1 for count in counts):
                raise UserError(
                    f"``refinement_passes`` {scale!r}:{counts!r}: give a list of numbers of at least 1 by scale, "
                    "such as {1: [1, 3]}"
                )
            if scale < 1:
                raise UserError(f"``refinement_passes`` {scale}: the first scale has one draw; scales count from 0")

    def of(self, stages: Stages) -> dict[int, list[int]]:
        """The schedule of the first model's scales. Raises `UserError` where one of a scale does not add up to its
        tokens, or is of another model's, or the published ones fit none."""
        pyramid, own = stages.pyramid, stages.stages[0][0]
        if self.passes is None:
            found = {k: PASSES[shape] for k in own if k and (shape := pyramid.shapes[k]) in PASSES}
            if not found:
                which = f" {own.start} to {own.stop - 1} of" if len(own) < pyramid.num_scales else ""
                raise UserError(
                    f"``refinement_passes``: the published ones fit none of{which} the scales {pyramid}; give some"
                )
            return found
        for scale, counts in self.passes.items():
            if scale >= pyramid.num_scales:
                raise UserError(f"``refinement_passes`` {scale}: the model has scales 0 to {pyramid.num_scales - 1}")
            if scale not in own:
                raise UserError(f"``refinement_passes`` {scale}: is drawn by another model than the refinement's")
            if (given := sum(counts)) != (tokens := pyramid.tokens_of(scale)):
                than, schedule = "longer" if given > tokens else "shorter", ",".join(map(str, counts))
                raise UserError(
                    f"``refinement_passes`` {scale}:{schedule}: {given} tokens, {than} than the map of scale {scale}; "
                    f"its {tokens} are to be shared out"
                )
        return {scale: list(counts) for scale, counts in self.passes.items()}

    def check(self, stages: Stages, more_smooth: bool = False) -> None:
        """Raise `UserError` where it does not fit the models or their scales."""
        model, made = stages.first, self.refinement
        self.of(stages)
        if more_smooth:
            raise UserError("``more_smooth``: mixes codes that a refinement would draw anew; leave out one of the two")
        for name, here in sizes_of(model).items():
            if (its := made.sizes[name]) != here:
                raise UserError(f"``refinement``: of a model of {name} {its}, this one has {here}")
        if (blocks := len(made.blocks)) > model.depth:
            raise UserError(f"``refinement``: has {blocks} blocks of its model, this one has {model.depth} in all")
        if made.mask.device != next(model.parameters()).device:
            raise UserError(f"device: the refinement is on {made.mask.device}, the model is not; move one")
        if not belongs(made, model):
            raise UserError(
                "``refinement``: was trained beside other weights; load it beside this model, before that is quantized "
                "or rounded"
            )

    def told(self, stages: Stages) -> str:
        """The schedule in a line."""
        return " ".join(f"{scale}:{','.join(map(str, counts))}" for scale, counts in self.of(stages).items())


class Filters(NamedTuple):
    """Of a draw, as of `sample_tokens`."""

    top_k: int | None
    top_p: float | None
    temperature: float


def open_passes(
    path: str | None, passes: Mapping[int, Sequence[int]] | None, stages: Stages, tokenizer: MultiScaleTokenizer
) -> InPasses | None:
    """What a request asks for, read and checked; None where it names no refinement. Raises `UserError` as
    `load_refinement` and `InPasses`."""
    if path is None:
        if passes is not None:
            raise UserError("``refinement_passes``: needs ``refinement`` CHECKPOINT")
        return None
    found = InPasses(load_refinement(path, stages.first, tokenizer), passes)
    found.check(stages)
    return found


class Refining:
    """One call of sampling, in which `InPasses` takes part. Of none at all it leaves everything as it is."""

    def __init__(
        self,
        given: InPasses | None,
        stages: Stages,
        tokenizer: MultiScaleTokenizer,
        label_B: Tensor,
        filters: Filters,
        noise: ImageNoise,
    ) -> None:
        self.passes = {} if given is None else given.of(stages)
        self.filters, self.noise, self.quantizer = filters, noise, tokenizer.quantizer
        self.probability: list[Tensor] = []
        if given is not None:
            self.model, self.refinement = stages.first, given.refinement
            self.state = self.model.begin(label_B, len(label_B), stop=1)  # for its history: nothing is cached
            self.conditions = self.refinement.conditions(self.model, label_B)

    def see(self, scale: int, logits_blV: Tensor, idx_bl: Tensor) -> None:
        """How probable the tokens of some images are that were drawn first."""
        if scale in self.passes:
            self.probability.append(self._probability(logits_blV, idx_bl))

    def refine(self, scale: int, x_BlZ: Tensor | None, idx_Bl: Tensor, codes_BlZ: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and codes after the passes of ``scale``, whose input is ``x_BlZ``."""
        if not self.passes or scale > max(self.passes):
            return idx_Bl, codes_BlZ
        x_BlC = self.model.step_input(self.state, scale, x_BlZ)  # also of other scales: a history takes them in
        if scale not in self.passes:
            return idx_Bl, codes_BlZ
        probability_Bl, self.probability = torch.cat(self.probability), []
        masked_Bl = torch.ones_like(idx_Bl, dtype=torch.bool)
        left = idx_Bl.shape[1]
        for stays in self.passes[scale][:-1]:
            left -= stays
            masked_Bl = _lowest(probability_Bl.masked_fill(~masked_Bl, torch.inf), left)
            y_BlZ = known_codes(self.quantizer.lookup(idx_Bl), masked_Bl, self.quantizer, scale)
            logits_BlV = self.refinement(self.model, self.conditions, scale, x_BlC, y_BlZ, masked_Bl)
            drawn_Bl = sample_tokens(logits_BlV, self.noise.again(scale), *self.filters)
            idx_Bl = torch.where(masked_Bl, drawn_Bl, idx_Bl)
            probability_Bl = self._probability(logits_BlV, idx_Bl)
        return idx_Bl, self.quantizer.lookup(idx_Bl)

    def _probability(self, logits_blV: Tensor, idx_bl: Tensor) -> Tensor:
        """Of tokens under the logits they were drawn from, before these are filtered."""
        scaled = logits_blV if self.filters.temperature == 1.0 else logits_blV / self.filters.temperature
        own_bl1 = scaled.gather(-1, idx_bl[..., None])
        return (own_bl1 - scaled.logsumexp(dim=-1, keepdim=True))[..., 0].exp()


def _lowest(value_Bl: Tensor, count: int) -> Tensor:
    """Boolean (B, l): the ``count`` lowest of each row."""
    places_Bn = value_Bl.topk(count, dim=-1, largest=False).indices
    return torch.zeros_like(value_Bl, dtype=torch.bool).scatter_(1, places_Bn, True)


def known_codes(codes_BlZ: Tensor, masked_Bl: Tensor, quantizer: MultiScaleQuantizer, scale: int) -> Tensor:
    """What the codes that are not masked add to f_hat, averaged down to their own map, (B, l, Z) float32."""
    known_BlZ = codes_BlZ.masked_fill(masked_Bl[..., None], 0.0)
    added_BZhw = quantizer.accumulate(quantizer.empty_f_hat(len(codes_BlZ)), known_BlZ, scale)
    return quantizer.next_input(added_BZhw, scale)
