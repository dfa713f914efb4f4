"""A cache that keeps the keys that the current map looks at most (ScaleKV, arXiv 2505.19602).

Each layer, row and head keeps others, so what is held is told by positions. It is chosen where a scale's keys are
added, when its queries are at hand; its own queries still read everything that was held.

B batch, H heads, l tokens of one scale, S tokens of the keys, D head dim, w tokens of the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar_lightning.attention.kv_cache import KVCache, LayerCache, TakesKeys
from mvar_lightning.attention.plan import AttentionPlan
from mvar_lightning.pyramid import ScalePyramid
from mvar_lightning.tools.compute import table

WINDOW_SIDE = 4
WINDOW = WINDOW_SIDE**2
"""Tokens of the current map that always stay, and whose queries choose the others."""

POOLED = 5
"""Neighbors in the sequence of keys that share the best score among them."""


class Kept(NamedTuple):
    """Keys and values (B, H, S, D), and where in the pyramid their tokens are, int32 (B, H, S)."""

    keys: Tensor
    values: Tensor
    positions: Tensor

    def part(self, tokens: slice) -> Kept:
        return Kept(*(each[:, :, tokens] for each in self))

    def chosen(self, index_BHS: Tensor) -> Kept:
        index_BHSD = index_BHS[..., None].expand(*index_BHS.shape, self.keys.shape[-1])
        keys, values = (each.gather(2, index_BHSD) for each in self[:2])
        return Kept(keys, values, self.positions.gather(2, index_BHS))

    def joined(self, other: Kept) -> Kept:
        return Kept(*(torch.cat(pair, dim=2) for pair in zip(self, other, strict=True)))


class ScoredLayer(LayerCache):
    """Keys and values of one attention layer, of which ``sizes`` stay after each scale.

    A key's score is the sum of its products with the window's queries; neighbors share the best score among them. The
    window stays, and so many of the best others as there is room for, in the order of the sequence.
    """

    def __init__(self, plan: AttentionPlan, sizes: Sequence[int], buffers: Kept) -> None:
        self._plan, self._sizes, self._kept = plan, sizes, buffers
        self._buffers = buffers.keys, buffers.values

    def extend(self, q_BHlD: Tensor, k_BHlD: Tensor, v_BHlD: Tensor, scale: int) -> tuple[Tensor, Tensor]:
        if not self._plan.is_cached(scale):
            return k_BHlD, v_BHlD
        own = Kept(k_BHlD, v_BHlD, self._positions(range(scale, scale + 1), k_BHlD))
        held = self._sizes[scale - 1] if scale else 0
        read = self._kept.part(slice(0, held)).joined(own) if held else own
        self.keep(q_BHlD, read, scale)
        return read.keys, read.values

    def keep(self, q_BHlD: Tensor, read: Kept, scale: int) -> None:
        """Write what stays after ``scale`` of all that was read at it."""
        size, total = self._sizes[scale], read.keys.shape[2]
        first = self._plan.pyramid.offsets[self._plan.cache_start(scale + 1)] if size else 0
        if size in (total, self._plan.pyramid.offsets[scale + 1] - first):  # the last ones, and none is missing
            kept = read.part(slice(total - size, total))
        else:
            kept = read.chosen(best_keys(q_BHlD, read, size, first, self._plan.pyramid, scale))
        for buffer, new in zip(self._kept, kept, strict=True):
            buffer[:, :, :size] = new

    def filled_by(self, scales: range) -> TakesKeys:
        return _Filling(self, scales)

    def rows(self, rows: slice) -> ScoredLayer:
        return ScoredLayer(self._plan, self._sizes, Kept(*(each[rows] for each in self._kept)))

    def positions(self, scale: int) -> Tensor:
        """Where in the pyramid those tokens are that are held once ``scale`` is over, int32 (B, H, S)."""
        return self._kept.positions[:, :, : self._sizes[scale]]

    def _positions(self, scales: range, k_BHlD: Tensor) -> Tensor:
        span = self._plan.pyramid.span(scales)
        positions_l = torch.arange(span.start, span.stop, dtype=torch.int32, device=k_BHlD.device)
        return positions_l.expand(k_BHlD.shape[:3])


@dataclass
class _Filling:
    """In the place of a layer while one pass runs over the first scales; the last of them chooses."""

    layer: ScoredLayer
    scales: range

    def extend(self, q_BHlD: Tensor, k_BHlD: Tensor, v_BHlD: Tensor, scale: int) -> tuple[Tensor, Tensor]:
        read = Kept(k_BHlD, v_BHlD, self.layer._positions(self.scales, k_BHlD))
        last = self.scales.stop - 1
        self.layer.keep(q_BHlD[:, :, -self.layer._plan.pyramid.tokens_of(last) :], read, last)
        return k_BHlD, v_BHlD


class ScoredCache(KVCache):
    """One `ScoredLayer` for each attention layer.

    Args:
        sizes: tokens that each layer holds once each scale is over.
        others: as of `KVCache`.
    """

    def __init__(
        self,
        plan: AttentionPlan,
        sizes: Sequence[Sequence[int]],
        *,
        batch: int,
        heads: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
        stop: int | None = None,
    ) -> None:
        self._plan = plan
        stop = plan.pyramid.num_scales if stop is None else stop
        self._sizes = [[*of_layer[: stop - 1], 0] for of_layer in sizes]  # nothing is read after the last one
        self.layers = []
        for of_layer in self._sizes:
            shape = (batch, heads, max(of_layer))
            keys, values = (torch.empty(*shape, head_dim, device=device, dtype=dtype) for _ in range(2))
            positions = torch.empty(shape, device=device, dtype=torch.int32)
            self.layers.append(ScoredLayer(plan, of_layer, Kept(keys, values, positions)))

    def advance(self, scale: int) -> None:
        """Nothing to note: how much is held after a scale is known beforehand."""

    def fill(self, scales: range) -> None:
        """Likewise."""

    def forgets(self, scale: int) -> bool:
        if not self._plan.is_cached(scale):
            return False
        held = [of_layer[scale - 1] if scale else 0 for of_layer in self._sizes]
        own = self._plan.pyramid.tokens_of(scale)
        return any(of_layer[scale] != before + own for of_layer, before in zip(self._sizes, held, strict=True))


def best_keys(q_BHlD: Tensor, read: Kept, size: int, first: int, pyramid: ScalePyramid, scale: int) -> Tensor:
    """Which of the keys stay, int64 (B, H, size) in ascending order.

    Args:
        q_BHlD: queries of ``scale``, to whose map the last of the keys belong.
        size: fewer than there are keys of tokens from ``first`` on, the ones that may stay.
    """
    total = read.keys.shape[2]
    queries_w, window_w, others_S = _window(pyramid, scale, total, min(size, WINDOW), q_BHlD.device)
    # a sum of products is one product with the sum; a factor such as 1 / sqrt(D) would change no order
    query_BHD = q_BHlD[:, :, queries_w].sum(dim=2)
    score_BHS = (read.keys @ query_BHD[..., None])[..., 0].float()[:, :, others_S]
    gone_BHS = read.positions[:, :, others_S] < first
    score_BHS = score_BHS.masked_fill(gone_BHS, -torch.inf)
    pooled_BHS = F.max_pool1d(score_BHS, POOLED, stride=1, padding=POOLED // 2).masked_fill(gone_BHS, -torch.inf)
    best_BHS = others_S[pooled_BHS.topk(size - len(window_w), dim=-1).indices]
    window_BHw = window_w.expand(*best_BHS.shape[:2], -1)
    return torch.cat([best_BHS, window_BHw], dim=-1).sort(dim=-1).values


@table(maxsize=256)
def _window(
    pyramid: ScalePyramid, scale: int, total: int, size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The window's queries as places in the map of ``scale``, its tokens as places among ``total`` keys that end with
    that map, and the places of all others.

    The middles of 4 x 4 patches, whose side is the map's divided by 4; of maps that are smaller along an axis, or where
    fewer stay, the last tokens.
    """
    own = pyramid.tokens_of(scale)
    height, width = (pyramid.coordinates()[pyramid.slice_of(scale)].amax(dim=0) + 1).tolist()
    if min(height, width, size // WINDOW_SIDE) < WINDOW_SIDE:
        window_w = torch.arange(total - size, total)
        queries_w = torch.arange(max(0, own - size), own)
    else:
        y, x = (torch.arange(WINDOW_SIDE) * (n // WINDOW_SIDE) + n // WINDOW_SIDE // 2 for n in (height, width))
        queries_w = (y[:, None] * width + x).flatten()
        window_w = total - own + queries_w
    others = torch.ones(total, dtype=torch.bool)
    others[window_w] = False
    return queries_w.to(device), window_w.to(device), others.nonzero()[:, 0].to(device)
