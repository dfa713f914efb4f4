"""The LightningDataModule over image shards, and what the two over shards and over token caches share."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, Any

import lightning
import torch

from mvar_lightning.data.images import RGB, PixelForm, check_channels
from mvar_lightning.data.index import ShardIndex, ShardInfo
from mvar_lightning.data.making.shards import ensure
from mvar_lightning.data.reading.loader import StreamLoader, TrainLoader
from mvar_lightning.data.reading.order import EpochStream, StreamConfig, TrainStream, TurnStream, ValidationStream
from mvar_lightning.data.reading.place import UNKNOWN, ShardPlace, index_of_names
from mvar_lightning.data.reading.samples import ImageReader
from mvar_lightning.data.transforms import DRAFT_MARGIN, Transform, build_transform, checked_size
from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import Size, height_width, short
from mvar_lightning.tools.remote import plain

if TYPE_CHECKING:
    from mvar_lightning.tokenizer import MultiScaleTokenizer


class TrainingData(lightning.LightningDataModule):
    """Base of data modules whose training batches come from a `TrainLoader`. Batch n of an epoch is exact after a
    resume, on as many ranks.

    `setup` must call the one here. What modules and callbacks ask of a run's data are `batch_size`, `train_samples` and
    the three below; `run_data` has the answers of data modules that are none of ours.
    """

    holds_images: bool = True
    """Whether batches hold images; otherwise those behind them come from `image_data`."""

    def __init__(self, batch_size: int, num_workers: int, epoch_samples: int | None, seed: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: must be 1 or more")
        if num_workers < 0:
            raise UserError(f"num_workers {num_workers}: must be 0 or more")
        self.batch_size, self.num_workers, self.epoch_samples = batch_size, num_workers, epoch_samples
        self.seed = seed
        self._resume_at: dict[str, int] | None = None

    @property
    @abstractmethod
    def train_samples(self) -> int:
        """Samples of the training split."""

    @property
    @abstractmethod
    def val_samples(self) -> int:
        """Samples of the validation split."""

    @abstractmethod
    def check_model(self, tokenizer: MultiScaleTokenizer, tokenizer_hash: str | None = None) -> None:
        """Raise UserError unless batches are such as a model over this tokenizer takes; without the hash (its
        `fingerprint`) it is the tokenizer that is trained on them."""

    @abstractmethod
    def image_data(self, who: str) -> ShardsDataModule:
        """The data module of the real images; `who` asks. Raises UserError where there are none."""

    def setup(self, stage: str) -> None:
        self._resume_at = None

    def train_loader(self, stream: EpochStream) -> TrainLoader:
        """The loader of a training stream, at the position where training goes on."""
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        loader = TrainLoader(stream, self.num_workers, torch.cuda.is_available(), epoch)
        if self._resume_at is not None and self._resume_at["epoch"] >= epoch:
            loader.load_state_dict(self._resume_at)
        return loader

    def test_dataloader(self) -> Any:
        return self.val_dataloader()

    def predict_dataloader(self) -> Any:
        return self.val_dataloader()

    def state_dict(self) -> dict[str, int]:
        """Position of the next training batch, for checkpoints.

        Lightning keeps it too, but gives it only to a loader that is made after the checkpoint was read, and a module
        that asks for the number of steps (`trainer.estimated_stepping_batches`) has it made before.
        """
        loader = getattr(self.trainer, "train_dataloader", None)
        return loader.state_dict() if isinstance(loader, TrainLoader) else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._resume_at = dict(state_dict)
        loader = getattr(self.trainer, "train_dataloader", None)
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

    def check_validation(self) -> None:
        """Raise UserError where a process would have no image of the validation split, and Lightning none to count."""
        processes = self.rank_and_world_size()[1]
        if 0 < self.val_samples < processes:
            raise UserError(
                f"the validation split has {self.val_samples} images, fewer than the {processes} processes; take fewer "
                "processes, or make the data with a larger --val-fraction"
            )

    def stream_config(self) -> StreamConfig:
        return StreamConfig(self.batch_size, self.seed, *self.rank_and_world_size())

    def rank_and_world_size(self) -> tuple[int, int]:
        """Rank among the training processes, and how many there are."""
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1


class OtherData:
    """A data module that is none of ours, or bare loaders: `TrainingData`'s answers, as far as it has any."""

    def __init__(self, module: Any, loader: Any = None) -> None:
        self.module = module
        self.batch_size: int | None = getattr(module, "batch_size", getattr(loader, "batch_size", None))
        self.holds_images = not hasattr(module, "image_data")

    @property
    def train_samples(self) -> int | None:
        return getattr(self.module, "train_samples", None)

    def check_model(self, tokenizer: MultiScaleTokenizer, tokenizer_hash: str | None = None) -> None:
        size = checked_size(getattr(self.module, "image_size", tokenizer.image_size))
        check_image_size(size, tokenizer, tokenizer_hash)

    def image_data(self, who: str) -> Any:
        if self.module is None:
            raise UserError(
                f"{who}: needs the run's data module, not bare loaders; pass datamodule=ShardsDataModule(...)"
            )
        return self.module if self.holds_images else self.module.image_data(who)


