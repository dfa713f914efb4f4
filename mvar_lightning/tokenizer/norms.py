"""Normalization that mixed precision leaves in float32.

Shapes: B batch, C channels, any positions after them.
"""

from __future__ import annotations

from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """Group normalization in the precision of its parameters, whatever autocast says.

    On a GPU autocast keeps group norms in float32 itself; on a CPU they compute in what they are given, and a
    convolution before them gives bfloat16.
    """

    def forward(self, x_BC: Tensor) -> Tensor:
        return super().forward(x_BC.to(self.weight.dtype))
