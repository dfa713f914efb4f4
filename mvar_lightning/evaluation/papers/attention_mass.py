"""Where attention goes: its mass on each earlier scale, and inside growing neighborhoods (MVAR's redundancy figures).

MVAR (arXiv 2505.12742, section 3) asks of a trained VAR how much of the softmax a query of scale k spends on each scale
j <= k, and how much of it stays close to the query. Block k of the sequence carries scale k - 1, enlarged, as its
input; so "the adjacent scale" is the query's own block, and a neighborhood is a window of that block.

B batch, H heads, l tokens of one scale, S tokens of its keys, D head dim, K scales, N neighborhoods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mvar_lightning.attention import AttentionBackend
from mvar_lightning.attention.plan import ScaleRead
from mvar_lightning.attention.strategies import neighborhood_mask
from mvar_lightning.errors import UserError
from mvar_lightning.evaluation.papers.breadth import breadth_of, drafters_of
from mvar_lightning.pyramid import Size
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.tools.compute import evaluating
from mvar_lightning.tools.ranks import ALONE, Ranks
from mvar_lightning.transformer import NextScaleTransformer

KERNELS = (1, 3, 5, 7, 9, 11, 13, 15)


@dataclass(frozen=True)
class AttentionMass:
    """Means over images, heads and queries, of shape (blocks, K, ...); what cannot be is NaN.

    ``on_scale[b, k, j]`` is the share of block b's softmax that queries of scale k spend on keys of scale j; a row
    sums to 1. ``within[b, k, n]`` is the share of the mass on the query's own block inside a window of ``kernels[n]``,
    NaN where the map is smaller than that in height and width; ``even[k, n]`` is what an even spread over what is
    visible would have there. ``breadth[b, k]`` says how broadly earlier scales are looked at (`papers.breadth`).
    """

    images: int
    sides: tuple[Size, ...]
    kernels: tuple[int, ...]
    on_scale: Tensor
    within: Tensor
    even: Tensor
    breadth: Tensor

    def content(self) -> dict[str, Any]:
        """Plain values, for JSON; NaN becomes None."""
        return {
            "images": self.images,
            "scales": list(self.sides),
            "kernels": list(self.kernels),
            "mass_on_scale_mean": _plain(self.on_scale.mean(dim=0)),
            "mass_within_kernel_mean": _plain(self.within.mean(dim=0)),
            "mass_within_kernel_if_even": _plain(self.even),
            "mass_on_scale_by_block": _plain(self.on_scale),
            "mass_within_kernel_by_block": _plain(self.within),
            "breadth_by_block": _plain(self.breadth),
            "drafters": drafters_of(self.breadth),
        }


@torch.no_grad()
def attention_mass(
    model: NextScaleTransformer,
    tokenizer: MultiScaleTokenizer,
    batches: Iterable[tuple[Tensor, Tensor] | None],
    kernels: Sequence[int] = KERNELS,
    ranks: Ranks = ALONE,
) -> AttentionMass | None:
    """Measure a model on images (B, 3, H, W) in [-1, 1] with their labels (B,), teacher-forced, in evaluation mode.

    Args:
        batches: of several processes, this one's turns (`Ranks.each`).
        ranks: that share the work; all but the first are given None.

    Raises:
        UserError: an even or non-positive kernel, or no images.
    """
    if any(kernel < 1 or kernel % 2 == 0 for kernel in kernels):
        raise UserError(f"kernels {list(kernels)}: neighborhoods have odd sides of 1 or more")
    sums = _Sums(model, tuple(sorted(kernels)))
    total, images = _Sums(model, sums.kernels), 0

    def measured(batch: tuple[Tensor, Tensor]) -> tuple[int, Tensor, Tensor, Tensor]:
        image_B3HW, label_B = batch
        sums.clear()
        model(tokenizer.teacher_input(tokenizer.encode(image_B3HW)), label_B)
        return len(image_B3HW), sums.on_scale, sums.within, sums.breadth

    with evaluating(model, tokenizer), _watched(model, sums.add):
        for count, on_scale, within, breadth in ranks.each(measured, batches):
            images += count
            total.on_scale += on_scale
            total.within += within
            total.breadth += breadth
    if not ranks.is_first:
        return None
    if not images:
        raise UserError("attention: there is not one image to look at; give a split that has some")
    even_KN = torch.tensor([[_even(read, kernel) for kernel in sums.kernels] for read in model.backend.plan.reads])
    sides = model.pyramid.sides
    on_scale, within, breadth = (each / images for each in (total.on_scale, total.within, total.breadth))
    return AttentionMass(images, sides, sums.kernels, on_scale, within, even_KN, breadth)


def _even(read: ScaleRead, kernel: int) -> float:
    """Share of a window in an even spread over the visible part of the own block, mean over queries; NaN if it does
    not fit into the map."""
    if kernel > max(read.shape):
        return float("nan")
    visible_ll = neighborhood_mask(read.shape, read.kernel_size or max(read.shape))
    inside_ll = visible_ll & neighborhood_mask(read.shape, kernel)
    return float((inside_ll.sum(dim=1) / visible_ll.sum(dim=1)).mean())


class _Sums:
    """Means over a query's scale, added up over images."""

    def __init__(self, model: NextScaleTransformer, kernels: tuple[int, ...]) -> None:
        self.model, self.kernels = model, kernels
        self.clear()

    def clear(self) -> None:
        model, kernels, scales = self.model, self.kernels, self.model.pyramid.num_scales
        self.on_scale = torch.zeros(model.depth, scales, scales, dtype=torch.float64)
        self.breadth = torch.zeros(model.depth, scales, dtype=torch.float64)
        self.within = torch.full((model.depth, scales, len(kernels)), torch.nan, dtype=torch.float64)
        for number, kernel in enumerate(kernels):
            fits = [scale for scale, shape in enumerate(model.pyramid.shapes) if kernel <= max(shape)]
            self.within[:, fits, number] = 0.0

    def add(self, block: int, read: ScaleRead, scores_BHlS: Tensor) -> None:
        """Mass on each scale, and the share of the own block's mass inside each window: mean over queries."""
        pyramid, scale = self.model.pyramid, read.scale
        # a softmax of its own: of a head that looks elsewhere the own block's share of the whole can round to nothing
        own_BHll = scores_BHlS[..., -pyramid.tokens_of(scale) :].softmax(dim=-1)
        share_BHlS = scores_BHlS.softmax(dim=-1)
        self.breadth[block, scale] += breadth_of(share_BHlS, pyramid.tokens_of(scale))
        share_BlS, own_Bll = (part.mean(dim=1).double().cpu() for part in (share_BHlS, own_BHll))
        keys = range(read.first_key_scale, scale + 1)
        parts = share_BlS.split([pyramid.tokens_of(key) for key in keys], dim=2)
        for key, part_BlS in zip(keys, parts, strict=True):
            self.on_scale[block, scale, key] += part_BlS.sum(dim=2).mean(dim=1).sum()
        # heads were averaged after each head's mass on the block was made 1, so each counts alike
        for number, kernel in enumerate(self.kernels):
            if kernel <= max(read.shape):
                inside_Bl = (own_Bll * neighborhood_mask(read.shape, kernel)).sum(dim=2)
                self.within[block, scale, number] += inside_Bl.mean(dim=1).sum()


