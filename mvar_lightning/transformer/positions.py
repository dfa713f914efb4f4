"""What tells the transformer where a token sits: learnt positions (VAR, MVAR), or rotary ones and levels (Markov-VAR).

B batch, L tokens of the pyramid, l tokens of the scales at hand, K scales, n vectors of a token and head, C width,
H heads, D head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mvar_lightning.pyramid import ScalePyramid
from mvar_lightning.tools.compute import table


class PyramidRotation:
    """Rotates queries and keys by their (y, x) in the pyramid (Markov-VAR's `LlamaRotaryEmbedding`).

    Position i of a map with n rows (or columns) sits at i / n * n_max: all maps share the coordinates of the largest.

    Args:
        pyramid: where the tokens sit.
        theta: base of the frequencies.
        pair_within_axis: which two channels turn together. The released models pair channel i with channel
            i + D/2 while the first half of the channels carries the angle of y and the second half that of x, so
            a pair mixes both angles and the map is no rotation (False, the published behavior). True pairs
            channels of one axis: then scores depend on relative positions alone.
    """

    def __init__(self, pyramid: ScalePyramid, theta: float = 1e4, *, pair_within_axis: bool = False) -> None:
        self.pyramid, self.theta, self.parts = pyramid, theta, 4 if pair_within_axis else 2

    def __call__(self, x_BlnHD: Tensor, scales: range) -> Tensor:
        """Tokens' vectors (B, l, n, H, D), n and H of any size, turned; float32."""
        span = self.pyramid.span(scales)
        cos_LD, sin_LD = _angles(self.pyramid, self.theta, x_BlnHD.shape[-1], self.parts, x_BlnHD.device)
        cos_l11D, sin_l11D = cos_LD[span, None, None], sin_LD[span, None, None]
        x = x_BlnHD.float()
        chunks = x.chunk(self.parts, dim=-1)
        # (a, b) -> (b, a) for each pair of chunks; the sine brings the sign of (-b, a)
        swapped = torch.cat([part for a, b in zip(chunks[::2], chunks[1::2], strict=True) for part in (b, a)], dim=-1)
        return torch.addcmul(x * cos_l11D, swapped, sin_l11D)


@table(maxsize=16)
def _angles(pyramid: ScalePyramid, theta: float, D: int, parts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of every token's angles, float32 (L, D).

    y is in the first half of the channels, x in the second; the sine is negative in every other of ``parts`` chunks.
    """
    shape_L2 = torch.tensor(pyramid.shapes)[pyramid.scale_of_tokens()]
    position_L2 = pyramid.coordinates() / shape_L2 * torch.tensor(pyramid.last_shape)
    frequencies = 1.0 / theta ** (torch.arange(0, D, 4).float() / D)
    angles_L2F = position_L2[:, :, None] * frequencies
    angles_LD = torch.cat([angles_L2F, angles_L2F], dim=-1).flatten(1)
    sign_D = torch.tensor([-1.0, 1.0]).repeat(parts // 2).repeat_interleave(D // parts)
    return angles_LD.cos().to(device), (angles_LD.sin() * sign_D).to(device)


class LearnedPositions(nn.Module):
    """A learnt vector for every token and every level, and for the first scale a start vector (VAR)."""

    def __init__(self, pyramid: ScalePyramid, width: int) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.start = nn.Parameter(torch.empty(1, pyramid.first_tokens, width))
        self.token = nn.Parameter(torch.empty(1, pyramid.num_tokens, width))
        self.level = nn.Embedding(pyramid.num_scales, width)

    def init_weights(self, std: float) -> None:
        nn.init.trunc_normal_(self.start, std=std)
        nn.init.trunc_normal_(self.token, std=std)

    def no_weight_decay(self) -> set[str]:
        return {"start", "token", "level.weight"}

    def forward(self, scales: range) -> Tensor:
        """Positions of the tokens of ``scales``, (1, l, C)."""
        counts = [self.pyramid.tokens_of(scale) for scale in scales]
        levels = [self.level.weight[scale].expand(n, -1) for scale, n in zip(scales, counts, strict=True)]
        positions = self.token[:, self.pyramid.span(scales)] + torch.cat(levels)
        if scales.start > 0:
            return positions
        first = self.pyramid.first_tokens
        return torch.cat([positions[:, :first] + self.start, positions[:, first:]], dim=1)


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

    def no_weight_decay(self) -> set[str]:
        return {"up.weight", "down.weight"}  # the release matches `lvl_embed` by name, so its MLP does not decay

    def forward(self, scales: range) -> Tensor:
        """Level embeddings of the tokens of ``scales``, (1, l, C)."""
        half, weight = self.frequencies // 2, self.up.weight
        # made on the device: a copy would make it wait
        rates = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=weight.device) / half)
        levels_K1 = torch.arange(scales.start, scales.stop, dtype=torch.float32, device=weight.device)[:, None]
        sinusoid_KF = torch.cat([(levels_K1 * rates).cos(), (levels_K1 * rates).sin()], dim=-1)
        level_KC = self.down(nn.functional.silu(self.up(sinusoid_KF.to(weight.dtype))))
        counts = [self.pyramid.tokens_of(scale) for scale in scales]
        return torch.cat([row.expand(n, -1) for row, n in zip(level_KC, counts, strict=True)])[None]
