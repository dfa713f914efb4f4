"""The LightningDataModule over a shard folder."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import lightning
import torch

from mvar_lightning.data.embedded import ensure
from mvar_lightning.data.index import ShardIndex, presence_problem
from mvar_lightning.data.loader import StreamLoader, TrainLoader
from mvar_lightning.data.streaming import StreamConfig, TrainStream, ValidationStream
from mvar_lightning.data.transforms import Transform, build_transform
from mvar_lightning.errors import UserError


class ShardsDataModule(lightning.LightningDataModule):
    """Images of a shard folder: batches {"image": float32 (B, 3, S, S) in [-1, 1], "label": int64 (B,)}.

    Args:
        path: folder written by `mvar shards make`; `data/digits` is made when it is missing.
        image_size: side S of the square images.
        batch_size: images a step on one process; a global batch is batch_size x processes x accumulation.
        num_workers: loading processes for each training process; 0 loads in the training process.
        shuffle_buffer: encoded samples among which each worker draws; 1 keeps the order of the shards.
        epoch_samples: images that make an epoch over all processes; default all of the training split.
        resize_ratio: the shorter side becomes round(resize_ratio * image_size) before the crop (published 1.125).
        crop: training crop: `random`, `center` or `adm`.
        val_crop: validation crop: `center` or `adm`.
        flip: mirror half of the training images (published: no).
        seed: of the order of samples and of the crops.
    """

    def __init__(
        self,
        path: str,
        image_size: int,
        batch_size: int = 64,
        num_workers: int = 2,
        shuffle_buffer: int = 1000,
        epoch_samples: int | None = None,
        resize_ratio: float = 1.125,
        crop: str = "random",
        val_crop: str = "center",
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: must be 1 or more")
        if num_workers < 0:
            raise UserError(f"num_workers {num_workers}: must be 0 or more")
        if val_crop == "random":
            raise UserError("val_crop 'random': validation must not depend on chance; choose center or adm")
        self.path = path
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.shuffle_buffer = shuffle_buffer
        self.epoch_samples = epoch_samples
        self.train_transform: Transform = build_transform(crop, image_size, resize_ratio, flip)
        self.val_transform: Transform = build_transform(val_crop, image_size, resize_ratio)
        self.seed = seed
        self._resume_at: dict[str, int] | None = None

    @cached_property
    def index(self) -> ShardIndex:
        """Read on first use, and embedded data made if it is missing. Raises UserError for any other missing folder."""
        return ensure(self.path)

    @property
    def num_classes(self) -> int:
        return self.index.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.index.class_names

    @property
    def train_samples(self) -> int:
        return self.index.split("train").samples

    @property
    def val_samples(self) -> int:
        return self.index.split("val").samples

    def prepare_data(self) -> None:
        ensure(self.path)

    def setup(self, stage: str) -> None:
        """Every shard must be there in full length before the first step, not hours into the run."""
        self._resume_at = None
        for split in self.index.splits.values():
            for shard in split.shards:
                if problem := presence_problem(Path(self.path) / shard.name, shard):
                    raise UserError(f"data folder {self.path}: shard {problem}; copy it again or make the shards anew")

    def train_dataloader(self) -> TrainLoader:
        stream = TrainStream(self._config("train", self.train_transform), self._epoch_batches(), self.shuffle_buffer)
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        loader = TrainLoader(stream, self.num_workers, _pin_memory(), epoch)
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

    def val_dataloader(self) -> StreamLoader:
        return StreamLoader(ValidationStream(self._config("val", self.val_transform)), self.num_workers, _pin_memory())

    def test_dataloader(self) -> StreamLoader:
        return self.val_dataloader()

    def predict_dataloader(self) -> StreamLoader:
        return self.val_dataloader()

    def _config(self, split: str, transform: Transform) -> StreamConfig:
        rank, world_size = self._rank()
        return StreamConfig(
            folder=Path(self.path),
            shards=self.index.split(split).shards,
            transform=transform,
            num_classes=self.num_classes,
            batch_size=self.batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )

    def _epoch_batches(self) -> int:
        """Whole batches on every process. A whole-number limit of the trainer is an epoch of that length, so that a
        resumed run agrees with an uninterrupted one about where epochs end."""
        samples = self.epoch_samples if self.epoch_samples is not None else self.train_samples
        world_size = self._rank()[1]
        batches = samples // (self.batch_size * world_size)
        if batches < 1:
            raise UserError(
                f"an epoch of {samples} samples is less than one batch of {self.batch_size} on {world_size} "
                "process(es); give a smaller batch_size or a larger epoch_samples"
            )
        limit = self.trainer.limit_train_batches if self.trainer is not None else None
        return min(batches, limit) if isinstance(limit, int) and limit > 0 else batches

    def _rank(self) -> tuple[int, int]:
        """Rank among the training processes, and how many there are."""
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1


def _pin_memory() -> bool:
    return torch.cuda.is_available()
