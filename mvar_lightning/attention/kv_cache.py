"""The key-value cache of sampling: an object with preallocated buffers and the strategy's own policy.

What is held follows from the plan: full attention keeps every scale, a sliding window the last n - 1,
adjacent and spatial attention nothing at all.

B batch, H heads, l tokens of one scale, S tokens held, D head dim.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from mvar_lightning.attention.plan import AttentionPlan


@dataclass
class Held:
    """Which part of the buffers is in use, the same in all layers: scales from ``first_scale`` on, in ``tokens``."""

    first_scale: int = 0
    tokens: int = 0


class LayerCache:
    """Keys and values of one attention layer: a buffer of (2, B, H, S, D)."""

    def __init__(self, plan: AttentionPlan, buffer: Tensor, held: Held) -> None:
        self._plan = plan
        self._buffer = buffer
        self._held = held

    def extend(self, k_BHlD: Tensor, v_BHlD: Tensor, scale: int) -> tuple[Tensor, Tensor]:
        """Add the keys and values of ``scale``; return all that its queries read, as views (B, H, S, D).

        `KVCache.advance` ends the scale: until then other layers and other rows add theirs at the same place.
        """
        if not self._plan.is_cached(scale):
            return k_BHlD, v_BHlD
        dropped, kept = _forgotten(self._plan, self._held, scale)
        if dropped:
            # clone: source and target overlap where more is kept than dropped
            self._buffer[:, :, :, :kept] = self._buffer[:, :, :, dropped : dropped + kept].clone()
        end = kept + k_BHlD.shape[2]
        self._buffer[0, :, :, kept:end] = k_BHlD
        self._buffer[1, :, :, kept:end] = v_BHlD
        keys = self._plan.keys_of(scale)
        read = self._buffer[:, :, :, end - (keys.stop - keys.start) : end]
        return read[0], read[1]

    def rows(self, rows: slice) -> LayerCache:
        """A view of some rows."""
        return LayerCache(self._plan, self._buffer[:, rows], self._held)


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
    ) -> None:
        shape = (2, batch, heads, plan.cache_tokens, head_dim)
        self._plan = plan
        self._held = Held()
        buffers = [torch.empty(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.layers = [LayerCache(plan, buffer, self._held) for buffer in buffers]

    def advance(self, scale: int) -> None:
        """All layers and rows have added ``scale``."""
        if self._plan.is_cached(scale):
            _, kept = _forgotten(self._plan, self._held, scale)
            first = max(self._held.first_scale, self._plan.cache_start(scale))
            self._held.first_scale, self._held.tokens = first, kept + self._plan.pyramid.tokens_of(scale)

    def rows(self, rows: slice) -> KVCache:
        """A view of some rows: what they add is added here."""
        view = copy(self)
        view.layers = [layer.rows(rows) for layer in self.layers]
        return view
