"""The parts a block is made of: attention, MLPs, norms, AdaLN modulation, stochastic depth.

B batch, l tokens of the scales at hand, C width, H heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar_lightning.attention import AttentionBackend, LayerCache

MAX_LOG_SCALE = math.log(100.0)

Rotation = Callable[[Tensor, range], Tensor]
"""Rotates queries or keys (B, H, l, D) of a range of scales by their positions."""


class SelfAttention(nn.Module):
    """Multi-head attention with l2-normalized queries and keys (VAR's `SelfAttention`).

    Which keys a query sees is the backend's business; this module has no branch on it. Queries carry a learnt
    scale per head, exp(min(log_scale, log 100)), from 4. Keys have no bias.
    """

    def __init__(
        self, width: int, heads: int, backend: AttentionBackend, *, qk_norm: bool, rotation: Rotation | None = None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.backend = backend
        self.rotation = rotation
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        # without the norm VAR divides the usual 1 / sqrt(D) by four
        self.softmax_scale = 1.0 if qk_norm else 0.25 / math.sqrt(width // heads)
        self.log_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(4.0))) if qk_norm else None

    def forward(self, x_BlC: Tensor, scales: range, cache: LayerCache | None = None) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x_BlC, self.qkv.weight, bias).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # three of (B, H, l, D)
        if self.log_scale is not None:
            # in float32: half precision overflows here (NaN in fp16)
            q = F.normalize(q.float(), dim=-1) * self.log_scale.clamp_max(MAX_LOG_SCALE).exp()
            k = F.normalize(k.float(), dim=-1)
        if self.rotation is not None:
            q, k = self.rotation(q, scales), self.rotation(k, scales)
        q, k = q.to(v.dtype), k.to(v.dtype)
        if cache is not None:
            k, v = cache.extend(k, v, scales.start)
        out = self.backend(q, k, v, scales, self.softmax_scale)
        return self.proj(out.transpose(1, 2).flatten(2))


class GeluMLP(nn.Module):
    """Linear, tanh-approximated GELU, Linear (VAR's `FFN`)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x_BlC: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BlC), approximate="tanh"))


class SwiGLU(nn.Module):
    """silu(gate(x)) * up(x), then down; no biases (Markov-VAR's `LlamaMLP`)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BlC: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BlC)) * self.up(x_BlC))


class Modulation(nn.Module):
    """AdaLN: the condition's linear image, ``parts`` rows of width C: (B, C) -> (B, 1, parts, C)."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)

    def forward(self, condition_BC: Tensor) -> Tensor:
        return self.linear(F.silu(condition_BC)).unflatten(1, (1, self.parts, -1))


class ModulationOffset(nn.Module):
    """A block's own learnt offset to a modulation that all blocks share (VAR d36)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)

    def forward(self, shared_B16C: Tensor) -> Tensor:
        return self.offset + shared_B16C


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch for whole samples, in training only."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x_BlC: Tensor) -> Tensor:
        if not self.training or self.probability == 0.0:
            return x_BlC
        keep = 1.0 - self.probability
        return x_BlC * x_BlC.new_empty(x_BlC.shape[0], 1, 1).bernoulli_(keep).div_(keep)


class ModulatedHead(nn.Module):
    """AdaLN norm and linear classifier, computed from float32 (VAR's `AdaLNBeforeHead` and `head`)."""

    def __init__(self, width: int, vocab_size: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.modulation = Modulation(width, parts=2)
        self.linear = nn.Linear(width, vocab_size)

    def forward(self, x_BlC: Tensor, modulation_B12C: Tensor) -> Tensor:
        scale, shift = modulation_B12C.unbind(2)
        h_BlC = self.norm(x_BlC.float()) * (1 + scale) + shift
        return self.linear(h_BlC.to(self.linear.weight.dtype)).float()
