"""Whether generated images lie closer to training images than held-out ones do: the data-copying test C_T.

Meehan, Chaudhuri, Dasgupta, arXiv 2004.05675: distances to the nearest training image, of generated and of held-out
images, are compared by ranks (Mann-Whitney's U as a standard normal z) in each cell of a partition of the space, and
the cells' z are averaged, weighted by their held-out images. Far below 0: generated images are copies; far above:
they lie where no data are. N, M rows, F features, P and Q rows of a block.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from mvar_lightning.errors import UserError
from mvar_lightning.metrics.precision_recall import squared_distances

CELLS = 10
"""Cells of the partition (k-means of training images), where there are images enough."""
LEAST = 20
"""A cell with fewer generated or held-out images is left out, as published."""


class Nearest(NamedTuple):
    """Of each row: distance (N,) to the nearest training row, float64, and the number (N,) of that."""

    distance_N: Tensor
    index_N: Tensor


def nearest(query_NF: Tensor, training: Iterable[Tensor]) -> Nearest:
    """The nearest training row of each query, under the Euclidean distance.

    Args:
        query_NF: any floating dtype; distances are computed in float64 on its device.
        training: rows (Q, F), block by block; only a block is held.

    Raises:
        UserError: no training rows, or rows of another length.
    """
    query_NF, first = query_NF.double(), 0
    center_F = query_NF.mean(dim=0)  # distances stay, and rounding gets small
    query_NF = query_NF - center_F
    best_N = query_NF.new_full((len(query_NF),), torch.inf)
    index_N = torch.zeros(len(query_NF), dtype=torch.long, device=query_NF.device)
    for rows_QF in training:
        if rows_QF.shape[1:] != query_NF.shape[1:]:
            raise UserError(
                f"nearest: training rows of {rows_QF.shape[1]} numbers, others of {query_NF.shape[1]}; take both from "
                "one extractor"
            )
        squared_NQ = squared_distances(query_NF, rows_QF.to(query_NF.device).double() - center_F)
        found_N, number_N = squared_NQ.min(dim=1)
        closer_N = found_N < best_N
        best_N[closer_N], index_N[closer_N] = found_N[closer_N], number_N[closer_N] + first
        first += len(rows_QF)
    if not first:
        raise UserError("nearest: no training images")
    return Nearest(best_N.sqrt().cpu(), index_N.cpu())


@dataclass(frozen=True)
class CopyingTest:
    """Args:
    statistic: C_T; below 0 where generated images are closer to training images than held-out ones.
    p_value: of a C_T as low as this by chance (one side), if generated images are as new as held-out ones.
    cells: of the partition that had images enough.
    generated, held_out: median distance to the nearest training image.
    closer: share of generated images below the 5% quantile of the held-out ones' distances; 5% is expected.
    images, held_out_images: compared.
    """

    statistic: float
    p_value: float
    cells: int
    generated: float
    held_out: float
    closer: float
    images: int
    held_out_images: int


def copying_test(
    generated_N: Tensor, held_out_M: Tensor, cell_N: Tensor | None = None, cell_M: Tensor | None = None
) -> CopyingTest:
    """C_T of distances to the nearest training image.

    Args:
        generated_N, held_out_M: distances, as of `nearest`.
        cell_N, cell_M: the cell of each image, as of `cells_of`; one cell for all if not given.

    Raises:
        UserError: fewer than 20 images of either kind.
    """
    generated, held_out = generated_N.double().numpy(), held_out_M.double().numpy()
    if min(len(generated), len(held_out)) < LEAST:
        raise UserError(
            f"memorization: {len(generated)} generated and {len(held_out)} held-out images; it takes {LEAST} of each"
        )
    if cell_N is None or cell_M is None:
        cell_N, cell_M = torch.zeros(len(generated)), torch.zeros(len(held_out))
    of_generated, of_held_out = cell_N.numpy(), cell_M.numpy()
    scores = {cell: _z(generated[of_generated == cell], held_out[of_held_out == cell]) for cell in set(of_held_out)}
    weights = {cell: float((of_held_out == cell).sum()) for cell, score in scores.items() if score is not None}
    if not weights:  # all cells are small
        return copying_test(generated_N, held_out_M)
    total = sum(weights.values())
    statistic = sum(weight * (scores[cell] or 0.0) for cell, weight in weights.items()) / total
    deviation = sum(weight**2 for weight in weights.values()) ** 0.5 / total  # of independent standard normal z
    return CopyingTest(
        statistic,
        float(stats.norm.cdf(statistic / deviation)),
        len(weights),
        float(np.median(generated)),
        float(np.median(held_out)),
        float((generated < np.quantile(held_out, 0.05)).mean()),
        len(generated),
        len(held_out),
    )


def _z(generated: np.ndarray, held_out: np.ndarray) -> float | None:
    """Mann-Whitney's U of generated above held-out distances, standardized; None of too few."""
    n, m = len(generated), len(held_out)
    if min(n, m) < LEAST:
        return None
    above = float(stats.mannwhitneyu(generated, held_out).statistic)
    return (above - n * m / 2) / (n * m * (n + m + 1) / 12) ** 0.5


def cells_of(training_NF: Tensor, *queries: Tensor) -> list[Tensor]:
    """The cell (N,) of each row of each query, of a partition of the training rows by k-means; always the same."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rows than cells
        means = KMeans(min(CELLS, len(training_NF)), n_init=1, random_state=0).fit(training_NF.double().numpy())
    return [torch.from_numpy(means.predict(rows_NF.double().numpy())) for rows_NF in queries]
