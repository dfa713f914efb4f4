"""The LightningDataModule over image shards."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import Any

import lightning
import torch

from mvar_lightning.data.index import ShardIndex
from mvar_lightning.data.reading.loader import StreamLoader, TrainLoader
from mvar_lightning.data.reading.order import StreamConfig, TrainStream, ValidationStream
from mvar_lightning.data.reading.place import ShardPlace, index_at, index_of_names
from mvar_lightning.data.reading.samples import Batch, ImageReader
from mvar_lightning.data.transforms import DRAFT_MARGIN, Transform, build_transform, finished
from mvar_lightning.errors import UserError

# What data modules share: ranks, the length of an epoch, and a place in it that checkpoints keep.


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


class ShardsDataModule(TrainingData):
    """Image shards: batches {"image": float32 (B, 3, S, S) in [-1, 1], "label": int64 (B,)}.

    Args:
        path: folder written by `mvar shards make`, or a URL of one (http, https, s3, gs); `data/digits` is made when
            it is missing; null with `train_shards`.
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
        decoding: training images `exact`, as published pixel for pixel, or `fast`, within a level or two of 255 and,
            for large JPEGs, decoded at a fraction of their size. Validation is always exact.
        train_shards: instead of `path`, names or URLs of shards that have no index; `{000..127}` is expanded.
        val_shards: the same for validation; they are counted first.
        num_classes: labels are below it; needed with `train_shards`, else read from the index.
        allow_pipe: run commands that `train_shards` and `val_shards` name as `pipe:COMMAND`.
    """

    def __init__(
        self,
        path: str | None,
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
        decoding: str = "exact",
        train_shards: str | list[str] | None = None,
        val_shards: str | list[str] | None = None,
        num_classes: int | None = None,
        allow_pipe: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, epoch_samples)
        if val_crop == "random":
            raise UserError("val_crop 'random': validation must not depend on chance; choose center or adm")
        if bool(path) == bool(train_shards):
            raise UserError(
                f"data.path {path!r}, data.train_shards {train_shards!r}: give one of the two, null for the other"
            )
        if train_shards and not (num_classes and val_shards):
            raise UserError(f"data.train_shards {train_shards}: give data.val_shards and data.num_classes, too")
        self.path = path or ""
        self.image_size = image_size
        self.resize_ratio, self.val_crop = resize_ratio, val_crop
        self.shuffle_buffer = shuffle_buffer
        self.train_transform: Transform = build_transform(crop, image_size, resize_ratio, flip, decoding)
        self.val_transform: Transform = build_transform(val_crop, image_size, resize_ratio)
        draftable = decoding == "fast" and crop != "adm"
        self.draft_side = DRAFT_MARGIN * round(resize_ratio * image_size) if draftable else None
        self.seed = seed
        self.allow_pipe = allow_pipe
        self._names = (train_shards, val_shards)
        self._num_classes = num_classes

    @cached_property
    def index(self) -> ShardIndex:
        """Read on first use, and embedded data made if it is missing. Raises UserError for any other missing folder."""
        train, val = self._names
        if train is None or val is None:
            index = index_at(self.path)
            if self._num_classes not in (None, index.num_classes):
                raise UserError(
                    f"data.num_classes {self._num_classes}: {self.path} has {index.num_classes}; leave it out"
                )
            return index
        assert self._num_classes is not None
        return index_of_names(train, val, self._num_classes, self.allow_pipe)

    @property
    def num_classes(self) -> int:
        return self.index.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.index.class_names

    @property
    def train_samples(self) -> int:
        shards = self.index.split("train").shards
        if self.epoch_samples is None and not all(shard.samples for shard in shards):
            raise UserError(f"data.train_shards {self._names[0]}: their samples are not counted; give epoch_samples")
        return self.index.split("train").samples

    @property
    def val_samples(self) -> int:
        return self.index.split("val").samples

    def prepare_data(self) -> None:
        if self.path and "://" not in self.path:
            index_at(self.path)

    def setup(self, stage: str) -> None:
        """Every shard must be there in full length before the first step, not hours into the run."""
        super().setup(stage)
        for split in self.index.splits.values():
            for shard in split.shards:
                if problem := self._place.problem(shard):
                    raise UserError(f"data folder {self.path}: shard {problem}; copy it again or make the shards anew")

    def train_dataloader(self) -> TrainLoader:
        config = self._config("train", self.train_transform, self.draft_side)
        return self._watched(self.train_loader(TrainStream(config, self.epoch_batches(), self.shuffle_buffer)))

    def val_dataloader(self) -> StreamLoader:
        return self.ordered_dataloader("val")

    def ordered_dataloader(self, split: str) -> StreamLoader:
        """Every image of a split once, in the order of its shards, with the validation crop.

        Raises:
            UserError: the index has no such split, or no shards for it.
        """
        stream = ValidationStream(self._config(split, self.val_transform))
        return self._watched(StreamLoader(stream, self.num_workers, pin_memory()))

    def test_dataloader(self) -> StreamLoader:
        return self.val_dataloader()

    def predict_dataloader(self) -> StreamLoader:
        return self.val_dataloader()

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Images of the trainer's loaders arrive as uint8, a fourth of the bytes, and are normalized here."""
        return finished(batch) if isinstance(batch, dict) else batch

    def _watched(self, loader: Any) -> Any:
        loader.leaves_finish = self._is_the_trainers
        return loader

    def _is_the_trainers(self, loader: StreamLoader) -> bool:
        """Whether the trainer takes this loader's batches, so that they pass `on_after_batch_transfer`."""
        trainer: Any = self.trainer
        if trainer is None:
            return False
        # `trainer.datamodule` stays when loaders are given without it, this does not
        if getattr(trainer._data_connector._datahook_selector, "datamodule", None) is not self:
            return False
        taken = (
            trainer.train_dataloader,
            trainer.val_dataloaders,
            trainer.test_dataloaders,
            trainer.predict_dataloaders,
        )
        return any(loader is one for one in taken)

    @property
    def _place(self) -> ShardPlace:
        return ShardPlace(self.path, self.allow_pipe)

    def _config(self, split: str, transform: Transform, draft_side: int | None = None) -> StreamConfig:
        rank, world_size = self.rank_and_world_size()
        shards = self.index.split(split).shards
        known = all(shard.bytes for shard in shards)
        reader = ImageReader(
            self._place,
            sum(shard.bytes for shard in shards) if known else 0,
            transform,
            self.num_classes,
            draft_side,
        )
        return StreamConfig(reader, shards, self.batch_size, self.seed, rank, world_size)
