"""Kernel distance (KID) between the features of two sets of images: torchmetrics', of the images of all processes.

B batch, N images, F features.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.utilities.distributed import gather_all_tensors

from mvar_lightning.errors import UserError
from mvar_lightning.tools.processes import world_size

SUBSET = 1000
"""Images of a draw, as in published numbers; of fewer images, all those of the smaller side."""
DRAWS, FEW_DRAWS = 100, 10
"""Draws whose mean is taken; the few where a draw holds all images of one side."""


class KernelDistance:
    """Squared maximum mean discrepancy under the kernel (x y / F + 1)^3 (Binkowski 2018).

    Its estimate is unbiased for any number of images, where a Frechet distance of few ones is too large; so it may be
    negative. Keeps the features of all images in the process' memory, 8 kB each of Inception's.
    """

    def __init__(self) -> None:
        self._rows: dict[bool, list[Tensor]] = {True: [], False: []}

    def update(self, features_BF: Tensor, real: bool) -> None:
        """Add features of real or of generated images."""
        self._rows[real].append(features_BF.detach().float().cpu())

    def reset_generated(self) -> None:
        """Forget the generated images; the real ones stay."""
        self._rows[False].clear()

    def rows(self, real: bool, num_features: int, device: torch.device | str = "cpu") -> Tensor:
        """Features (N, F) in float64 of the real or the generated images of all processes; all must ask."""
        return rows_of_all(self._rows[real], num_features, device)

    def compute(self, num_features: int, device: torch.device | str = "cpu") -> float:
        """The distance; to be called by all processes.

        Args:
            num_features: F, which a process without images does not know.
            device: where to compute, and to gather rows: with NCCL, the process' GPU.

        Raises:
            UserError: fewer than two images on one side.
        """
        return kernel_distance(*(self.rows(real, num_features, device) for real in (True, False)))


def kernel_distance(real_NF: Tensor, generated_NF: Tensor) -> float:
    """The distance between rows that this process has; the same draws each time.

    Raises:
        UserError: fewer than two images on one side.
    """
    smaller = min(len(real_NF), len(generated_NF))
    if smaller < 2:
        raise UserError("kernel distance: needs at least two real and two generated images")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it holds features in memory
        metric = KernelInceptionDistance(
            nn.Identity(),
            subsets=DRAWS if smaller > SUBSET else FEW_DRAWS,
            subset_size=min(SUBSET, smaller),
            sync_on_compute=False,
        )
    metric.update(real_NF.double(), real=True)
    metric.update(generated_NF.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # on all processes, and in each validation
        return float(metric.compute()[0])


def rows_of_all(parts: list[Tensor], num_features: int, device: torch.device | str) -> Tensor:
    """Rows (N, F) of all processes in float64, in an order that does not depend on who has which."""
    rows_NF = torch.cat(parts) if parts else torch.empty(0, num_features)
    rows_NF = rows_NF.to(device)
    if world_size() > 1:
        rows_NF = torch.cat(gather_all_tensors(rows_NF))
    return rows_NF[rows_NF[:, 0].argsort(stable=True)].double()