def run_data(trainer: Any) -> TrainingData | OtherData:
    """The data of a trainer's run."""
    module = getattr(trainer, "datamodule", None)
    if isinstance(module, TrainingData):
        return module
    return OtherData(module, getattr(trainer, "train_dataloader", None))


def named(batch: Any, needed: str) -> Any:
    """A batch as the modules read it: pairs (images, labels) of other data by name.

    Raises:
        UserError: neither such a pair nor a dict with what is ``needed``, and images or tokens.
    """
    if isinstance(batch, (list, tuple)) and len(batch) == 2:
        batch = {"image": batch[0], "label": batch[1]}
    if not isinstance(batch, dict) or needed not in batch or not {"image", "tokens"} & batch.keys():
        found = sorted(map(str, batch)) if isinstance(batch, dict) else type(batch).__name__
        raise UserError(f"batch {found}: give a dict with image (or tokens) and label, or a pair (images, labels)")
    return batch


def check_image_size(image_size: Size, tokenizer: MultiScaleTokenizer, tokenizer_hash: str | None = None) -> None:
    """Raise UserError unless images have the tokenizer's size; the way out depends on whether it is the one trained."""
    size, scales, downsampling = tokenizer.image_size, tokenizer.pyramid, tokenizer.downsampling
    if image_size == size:
        return
    given, made = short(image_size), short(size)
    if tokenizer_hash is not None:
        raise UserError(
            f"data.image_size {given}: the tokenizer makes images of {made} pixels (scales {scales}, "
            f"downsampling {downsampling}); set it to that"
        )
    if odd := [side for side in height_width(image_size) if side % downsampling]:
        raise UserError(
            f"data.image_size {given}: {odd[0]} is no multiple of {downsampling}, by which this tokenizer shrinks "
            "images (a halving for each of channel_multipliers but the first); choose a size that it divides, or fewer "
            "levels"
        )
    raise UserError(
        f"scales {scales}: with downsampling {downsampling} they make images of {made} pixels, but data.image_size "
        f"is {given}; change the scales, the number of channel_multipliers or image_size"
    )


