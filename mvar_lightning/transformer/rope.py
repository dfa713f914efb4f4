"""Two-dimensional rotary positions over a token pyramid (Markov-VAR's `LlamaRotaryEmbedding`).

Position i of a map with side n sits at i / n * n_max: all maps share the coordinates of the largest.

L tokens of the pyramid, l tokens of the scales at hand, D head dim.
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

    def __call__(self, x_BHlD: Tensor, scales: range) -> Tensor:
        span = self.pyramid.span(scales)
        cos_LD, sin_LD = _angles(self.pyramid, self.theta, x_BHlD.shape[-1], x_BHlD.device)
        x = x_BHlD.float()
        chunks = x.chunk(self.parts, dim=-1)
        # (a, b) -> (-b, a) for each pair of chunks
        turned = torch.cat([part for a, b in zip(chunks[::2], chunks[1::2], strict=True) for part in (-b, a)], dim=-1)
        return x * cos_LD[span] + turned * sin_LD[span]


@lru_cache(maxsize=16)
def _angles(pyramid: ScalePyramid, theta: float, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's angles, float32 (L, D): y in the first half of the channels, x in the second."""
    with torch.inference_mode(False), torch.device("cpu"):
        sides_L1 = torch.tensor(pyramid.sides)[pyramid.scale_of_tokens()][:, None]
        position_L2 = pyramid.coordinates() / sides_L1 * pyramid.last_side
        frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 4).float() / head_dim)
        angles_L2F = position_L2[:, :, None] * frequencies
        angles_LD = torch.cat([angles_L2F, angles_L2F], dim=-1).flatten(1)
        return angles_LD.cos().to(device), angles_LD.sin().to(device)
