"""Resizing between the maps of the pyramid as two small matrix products.

Area averaging and bicubic interpolation are linear and separable, so a square map changes its side by one matrix
applied to its rows and columns. The matrices are read off ``F.interpolate`` itself, and working channel-last spares
the permutations between token rows and maps.

Shapes: B batch, s source side, t target side, Z code dim.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@lru_cache(maxsize=256)
def resize_matrix(source: int, target: int, mode: str, device: torch.device) -> Tensor:
    """The (target, source) float32 matrix of ``F.interpolate(..., mode=mode)`` along one dimension.

    Cached by device rather than kept as a module's buffer: it holds no state, and a module built on the meta device
    must not lose it. Made outside inference mode, so that training may use a matrix that sampling made first.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        basis = torch.eye(source).reshape(source, 1, source, 1)
        matrix = F.interpolate(basis, size=(target, 1), mode=mode).reshape(source, target).t().contiguous()
        return matrix.to(device)


def resize(map_BssZ: Tensor, target: int, mode: str) -> Tensor:
    """(B, s, s, Z) -> (B, t, t, Z), equal to ``F.interpolate`` on the channel-first map."""
    B, source, _, Z = map_BssZ.shape
    if source == target:
        return map_BssZ
    matrix_ts = resize_matrix(source, target, mode, map_BssZ.device)
    rows = torch.matmul(matrix_ts, map_BssZ.reshape(B, source, source * Z))
    return torch.matmul(matrix_ts, rows.reshape(B * target, source, Z)).reshape(B, target, target, Z)