class ShardsDataModule(TrainingData):
    """Image shards: batches {"image": uint8 (B, 3, S, S), "label": int64 (B,)}; who takes one calls `normalize`. Of
    shards of gray or RGBA pictures 3 is 1 or 4, of 16-bit ones uint8 is uint16.

    Args:
        path: folder written by `mvar shards make`, or a URL of one (http, https, s3, gs); `data/digits` is made when
            it is missing; null with `train_shards`.
        image_size: side S of the square images, or [height, width].
        batch_size: images a step on one process; a global batch is batch_size x processes x accumulation.
        num_workers: loading processes for each training process; 0 loads in the training process.
        shuffle_buffer: encoded samples among which each worker draws; 1 keeps the order of the shards. A training split
            that fits is permuted whole: each pass has every image once. Else an epoch may repeat some and lack others.
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
        allow_pipe: false; commands (`pipe:COMMAND`) are not run any more.
        channels: of the images; null for what the shards were made with. 3 converts any of them to RGB of 8 bits.
    """

    def __init__(
        self,
        path: str | None,
        image_size: int | tuple[int, int],
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
        channels: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, epoch_samples, seed)
        image_size = checked_size(image_size)
        if val_crop == "random":
            raise UserError("val_crop 'random': validation must not depend on chance; choose center or adm")
        if bool(path) == bool(train_shards):
            raise UserError(
                f"data.path {path!r}, data.train_shards {train_shards!r}: give one of the two, null for the other"
            )
        if train_shards and not (num_classes and val_shards):
            raise UserError(f"data.train_shards {train_shards}: give data.val_shards and data.num_classes, too")
        self.path, self.image_size = path or "", image_size
        self.resize_ratio, self.val_crop, self.shuffle_buffer = resize_ratio, val_crop, shuffle_buffer
        self.train_transform: Transform = build_transform(crop, image_size, resize_ratio, flip, decoding)
        self.val_transform: Transform = build_transform(val_crop, image_size, resize_ratio)
        draftable = decoding == "fast" and crop != "adm"
        self.draft_side = DRAFT_MARGIN * round(resize_ratio * max(height_width(image_size))) if draftable else None
        if allow_pipe:
            raise UserError("data.allow_pipe True: commands are not run any more; give addresses, or files they wrote")
        self._place = ShardPlace(self.path)
        self._names = (train_shards, val_shards)
        self._num_classes = num_classes
        self._form = None if channels is None else PixelForm(channels)

    @cached_property
    def index(self) -> ShardIndex:
        """Read on first use, and embedded data made if it is missing. Raises UserError for any other missing folder."""
        train, val = self._names
        if train is None or val is None:
            index = ensure(self.path)
            if self._num_classes not in (None, index.num_classes):
                raise UserError(
                    f"data.num_classes {self._num_classes}: {self.path} has {index.num_classes}; leave it out"
                )
            return index
        assert self._num_classes is not None
        return index_of_names(train, val, self._num_classes)

    @property
    def form(self) -> PixelForm:
        """Of the pictures. Raises UserError where the shards hold other ones than are asked for."""
        asked, held = self._form, self.index.form
        if asked is None or (asked != RGB and asked.channels == held.channels):
            return held
        if asked != RGB and self.path:
            raise UserError(
                f"data.channels {asked.channels}: {self.path} was made with {held.channels} channels; leave it out, or "
                f"make the shards anew with mvar shards make --channels {asked.channels}"
            )
        return asked

    @property
    def channels(self) -> int:
        """Of the images in a batch."""
        return self.form.channels

    @property
    def num_classes(self) -> int:
        return self.index.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.index.class_names

    @property
    def train_samples(self) -> int:
        split = self.index.split("train")
        if self.epoch_samples is None and not all(shard.samples for shard in split.shards):
            raise UserError(f"data.train_shards {self._names[0]}: their samples are not counted; give epoch_samples")
        return split.samples

    @property
    def val_samples(self) -> int:
        return self.index.split("val").samples

    def prepare_data(self) -> None:
        if self.path and "://" not in plain(self.path):
            ensure(self.path)

    def setup(self, stage: str) -> None:
        """Every shard must be there in full length before the first step, not hours into the run."""
        super().setup(stage)
        for split in self.index.splits.values():
            for shard in split.shards:
                if problem := self._place.problem(shard):
                    raise UserError(f"data folder {self.path}: shard {problem}; copy it again or make the shards anew")

    def check_model(self, tokenizer: MultiScaleTokenizer, tokenizer_hash: str | None = None) -> None:
        check_image_size(self.image_size, tokenizer, tokenizer_hash)
        check_channels(self.channels, tokenizer.image_channels, f"data {self.path or self._names[0]}")

    def image_data(self, who: str) -> ShardsDataModule:
        return self

    def train_dataloader(self) -> TrainLoader:
        reader, shards = self._reader("train", self.train_transform, self.draft_side)
        stream = TrainStream(reader, shards, self.stream_config(), self.epoch_batches(), self.shuffle_buffer)
        return self.train_loader(stream)

    def val_dataloader(self) -> StreamLoader:
        self.check_validation()
        return self.ordered_dataloader("val")

    def ordered_dataloader(self, split: str) -> StreamLoader:
        """Every image of a split once, in the order of its shards, with the validation crop.

        Raises:
            UserError: the index has no such split, or no shards for it.
        """
        stream = ValidationStream(*self._reader(split, self.val_transform), self.stream_config())
        return StreamLoader(stream, self.num_workers, torch.cuda.is_available())

    def turn_loader(self, split: str, rank: int, processes: int) -> StreamLoader:
        """Every n-th batch of `ordered_dataloader`, as one process would read them. Raises `UserError` likewise."""
        config = StreamConfig(self.batch_size, self.seed, rank, processes)
        stream = TurnStream(*self._reader(split, self.val_transform), config)
        return StreamLoader(stream, self.num_workers, torch.cuda.is_available())

    def _reader(
        self, split: str, transform: Transform, draft_side: int | None = None
    ) -> tuple[ImageReader, tuple[ShardInfo, ...]]:
        shards = self.index.split(split).shards
        total = sum(shard.bytes for shard in shards) if all(shard.bytes for shard in shards) else UNKNOWN
        reader = ImageReader(self._place, total, transform, self.num_classes, draft_side, form=self.form)
        return reader, shards
