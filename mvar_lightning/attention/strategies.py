"""Attention strategies: which keys a query of scale k sees. Each is one small class.

A strategy is a statement of visibility alone. It answers two questions for each scale (the first scale it
reads, and perhaps a neighborhood), and everything else follows: the boolean mask (tests, plots, dense
reference), the per-scale plan (fast backends) and the cache policy (sampling).

L tokens of the pyramid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from mvar_lightning.attention.plan import AttentionPlan, ScaleRead
from mvar_lightning.axis import AxisMember
from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import ScalePyramid, Size, height_width

# Neighborhoods by the rule of neighborhood attention (Hassani et al., arXiv 2204.07143): a k x k window is centered on
# the query where it fits, and else moved just far enough to stay on the map, so every query has exactly k*k keys. Along
# an axis shorter than k the window is the whole axis, so every query has min(k, height) * min(k, width).


def window_starts(side: int, kernel_size: int) -> Tensor:
    """First coordinate of the window of each of ``side`` positions, int64 of shape (side,)."""
    assert 1 <= kernel_size <= side
    centered = torch.arange(side) - kernel_size // 2
    return centered.clamp(0, side - kernel_size)


def neighborhood_mask(size: Size, kernel_size: int) -> Tensor:
    """Boolean (l, l) of a map of this side, or height and width: True where key (column) lies in the window of query
    (row)."""
    height, width = height_width(size)
    rows, columns = _near(height, min(kernel_size, height)), _near(width, min(kernel_size, width))
    return (rows[:, None, :, None] & columns[None, :, None, :]).reshape(height * width, height * width)


def _near(side: int, kernel_size: int) -> Tensor:
    """Boolean (side, side) along one axis: True where the second position lies in the window of the first."""
    start, position = window_starts(side, kernel_size), torch.arange(side)
    return (position[None, :] >= start[:, None]) & (position[None, :] < start[:, None] + kernel_size)


class AttentionStrategy(AxisMember, ABC):
    """Base class: write `first_key_scale` (and `kernel_size_of` for neighborhoods) to make a new strategy."""

    @abstractmethod
    def first_key_scale(self, scale: int, pyramid: ScalePyramid) -> int:
        """Coarsest scale that queries of ``scale`` read; they read every scale from it up to their own."""

    def kernel_size_of(self, scale: int, pyramid: ScalePyramid) -> int | None:
        """Odd side of the neighborhood that a query reads in its own map, or None for the whole map."""
        return None

    def check(self, pyramid: ScalePyramid) -> None:
        """Raise `UserError` where this strategy makes no sense on ``pyramid``."""

    def plan(self, pyramid: ScalePyramid) -> AttentionPlan:
        """This strategy on ``pyramid``, ready for a backend. Raises `UserError` where it does not fit."""
        self.check(pyramid)
        reads = tuple(self._read(scale, pyramid) for scale in range(pyramid.num_scales))
        return AttentionPlan(pyramid, reads)

    def mask(self, pyramid: ScalePyramid) -> Tensor:
        """Boolean (L, L) mask, True where query (row) may see key (column): the dense reference."""
        self.check(pyramid)
        scale_L = pyramid.scale_of_tokens()
        first_K = torch.tensor([self.first_key_scale(scale, pyramid) for scale in range(pyramid.num_scales)])
        mask_LL = (scale_L[None, :] <= scale_L[:, None]) & (scale_L[None, :] >= first_K[scale_L][:, None])
        for scale, shape in enumerate(pyramid.shapes):
            kernel_size = self.kernel_size_of(scale, pyramid)
            if kernel_size is not None and kernel_size < max(shape):
                own = pyramid.slice_of(scale)
                mask_LL[own, own] &= neighborhood_mask(shape, kernel_size)
        return mask_LL

    def _read(self, scale: int, pyramid: ScalePyramid) -> ScaleRead:
        shape, first = pyramid.shapes[scale], self.first_key_scale(scale, pyramid)
        assert 0 <= first <= scale, f"{self!r}: scale {scale} cannot start reading at scale {first}"
        kernel_size = self.kernel_size_of(scale, pyramid)
        if kernel_size is not None and kernel_size >= max(shape):
            kernel_size = None  # the window is the whole map
        assert kernel_size is None or first == scale, f"{self!r}: a neighborhood reads its own scale only"
        return ScaleRead(scale, shape, first, kernel_size)


class FullAttention(AttentionStrategy):
    """Every scale sees itself and all earlier scales (VAR, block-causal; section 3 of arXiv 2404.02905)."""

    def first_key_scale(self, scale: int, pyramid: ScalePyramid) -> int:
        return 0


class AdjacentAttention(AttentionStrategy):
    """Every scale sees itself alone. Its *input* already carries the scale before it, so this is the Markov step
    (MVAR, arXiv 2505.12742, and Markov-VAR, arXiv 2511.23334: a block-diagonal mask). No key is ever cached."""

    def first_key_scale(self, scale: int, pyramid: ScalePyramid) -> int:
        return scale


class SlidingWindowAttention(AttentionStrategy):
    """Every scale sees the last ``scales`` scales, its own included: 1 is adjacent, K is full."""

    def __init__(self, scales: int = 2) -> None:
        if scales < 1:
            raise UserError(f"SlidingWindowAttention: scales={scales}; a window holds at least the scale itself (1)")
        self.scales = scales

    def first_key_scale(self, scale: int, pyramid: ScalePyramid) -> int:
        return max(0, scale - self.scales + 1)


class SpatialAttention(AttentionStrategy):
    """Adjacent attention, and at the fine scales only a k x k neighborhood (MVAR's spatial Markov attention).

    Args:
        kernel_size: odd side of the neighborhood; one number, or one for each neighborhood scale.
        scales: which scales use it: an int n for the last n, or a list of scale indices counted from 0.

    MVAR uses 7 at the last two of ten scales (13x13 and 16x16). A scale whose map is smaller than the kernel
    is dense. Border windows shift inwards, as in neighborhood attention: every query has k*k keys, on a map that is
    shorter than k along one axis k times that axis.
    """

    def __init__(self, kernel_size: int | list[int] = 7, scales: int | list[int] = 2) -> None:
        sizes = kernel_size if isinstance(kernel_size, list) else [kernel_size]
        for size in sizes:
            if size < 1 or size % 2 == 0:
                raise UserError(f"SpatialAttention: kernel_size={size} must be odd and positive (3, 5, 7, ...)")
        if isinstance(scales, int) and scales < 1:
            raise UserError(f"SpatialAttention: scales={scales}; give how many of the last scales use the kernel")
        count = scales if isinstance(scales, int) else len(scales)
        if isinstance(kernel_size, list) and len(kernel_size) != count:
            raise UserError(f"SpatialAttention: {len(kernel_size)} kernel sizes for {count} neighborhood scales")
        self.kernel_size = kernel_size
        self.scales = scales

    def first_key_scale(self, scale: int, pyramid: ScalePyramid) -> int:
        return scale

    def kernel_size_of(self, scale: int, pyramid: ScalePyramid) -> int | None:
        return self._kernels(pyramid).get(scale)

    def check(self, pyramid: ScalePyramid) -> None:
        kernels = self._kernels(pyramid)
        outside = [scale for scale in kernels if not 0 <= scale < pyramid.num_scales]
        if outside:
            raise UserError(
                f"SpatialAttention: scales={self.scales} names scale {outside[0]}, "
                f"but the pyramid {pyramid} has scales 0 to {pyramid.num_scales - 1}"
            )
        if kernels and all(size > max(pyramid.shapes[scale]) for scale, size in kernels.items()):
            largest = max(max(pyramid.shapes[scale]) for scale in kernels)
            raise UserError(
                f"SpatialAttention: kernel_size={self.kernel_size} is larger than every map it is for "
                f"(largest side {largest} of scales {pyramid}); take an odd kernel of at most {largest}, "
                "or AdjacentAttention for dense scales"
            )

    def _kernels(self, pyramid: ScalePyramid) -> dict[int, int]:
        """Kernel size by scale index."""
        total = pyramid.num_scales
        chosen: Sequence[int] = (
            self.scales if isinstance(self.scales, list) else range(max(0, total - self.scales), total)
        )
        sizes = self.kernel_size if isinstance(self.kernel_size, list) else [self.kernel_size] * len(chosen)
        return dict(zip(chosen, sizes, strict=False))
