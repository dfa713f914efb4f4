"""Neighborhoods on a square map: every query reads a k x k window, shifted inwards at the borders.

The rule is that of neighborhood attention (Hassani et al., arXiv 2204.07143): the window is centered on the
query where it fits, and else moved just far enough to stay on the map, so every query has exactly k*k keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


def window_starts(side: int, kernel_size: int) -> Tensor:
    """First coordinate of the window of each of ``side`` positions, int64 of shape (side,)."""
    assert 1 <= kernel_size <= side
    centered = torch.arange(side) - kernel_size // 2
    return centered.clamp(0, side - kernel_size)


def neighborhood_mask(side: int, kernel_size: int) -> Tensor:
    """Boolean (side^2, side^2): True where key (column) lies in the window of query (row)."""
    start = window_starts(side, kernel_size)
    position = torch.arange(side)
    near = (position[None, :] >= start[:, None]) & (position[None, :] < start[:, None] + kernel_size)
    return (near[:, None, :, None] & near[None, :, None, :]).reshape(side**2, side**2)
