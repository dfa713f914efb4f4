"""Two-dimensional rotary positions over a token pyramid (Markov-VAR's `LlamaRotaryEmbedding`).

Position i of a map with side n sits at i / n * n_max: all maps share the coordinates of the largest.

B batch, L tokens of the pyramid, l tokens of the scales at hand, n vectors of a token and head, H heads, D head dim.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mvar_lightning.pyramid import ScalePyramid


class PyramidRotation:
    """Rotates queries and keys by their (y, x) in the pyramid.

    Args:
        pyramid: where the tokens sit.
        theta: base of the frequencies.
        pair_within_axis: which two channels turn together. The released models pair channel i with channel
            i + D/2 while the first half of the channels carries the angle of y and the second half that of x, so
            a pair mixes both angles and the map is no rotation (False, the published behavior). True pairs
            channels of one axis: then scores depend on relative positions alone.
    """

    def __init__(self, pyramid: ScalePyramid, theta: float = 1e4, *, pair_within_axis: bool = False) -> None:
        self.pyramid = pyramid
        self.theta = theta
        self.parts = 4 if pair_within_axis else 2

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


@torch.compiler.assume_constant_result
def _angles(
    pyramid: ScalePyramid, theta: float, head_dim: int, parts: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`_cached_angles`, which a compiler takes as they are instead of tracing how they are made."""
    return _cached_angles(pyramid, theta, head_dim, parts, device)


@lru_cache(maxsize=16)
def _cached_angles(
    pyramid: ScalePyramid, theta: float, head_dim: int, parts: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of every token's angles, float32 (L, D).

    y is in the first half of the channels, x in the second; the sine is negative in every other of ``parts`` chunks.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        sides_L1 = torch.tensor(pyramid.sides)[pyramid.scale_of_tokens()][:, None]
        position_L2 = pyramid.coordinates() / sides_L1 * pyramid.last_side
        frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 4).float() / head_dim)
        angles_L2F = position_L2[:, :, None] * frequencies
        angles_LD = torch.cat([angles_L2F, angles_L2F], dim=-1).flatten(1)
        sign_D = torch.tensor([-1.0, 1.0]).repeat(parts // 2).repeat_interleave(head_dim // parts)
        return angles_LD.cos().to(device), (angles_LD.sin() * sign_D).to(device)
