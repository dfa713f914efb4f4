"""Image shards to the rows that a tokenizer encodes: the views of every image, in batches that keep within a part.

View v of an image is a function of (seed, image, v) alone, and a part is cut into batches from its own start, so what
is encoded together does not depend on how many processes and workers share the work.

Legend: N rows of a batch, S side of the images.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mvar_lightning.data.faults import Faults, SampleError
from mvar_lightning.data.reading import ImageReader, RawSample
from mvar_lightning.data.streaming import Failure
from mvar_lightning.data.token_cache import CacheSettings
from mvar_lightning.data.token_making import Task
from mvar_lightning.data.transforms import build_transform, planes
from mvar_lightning.data.urls import ShardPlace
from mvar_lightning.data.worker_signals import outlive_stop_signals
from mvar_lightning.errors import UserError


@dataclass(frozen=True)
class Rows:
    """A batch to encode: uint8 pixels, the views of an image one after the other."""

    part: str
    pixels_N3SS: Tensor


@dataclass
class PartEnd:
    """All rows of a part have been given: the labels of its images, and the images that could not be read."""

    task: Task
    labels: list[int] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


class Views:
    """The views of an image: crops under `settings`, odd views mirrored where it says so.

    Raises:
        UserError: settings under which several views would be the same picture.
    """

    def __init__(self, settings: CacheSettings) -> None:
        distinct = settings.views if settings.crop == "random" else 2 if settings.flip else 1
        if settings.views > distinct:
            raise UserError(
                f"views {settings.views}: with crop {settings.crop}{' and flip' if settings.flip else ''} only "
                f"{distinct} differ; take --crop random, or --views {distinct}"
            )
        if settings.flip and settings.views < 2:
            raise UserError("flip: mirrors odd views, and with one view there is none; give --views 2 or more")
        self.settings = settings
        self.train = build_transform(settings.crop, settings.image_size, settings.resize_ratio)
        self.val = build_transform(settings.val_crop, settings.image_size, settings.resize_ratio)

    def of(self, image: Image.Image, split: str, key: str) -> list[Image.Image]:
        """All views (S x S) of the image with that key. Raises SampleError where it is too long and thin."""
        return [self._view(image, split, key, view) for view in range(self.settings.views_of(split))]

    def _view(self, image: Image.Image, split: str, key: str, view: int) -> Image.Image:
        rng = random.Random(f"{self.settings.seed}/{split}/{key}/view {view}")
        if split != "train":
            return self.val(image, rng)
        cropped = self.train(image, rng)
        if self.settings.flip and view % 2:
            cropped = cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return cropped


class ViewSample(NamedTuple):
    views: list[Image.Image]
    label: int


class ViewReader(ImageReader):
    """Reads image shards; a sample is all views of an image."""

    def __init__(self, place: ShardPlace, settings: CacheSettings, num_classes: int) -> None:
        self.views = Views(settings)
        super().__init__(place, 0, self.views.val, num_classes)

    def views_of(self, raw: RawSample, split: str) -> ViewSample:
        """Raises SampleError when the image or its label cannot be used."""
        label = self._label(raw)
        return ViewSample(self.views.of(self.memory.picture(raw), split, raw.key), label)


class ViewStream(IterableDataset):
    """Rows of the tasks, each worker its own tasks; a part's rows come in order, then its `PartEnd`.

    Args:
        reader: of the shards.
        tasks: this process' share.
        num_shards: of all shares; damaged shards are counted against it.
    """

    def __init__(self, reader: ViewReader, tasks: Sequence[Task], num_shards: int) -> None:
        self.reader, self.tasks, self.num_shards = reader, list(tasks), num_shards
        self.settings = reader.views.settings

    def __iter__(self) -> Iterator[Rows | PartEnd | Failure]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        faults = Faults(self.num_shards)
        try:
            for task in self.tasks[first::step]:
                yield from self._part(task, faults)
        except UserError as error:
            yield Failure(str(error))

    def _part(self, task: Task, faults: Faults) -> Iterator[Rows | PartEnd]:
        end = PartEnd(task)
        waiting: list[Image.Image] = []
        for raw in self.reader.read(task.shard, faults):
            faults.seen += 1
            try:
                sample = self.reader.views_of(raw, task.split)
                waiting += sample.views
                end.labels.append(sample.label)
            except SampleError as error:
                faults.sample(raw.shard, raw.key, str(error))
                end.damaged.append(f"{raw.key}: {error}")
            while len(waiting) >= self.settings.batch_size:
                yield self._rows(task, waiting[: self.settings.batch_size])
                del waiting[: self.settings.batch_size]
        if waiting:
            yield self._rows(task, waiting)
        lost = task.shard.samples - len(end.labels) - len(end.damaged)
        if lost > 0:
            end.damaged.append(f"{task.shard.name}: cut off, {lost} images are lost")
        yield end

    def _rows(self, task: Task, views: Sequence[Image.Image]) -> Rows:
        return Rows(task.part, torch.from_numpy(np.stack([planes(view) for view in views])))


def view_loader(stream: ViewStream, num_workers: int) -> Iterator[Rows | PartEnd]:
    """The stream's items over worker processes, or from this one. Raises UserError as the stream."""
    workers = min(num_workers, len(stream.tasks))
    loader = DataLoader(
        stream, batch_size=None, num_workers=workers, collate_fn=_as_it_is, worker_init_fn=outlive_stop_signals
    )
    for item in loader:
        if isinstance(item, Failure):
            raise UserError(item.message)
        yield item


def _as_it_is(item: Any) -> Any:
    return item
