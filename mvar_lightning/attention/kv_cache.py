"""The key-value cache of sampling: an object with preallocated buffers and the strategy's own policy.

What is held follows from the plan: full attention keeps every scale, a sliding window the last n - 1,
adjacent and spatial attention nothing at all.

B batch, H heads, l tokens of one scale, S tokens held, D head dim.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mvar_lightning.attention.plan import AttentionPlan


class TakesKeys(Protocol):
    """A `LayerCache`, or what stands in its place while a cache is filled."""

    def extend(self, q_BHlD: Tensor, k_BHlD: Tensor, v_BHlD: Tensor, scale: int) -> tuple[Tensor, Tensor]: ...


@dataclass
class Held:
    """Which part of the buffers is in use, the same in all layers: scales from ``first_scale`` on, in ``tokens``."""

    first_scale: int = 0
    tokens: int = 0


class LayerCache:
    """Keys and values of one attention layer: buffers of (B, H, S, D).

    Two of them, not one for both: into halves of a common buffer a compiled block would write by copying all of it.
    """

    def __init__(self, plan: AttentionPlan, keys_BHSD: Tensor, values_BHSD: Tensor, held: Held) -> None:
        self._plan = plan
        self._buffers = keys_BHSD, values_BHSD
        self._held = held

    def extend(self, q_BHlD: Tensor, k_BHlD: Tensor, v_BHlD: Tensor, scale: int) -> tuple[Tensor, Tensor]:
        """Add the keys and values of ``scale``; return all that its queries read, as views (B, H, S, D).

        The queries are for layers that choose by them what they keep (`ScoredLayer`). `KVCache.advance` ends the scale:
        until then other layers and other rows add theirs at the same tokens.
        """
        if not self._plan.is_cached(scale):
            return k_BHlD, v_BHlD
        dropped, kept = _forgotten(self._plan, self._held, scale)
        end, keys = kept + k_BHlD.shape[2], self._plan.keys_of(scale)
        first = end - (keys.stop - keys.start)
        for buffer_BHSD, new_BHlD in zip(self._buffers, (k_BHlD, v_BHlD), strict=True):
            if dropped:
                # clone: source and target overlap where more is kept than dropped
                buffer_BHSD[:, :, :kept] = buffer_BHSD[:, :, dropped : dropped + kept].clone()
            buffer_BHSD[:, :, kept:end] = new_BHlD
        read_k, read_v = (buffer_BHSD[:, :, first:end] for buffer_BHSD in self._buffers)
        return read_k, read_v

    def filled_by(self, scales: range) -> TakesKeys:
        """Takes the keys and values of the first ``scales`` at once; `KVCache.fill` ends it."""
        kept = self._plan.pyramid.span(range(self._plan.cache_start(scales.stop), scales.stop))
        return _Filling(self._buffers, kept)

    @property
    def nbytes(self) -> int:
        """Memory of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def rows(self, rows: slice) -> LayerCache:
        """A view of some rows."""
        keys_BHSD, values_BHSD = self._buffers
        return LayerCache(self._plan, keys_BHSD[rows], values_BHSD[rows], self._held)


@dataclass
class _Filling:
    """In the place of a `LayerCache` while one pass runs over the first scales: what later ones read is ``kept``."""

    buffers: tuple[Tensor, Tensor]
    kept: slice

    def extend(self, q_BHlD: Tensor, k_BHlD: Tensor, v_BHlD: Tensor, scale: int) -> tuple[Tensor, Tensor]:
        """Keep what is read later; the pass itself reads all as it comes."""
        for buffer_BHSD, new_BHlD in zip(self.buffers, (k_BHlD, v_BHlD), strict=True):
            buffer_BHSD[:, :, : self.kept.stop - self.kept.start] = new_BHlD[:, :, self.kept]
        return k_BHlD, v_BHlD


def _forgotten(plan: AttentionPlan, held: Held, scale: int) -> tuple[int, int]:
    """Tokens that are not read from ``scale`` on, and those that stay."""
    offsets = plan.pyramid.offsets
    first = max(held.first_scale, plan.cache_start(scale))
    dropped = min(held.tokens, offsets[first] - offsets[held.first_scale])
    return dropped, held.tokens - dropped


class KVCache:
    """One `LayerCache` for each attention layer.

    Args:
        plan: decides how many tokens have to be held (`AttentionPlan.cache_tokens`).
        stop: scales before it alone are drawn; None is all of them.
        layers, batch, heads, head_dim: shape of the model that samples.
        device, dtype: of the keys and values.
    """

    def __init__(
        self,
        plan: AttentionPlan,
        *,
        layers: int,
        batch: int,
        heads: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
        stop: int | None = None,
    ) -> None:
        tokens = plan.cache_tokens if stop is None else plan.cache_tokens_until(stop)
        shape = (batch, heads, tokens, head_dim)
        self._plan = plan
        self._held = Held()
        keys, values = ([torch.empty(shape, device=device, dtype=dtype) for _ in range(layers)] for _ in range(2))
        self.layers = [LayerCache(plan, *buffers, self._held) for buffers in zip(keys, values, strict=True)]

    @property
    def nbytes(self) -> int:
        """Memory of all buffers: what is held from one scale to the next has room in them."""
        return sum(layer.nbytes for layer in self.layers)

    def advance(self, scale: int) -> None:
        """All layers and rows have added ``scale``."""
        if self._plan.is_cached(scale):
            _, kept = _forgotten(self._plan, self._held, scale)
            first = max(self._held.first_scale, self._plan.cache_start(scale))
            self._held.first_scale, self._held.tokens = first, kept + self._plan.pyramid.tokens_of(scale)

    def fill(self, scales: range) -> None:
        """All layers and rows hold what is read of the first ``scales`` (`LayerCache.filled_by`)."""
        first = self._plan.cache_start(scales.stop)
        kept = self._plan.pyramid.span(range(first, scales.stop))
        self._held.first_scale, self._held.tokens = first, kept.stop - kept.start

    def forgets(self, scale: int) -> bool:
        """Whether adding ``scale`` moves what is kept: then no rows may add theirs twice."""
        return self._plan.is_cached(scale) and _forgotten(self._plan, self._held, scale)[0] > 0

    def rows(self, rows: slice) -> KVCache:
        """A view of some rows: what they add is added here."""
        view = copy(self)
        view.layers = [layer.rows(rows) for layer in self.layers]
        return view
