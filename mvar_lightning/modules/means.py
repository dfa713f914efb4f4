"""Means of a validation over the images of all processes."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
from torch import Tensor


def log_means(module: L.LightningModule, named: Mapping[str, Tensor], images: int) -> None:
    """Log means over an epoch's images, whatever share of them each process has.

    Lightning averages the processes' counts of images as whole numbers: 15 and 16 images become 15 each, and the mean
    3% too large. Counts that are multiples of the number of processes have a whole average.

    Args:
        module: the module in its validation or test step.
        named: means over a batch.
        images: in the batch, on this process.
    """
    module.log_dict(dict(named), batch_size=images * module.trainer.world_size, sync_dist=True)
