"""What a strategy comes to on one pyramid: for each query scale, a contiguous range of keys.

Contiguous ranges are the point: a scale's queries then need one plain attention call on a slice,
never an L x L mask, and flash kernels stay usable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mvar_lightning.pyramid import ScalePyramid


@dataclass(frozen=True)
class ScaleRead:
    """What the queries of one scale read.

    Attributes:
        scale: index of the query scale.
        shape: height and width of its map.
        first_key_scale: keys are all tokens of scales ``first_key_scale .. scale``.
        kernel_size: if set, a query reads only a kernel x kernel neighborhood of its own scale
            (and no other scale); windows at a border shift inwards.
    """

    scale: int
    shape: tuple[int, int]
    first_key_scale: int
    kernel_size: int | None = None

    @property
    def window(self) -> tuple[int, int]:
        """Height and width of what a query reads of its own map: the kernel, along an axis shorter than it the map."""
        height, width = self.shape
        kernel_size = max(self.shape) if self.kernel_size is None else self.kernel_size
        return min(kernel_size, height), min(kernel_size, width)


@dataclass(frozen=True)
class AttentionPlan:
    """One `ScaleRead` for every scale of a pyramid."""

    pyramid: ScalePyramid
    reads: tuple[ScaleRead, ...]

    @property
    def crosses_scales(self) -> bool:
        """Whether any query reads keys of an earlier scale (then scales cannot be run one by one)."""
        return any(read.first_key_scale < read.scale for read in self.reads)

    @property
    def num_pairs(self) -> int:
        """Query-key pairs of the whole pyramid: the cost of attention, in units of one dot product."""
        return sum(self._pairs_of(read) for read in self.reads)

    def keys_of(self, scale: int) -> slice:
        """Tokens of the pyramid that queries of ``scale`` may read."""
        return self.pyramid.span(range(self.reads[scale].first_key_scale, scale + 1))

    def cache_start(self, scale: int) -> int:
        """First scale whose keys must still be held once ``scale`` begins.

        The smallest first key scale of this and every later scale: what is before it is never read again.
        """
        return min(read.first_key_scale for read in self.reads[scale:])

    def is_cached(self, scale: int) -> bool:
        """Whether the keys of ``scale`` go through a cache: it reads earlier ones, or a later scale reads its own."""
        last = scale + 1 == self.pyramid.num_scales
        return self.reads[scale].first_key_scale < scale or (not last and self.cache_start(scale + 1) <= scale)

    @property
    def cache_tokens(self) -> int:
        """Most tokens a key-value cache has to hold at a time; 0 where no scale reads an earlier one."""
        return self.cache_tokens_until(self.pyramid.num_scales)

    def cache_tokens_until(self, stop: int) -> int:
        """The same where only scales before ``stop`` are drawn."""
        cached = [read.scale for read in self.reads[:stop] if self.is_cached(read.scale)]
        spans = [self.pyramid.span(range(self.cache_start(scale), scale + 1)) for scale in cached]
        return max((span.stop - span.start for span in spans), default=0)

    def _pairs_of(self, read: ScaleRead) -> int:
        queries = self.pyramid.tokens_of(read.scale)
        if read.kernel_size is not None:
            return queries * math.prod(read.window)
        keys = self.keys_of(read.scale)
        return queries * (keys.stop - keys.start)
