"""What tells the transformer where a token sits: learnt positions (VAR, MVAR) or levels alone (Markov-VAR).

L tokens of the pyramid, l tokens of the scales at hand, K scales, C width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mvar_lightning.pyramid import ScalePyramid


class LearnedPositions(nn.Module):
    """A learnt vector for every token and every level, and for the first scale a start vector (VAR)."""

    def __init__(self, pyramid: ScalePyramid, width: int) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.start = nn.Parameter(torch.empty(1, pyramid.first_tokens, width))
        self.token = nn.Parameter(torch.empty(1, pyramid.num_tokens, width))
        self.level = nn.Embedding(pyramid.num_scales, width)

    def forward(self, scales: range) -> Tensor:
        """Positions of the tokens of ``scales``, (1, l, C)."""
        counts = [self.pyramid.tokens_of(scale) for scale in scales]
        levels = [self.level.weight[scale].expand(n, -1) for scale, n in zip(scales, counts, strict=True)]
        positions = self.token[:, self.pyramid.span(scales)] + torch.cat(levels)
        if scales.start == 0:
            first = self.pyramid.first_tokens
            return torch.cat([positions[:, :first] + self.start, positions[:, first:]], dim=1)
        return positions


def _sinusoids(scales: range, half: int, device: torch.device) -> Tensor:
    """Cosines and sines of the levels, float32 (K, 2 half); made on the device: a copy would make it wait."""
    rates = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=device) / half)
    levels_K1 = torch.arange(scales.start, scales.stop, dtype=torch.float32, device=device)[:, None]
    return torch.cat([(levels_K1 * rates).cos(), (levels_K1 * rates).sin()], dim=-1)


class LevelMLP(nn.Module):
    """Sinusoid of the level through a two-layer MLP, the same for all tokens of a scale (Markov-VAR).

    Where in its map a token sits is told by rotary positions inside attention.
    """

    frequencies = 256

    def __init__(self, pyramid: ScalePyramid, width: int) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.up = nn.Linear(self.frequencies, width)
        self.down = nn.Linear(width, width)

    def forward(self, scales: range) -> Tensor:
        """Level embeddings of the tokens of ``scales``, (1, l, C)."""
        sinusoid_K = _sinusoids(scales, self.frequencies // 2, self.up.weight.device).to(self.up.weight.dtype)
        level_KC = self.down(nn.functional.silu(self.up(sinusoid_K)))
        counts = [self.pyramid.tokens_of(scale) for scale in scales]
        return torch.cat([row.expand(n, -1) for row, n in zip(level_KC, counts, strict=True)])[None]
