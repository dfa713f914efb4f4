"""Nearest-code search in bounded memory.

The argument of the minimum of |z - e|^2 over e does not depend on |z|^2, so one matrix product a chunk of rows gives
the scores. A chunk is small enough to stay in cache on a CPU. The minimum is found in two stages, because a plain
minimum runs over contiguous scores several times faster than an argmin: first the block of codes that holds it, then
the place inside that one block. Ties go to the lowest index, as with argmin.

Shapes: N rows, n rows of a chunk, V vocabulary (padded to whole blocks), Z code dim, b blocks, S size of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
SCORES_PER_CHUNK = {"cpu": 2**19}
SCORES_PER_CHUNK_ACCELERATOR = 2**26


class NearestCode:
    """Search in one state of a codebook: prepared once, asked at every scale.

    Args:
        codebook_VZ: the codes, float32; not differentiated through.
    """

    def __init__(self, codebook_VZ: Tensor) -> None:
        codebook_VZ = codebook_VZ.detach()
        self.vocab_size = codebook_VZ.shape[0]
        padding = -self.vocab_size % BLOCK
        self.bias_V = F.pad(codebook_VZ.square().sum(dim=1), (0, padding), value=torch.inf)
        self.weight_ZV = F.pad(-2.0 * codebook_VZ, (0, 0, 0, padding)).t().contiguous()
        scores = SCORES_PER_CHUNK.get(codebook_VZ.device.type, SCORES_PER_CHUNK_ACCELERATOR)
        self.rows_per_chunk = max(1, scores // self.bias_V.numel())

    @torch.no_grad()
    def __call__(self, rows_NZ: Tensor) -> Tensor:
        """Index of the nearest code (Euclidean) of every row, int64 of shape (N,)."""
        chunks = rows_NZ.detach().split(self.rows_per_chunk)
        return torch.cat([self._search(chunk_nZ) for chunk_nZ in chunks])

    def _search(self, rows_nZ: Tensor) -> Tensor:
        scores_nbS = torch.addmm(self.bias_V, rows_nZ, self.weight_ZV).unflatten(1, (-1, BLOCK))
        block_n = scores_nbS.amin(dim=2).argmin(dim=1)
        scores_nS = scores_nbS[torch.arange(len(block_n), device=block_n.device), block_n]
        # A row that is not finite may end in the padding: keep the index valid, the loss will tell.
        return (block_n * BLOCK + scores_nS.argmin(dim=1)).clamp_max_(self.vocab_size - 1)
