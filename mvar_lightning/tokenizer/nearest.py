"""Which code is nearest to a row, and the search for it in bounded memory.

What "nearest" means is an object (``CodeMetric``): a bias for each code plus one matrix product, smallest score wins.
The argument of the minimum of |z - e|^2 over e does not depend on |z|^2, that of the angle between z and e not on |z|,
so one matrix product a chunk of rows gives the scores. A chunk is small enough to stay in cache on a CPU. The minimum
is found in two stages, because a plain minimum runs over contiguous scores several times faster than an argmin: first
the block of codes that holds it, then the code inside that one block. Ties go to the lowest index, as with argmin.

Shapes: N rows, n rows of a chunk, V vocabulary (padded to whole blocks), Z code dim, b blocks, S size of a block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar_lightning.errors import UserError
from mvar_lightning.tools.compute import exact_float32

BLOCK = 64
SCORES_PER_CHUNK, SCORES_PER_CHUNK_ACCELERATOR = 2**19, 2**26
SHORTEST = 1e-4
"""Length below which a vector has no direction: gradients of normalizing it would be out of bounds."""


class CodeMetric(ABC):
    """What nearest means: the code with the smallest ``bias_V + rows_NZ @ weight_VZ.T``, up to a term of the row."""

    @abstractmethod
    def scores(self, codebook_VZ: Tensor) -> tuple[Tensor, Tensor]:
        """``bias_V`` and ``weight_VZ`` of a codebook, differentiable."""

    @abstractmethod
    def prepare(self, rows_NZ: Tensor) -> Tensor:
        """Rows whose scores compare between rows too (the search itself takes any), differentiable."""


class EuclideanCodes(CodeMetric):
    """The smallest distance: |e|^2 - 2 z e."""

    def scores(self, codebook_VZ: Tensor) -> tuple[Tensor, Tensor]:
        return codebook_VZ.square().sum(dim=1), -2.0 * codebook_VZ

    def prepare(self, rows_NZ: Tensor) -> Tensor:
        return rows_NZ


class CosineCodes(CodeMetric):
    """The smallest angle: - z e / |e| (the reference's ``using_znorm``); the code added is not normalized."""

    def scores(self, codebook_VZ: Tensor) -> tuple[Tensor, Tensor]:
        return codebook_VZ.new_zeros(len(codebook_VZ)), -2.0 * F.normalize(codebook_VZ, dim=1, eps=SHORTEST)

    def prepare(self, rows_NZ: Tensor) -> Tensor:
        return F.normalize(rows_NZ, dim=1, eps=SHORTEST)


METRICS: dict[str, CodeMetric] = {"euclidean": EuclideanCodes(), "cosine": CosineCodes()}


def code_metric(name: str) -> CodeMetric:
    """The metric of that name. Raises UserError where there is none."""
    if name not in METRICS:
        raise UserError(f"codes {name!r}: unknown; choose one of {', '.join(METRICS)}")
    return METRICS[name]


class NearestCode:
    """Search in one state of a codebook: prepared once, asked at every scale.

    Args:
        codebook_VZ: the codes, float32; not differentiated through.
        metric: what nearest means.
    """

    def __init__(self, codebook_VZ: Tensor, metric: CodeMetric = METRICS["euclidean"]) -> None:
        codebook_VZ = codebook_VZ.detach()
        bias_V, weight_VZ = metric.scores(codebook_VZ)
        self.vocab_size = codebook_VZ.shape[0]
        padding = -self.vocab_size % BLOCK
        self.bias_V = F.pad(bias_V, (0, padding), value=torch.inf)
        self.weight_ZV = F.pad(weight_VZ, (0, 0, 0, padding)).t().contiguous()
        scores = SCORES_PER_CHUNK if codebook_VZ.device.type == "cpu" else SCORES_PER_CHUNK_ACCELERATOR
        self.rows_per_chunk = max(1, scores // self.bias_V.numel())

    @torch.no_grad()
    def __call__(self, rows_NZ: Tensor) -> Tensor:
        """Index of the nearest code of every row, int64 of shape (N,)."""
        exporting = torch.compiler.is_exporting()  # how many chunks there are would hang on the batch
        chunks = [rows_NZ] if exporting else rows_NZ.detach().split(self.rows_per_chunk)
        with exact_float32(rows_NZ.device):
            return torch.cat([self._search(chunk_nZ) for chunk_nZ in chunks])

    def _search(self, rows_nZ: Tensor) -> Tensor:
        scores_nbS = torch.addmm(self.bias_V, rows_nZ, self.weight_ZV).unflatten(1, (-1, BLOCK))
        block_n = scores_nbS.amin(dim=2).argmin(dim=1)
        scores_nS = scores_nbS[torch.arange(block_n.shape[0], device=block_n.device), block_n]
        # A row that is not finite may end in the padding: keep the index valid, the loss will tell.
        return (block_n * BLOCK + scores_nS.argmin(dim=1)).clamp_max_(self.vocab_size - 1)