@torch.no_grad()
def attention_from(
    model: NextScaleTransformer, tokenizer: MultiScaleTokenizer, idx_1L: Tensor, label: int, query: int
) -> Tensor:
    """Where one token looks, teacher-forced on one image's tokens: its softmax over all tokens in each block, mean over
    heads, float32 (blocks, L); 0 where it sees nothing.

    Args:
        idx_1L: int64 (1, L), on the model's device.
        label: the class; num_classes is "no class".
        query: index of the token in the pyramid.

    Raises:
        UserError: no such token or class.
    """
    pyramid = model.pyramid
    if not 0 <= query < pyramid.num_tokens:
        raise UserError(f"token {query}: the pyramid has 0 to {pyramid.num_tokens - 1}")
    scale = int(pyramid.scale_of_tokens()[query])
    keys = model.backend.plan.keys_of(scale)
    share_NL = torch.zeros(model.depth, pyramid.num_tokens)

    def look(block: int, read: ScaleRead, scores_BHlS: Tensor) -> None:
        if read.scale == scale:
            row_HS = scores_BHlS[0, :, query - pyramid.offsets[scale]]
            share_NL[block, keys] = row_HS.softmax(dim=-1).mean(dim=0).cpu()

    with evaluating(model, tokenizer), _watched(model, look):
        model(tokenizer.teacher_input(idx_1L), torch.tensor([label], device=idx_1L.device))
    return share_NL


Look = Callable[[int, ScaleRead, Tensor], None]
"""(block, what queries of a scale read, their scores (B, H, l, S), -inf where they see nothing)."""


class _Watcher(AttentionBackend):
    """A backend that computes what the model's own does and, beside it, shows the scores in full."""

    name = "watcher"

    def __init__(self, inner: AttentionBackend, block: int, look: Look) -> None:
        super().__init__(inner.strategy, inner.pyramid)
        self.inner, self.block, self.look = inner, block, look

    def __call__(self, q_BHlD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, scales: range, softmax_scale: float) -> Tensor:
        span = self.pyramid.span(scales)
        for scale in scales:
            own, keys = self.pyramid.slice_of(scale), self.plan.keys_of(scale)
            q_BHlD_own = q_BHlD[:, :, own.start - span.start : own.stop - span.start]
            first_key = span.stop - k_BHSD.shape[2]
            k_BHSD_own = k_BHSD[:, :, keys.start - first_key : keys.stop - first_key]
            read = self.plan.reads[scale]
            self.look(self.block, read, _scores(read, q_BHlD_own.float(), k_BHSD_own.float(), softmax_scale))
        return self.inner(q_BHlD, k_BHSD, v_BHSD, scales, softmax_scale)


def _scores(read: ScaleRead, q_BHlD: Tensor, k_BHSD: Tensor, softmax_scale: float) -> Tensor:
    scores_BHlS = q_BHlD @ k_BHSD.transpose(-1, -2) * softmax_scale
    if read.kernel_size is not None:
        visible_lS = neighborhood_mask(read.shape, read.kernel_size).to(scores_BHlS.device)
        scores_BHlS = scores_BHlS.masked_fill(~visible_lS, -torch.inf)
    return scores_BHlS


@contextmanager
def _watched(model: NextScaleTransformer, look: Look) -> Iterator[None]:
    """Each block's attention with a watcher around its backend; the backends come back at the end."""
    attentions = [cast(Any, block).attention for block in model.blocks]
    inner = [attention.backend for attention in attentions]
    try:
        for block, attention in enumerate(attentions):
            attention.backend = _Watcher(attention.backend, block, look)
        yield
    finally:
        for attention, backend in zip(attentions, inner, strict=True):
            attention.backend = backend


def _plain(values: Tensor) -> Any:
    """Nested lists, NaN as None: JSON has no NaN."""
    if values.ndim:
        return [_plain(row) for row in values]
    number = float(values)
    return None if number != number else round(number, 6)
