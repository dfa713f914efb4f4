"""The key-value cache of sampling: an object with preallocated buffers and the strategy's own policy.

What is held follows from the plan: full attention keeps every scale, a sliding window the last n - 1,
adjacent and spatial attention nothing at all.

B batch, H heads, l tokens of one scale, S tokens held, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mvar_lightning.attention.plan import AttentionPlan


class LayerCache:
    """Keys and values of one attention layer: a buffer of (2, B, H, S, D)."""

    def __init__(self, plan: AttentionPlan, buffer: Tensor) -> None:
        self._plan = plan
        self._buffer = buffer
        self._first_scale = 0
        self._length = 0

    def extend(self, k_BHlD: Tensor, v_BHlD: Tensor, scale: int) -> tuple[Tensor, Tensor]:
        """Add the keys and values of ``scale``; return all that its queries read, as views (B, H, S, D)."""
        if not self._plan.is_cached(scale):
            return k_BHlD, v_BHlD
        self._forget_before(self._plan.cache_start(scale))
        end = self._length + k_BHlD.shape[2]
        self._buffer[0, :, :, self._length : end] = k_BHlD
        self._buffer[1, :, :, self._length : end] = v_BHlD
        self._length = end
        keys = self._plan.keys_of(scale)
        held = self._buffer[:, :, :, end - (keys.stop - keys.start) : end]
        return held[0], held[1]

    def keep_batch(self, batch: int) -> None:
        """Hold only the first ``batch`` rows from now on (guidance has been switched off)."""
        self._buffer = self._buffer[:, :batch]

    def _forget_before(self, scale: int) -> None:
        offsets = self._plan.pyramid.offsets
        dropped = min(self._length, offsets[scale] - offsets[self._first_scale])
        if dropped <= 0:
            self._first_scale = max(self._first_scale, scale)
            return
        kept = self._length - dropped
        # clone: source and target overlap where more is kept than dropped
        self._buffer[:, :, :, :kept] = self._buffer[:, :, :, dropped : self._length].clone()
        self._first_scale, self._length = scale, kept


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
        self.layers = [LayerCache(plan, torch.empty(shape, device=device, dtype=dtype)) for _ in range(layers)]

    def keep_batch(self, batch: int) -> None:
        for layer in self.layers:
            layer.keep_batch(batch)
