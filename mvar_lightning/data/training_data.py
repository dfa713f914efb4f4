"""What data modules share: ranks, the length of an epoch, and a place in it that checkpoints keep."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import lightning
import torch

from mvar_lightning.data.loader import TrainLoader
from mvar_lightning.errors import UserError


class TrainingData(lightning.LightningDataModule):
    """Base of data modules whose training batches come from a `TrainLoader`. Batch n of an epoch is exact after a
    resume, on as many ranks.

    `setup` must call the one here.
    """

    def __init__(self, batch_size: int, num_workers: int, epoch_samples: int | None) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: must be 1 or more")
        if num_workers < 0:
            raise UserError(f"num_workers {num_workers}: must be 0 or more")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.epoch_samples = epoch_samples
        self._resume_at: dict[str, int] | None = None

    @property
    @abstractmethod
    def train_samples(self) -> int:
        """Samples of the training split."""

    def setup(self, stage: str) -> None:
        self._resume_at = None

    def train_loader(self, stream: Any, kind: type[TrainLoader] = TrainLoader) -> TrainLoader:
        """The loader of a training stream, at the place where training goes on."""
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        loader = kind(stream, self.num_workers, pin_memory(), epoch)
        if self._resume_at is not None and self._resume_at["epoch"] >= epoch:
            loader.load_state_dict(self._resume_at)
        return loader

    def state_dict(self) -> dict[str, int]:
        """Place of the next training batch, for checkpoints.

        Lightning keeps it too, but gives it only to a loader that is made after the checkpoint was read, and a module
        that asks for the number of steps (`trainer.estimated_stepping_batches`) has it made before.
        """
        loader = self.trainer.train_dataloader if self.trainer is not None else None
        return loader.state_dict() if isinstance(loader, TrainLoader) else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._resume_at = dict(state_dict)
        loader = self.trainer.train_dataloader if self.trainer is not None else None
        if isinstance(loader, TrainLoader):
            loader.load_state_dict(self._resume_at)

    def epoch_batches(self) -> int:
        """Whole batches on every process. A whole-number limit of the trainer is an epoch of that length, so that a
        resumed run agrees with an uninterrupted one about where epochs end."""
        samples = self.epoch_samples if self.epoch_samples is not None else self.train_samples
        world_size = self.rank_and_world_size()[1]
        batches = samples // (self.batch_size * world_size)
        if batches < 1:
            raise UserError(
                f"an epoch of {samples} samples is less than one batch of {self.batch_size} on {world_size} "
                "process(es); give a smaller batch_size or a larger epoch_samples"
            )
        limit = self.trainer.limit_train_batches if self.trainer is not None else None
        return min(batches, limit) if isinstance(limit, int) and limit > 0 else batches

    def rank_and_world_size(self) -> tuple[int, int]:
        """Rank among the training processes, and how many there are."""
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1


def pin_memory() -> bool:
    return torch.cuda.is_available()
