"""The making of a token cache, part by part: what is done stays done, however the work is shared or interrupted.

While it is under way the folder holds `making.json` (the settings) and a record for each finished part; they go when
the index is written. A part is written by one process, aside first.

Legend: N rows of a batch, S side of the images, n samples of a part, v views, L tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mvar_lightning.data.images import SampleError
from mvar_lightning.data.index import ShardIndex, ShardInfo, content_problem, parse, read_bytes
from mvar_lightning.data.reading.order import WorkerStream
from mvar_lightning.data.reading.samples import Faults, ImageReader
from mvar_lightning.data.tokens.cache import (
    INDEX_NAME,
    CacheSettings,
    PartInfo,
    TokenCache,
    part_files,
    read_cache,
    write_array,
)
from mvar_lightning.data.transforms import build_transform, planes
from mvar_lightning.errors import UserError
from mvar_lightning.tools.files import Lock, sha256_of, write, write_json

MAKING, LOCK = "making.json", ".lock"


@dataclass(frozen=True)
class Task:
    """One image shard, and the name of the part that it becomes."""

    part: str
    split: str
    shard: ShardInfo


def content_hash(index: ShardIndex) -> str:
    """What the shards hold, wherever they lie."""
    shards = [(split, shard.samples, shard.sha256) for split in index.splits for shard in index.split(split).shards]
    return hashlib.sha256(json.dumps([index.class_names, shards]).encode()).hexdigest()


class TokenJob:
    """A cache in the making at `folder`, of the shards in `index`, under `settings`."""

    def __init__(self, folder: str | Path, settings: CacheSettings, index: ShardIndex) -> None:
        self.folder, self.settings, self.class_names = Path(folder), settings, index.class_names
        self.tasks = [
            Task(f"{split}/{number:06d}", split, shard)
            for split in ("train", "val")
            for number, shard in enumerate(index.split(split).shards)
        ]

    def begin(self) -> None:
        """Make the folder this job's.

        Raises:
            UserError: the folder holds something else, parts of another job, or cannot be written.
        """
        folder = self.folder
        is_ours = any((folder / name).exists() for name in (INDEX_NAME, MAKING, LOCK))
        is_ours = is_ours or (folder.is_dir() and all(each.name.startswith(".partial-") for each in folder.iterdir()))
        if folder.exists() and not is_ours:
            raise UserError(f"out {folder}: holds something else than a token cache; give a new or empty folder")
        # not `tools.files.claim`: a note of other settings is replaced as long as no part lies there, and in a finished
        # cache the index is the note
        there = self._settings_there()
        if there is not None and there != self.settings and self._records():
            self._refuse(there)
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            if there != self.settings:  # first: killed after it, the folder is known
                write_json(folder / MAKING, self.settings.to_plain(), durable=True)
            for split in ("train", "val"):
                (folder / split).mkdir(exist_ok=True)

    def _settings_there(self) -> CacheSettings | None:
        if (self.folder / INDEX_NAME).is_file():
            return read_cache(self.folder).settings
        try:
            content = read_bytes(self.folder / MAKING)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"{self.folder / MAKING}: cannot be read ({error.strerror})") from None
        return parse(content, CacheSettings.from_plain, str(self.folder / MAKING), f"remove {self.folder}")

    def _refuse(self, there: CacheSettings) -> None:
        ours, theirs = self.settings.to_plain(), there.to_plain()
        key = next(key for key in ours if ours[key] != theirs[key])
        name = {"tokenizer_hash": "tokenizer", "data_sha256": "data"}.get(key, key)
        was, now = (str(value)[:12] if name != key else value for value in (theirs[key], ours[key]))
        raise UserError(
            f"out {self.folder}: was begun with {name} {was}, now it is {now}; "
            "give what it was begun with, give another ``out``, or remove the folder"
        )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One job at a time in the folder. Raises UserError while another runs."""
        busy = f"out {self.folder}: another `mvar tokens` is writing it; wait for it ({{owner}})"
        lock = Lock(self.folder / LOCK, busy)
        with self._writing():
            lock.take()
        try:
            yield
        finally:
            lock.path.unlink(missing_ok=True)
            lock.release()

    def todo(self) -> list[Task]:
        """The parts, without those that an earlier run wrote and that still are as written."""
        records = self._records()

        def is_sound(part: PartInfo | None) -> bool:
            return part is not None and not content_problem(part, part_files(self.folder, part.name), INDEX_NAME)

        return [task for task in self.tasks if not is_sound(records.get(task.part))]

    def write(self, task: Task, tokens_vnL: np.ndarray, labels_n: np.ndarray, damaged: tuple[str, ...]) -> PartInfo:
        """Arrays first, then the record that makes them count. Raises UserError where the disk refuses."""
        files = list(part_files(self.folder, task.part).values())
        with self._writing():
            write_array(files[0], tokens_vnL.astype(self.settings.dtype))
            write_array(files[1], labels_n.astype("<i4"))
            size = sum(path.stat().st_size for path in files)
            part = PartInfo(task.part, len(labels_n), size, sha256_of(*files), damaged)
            write_json(self._record(task.part), asdict(part), durable=True)
        return part

    def finish(self) -> TokenCache:
        """Write the index from the records. Raises UserError where a part is missing."""
        records = self._records()
        if missing := [task.part for task in self.tasks if task.part not in records]:
            raise UserError(f"out {self.folder}: part {missing[0]} is missing; run the same command again")
        parts = tuple(records[task.part] for task in self.tasks)
        cache = TokenCache(self.folder, self.settings, self.class_names, parts)
        for split in sorted({task.split for task in self.tasks}):
            if not cache.samples(split):
                lines = [line for part in parts if part.name.startswith(split) for line in part.damaged]
                raise UserError(f"data: not one image of {split} can be read, first {lines[0]}; make the shards anew")
        with self._writing():
            write(self.folder / INDEX_NAME, cache.to_json(), durable=True)
            for part in parts:
                self._record(part.name).unlink(missing_ok=True)
            (self.folder / MAKING).unlink(missing_ok=True)
        return cache

    def _record(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _records(self) -> dict[str, PartInfo]:
        """Parts written so far, by name: those of a finished cache, and newer ones."""
        records = {}
        if (self.folder / INDEX_NAME).is_file():
            records = {part.name: part for part in read_cache(self.folder).parts}
        for path in self.folder.glob("*/[0-9]*.json"):
            with contextlib.suppress(OSError, UserError):  # else the part is made again
                part = parse(read_bytes(path), PartInfo.from_plain, str(path), "")
                records[part.name] = part
        return records

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"out {self.folder}: cannot be written ({error.strerror}); finished parts are kept: "
                "mend that and run the same command again"
            ) from error


# Image shards to the rows that a tokenizer encodes: the views of every image, in batches that keep within a part.
#
# View v of an image is a function of (seed, image, v) alone, and a part is cut into batches from its own start, so
# what is encoded together does not depend on how many processes and workers share the work.


@dataclass(frozen=True)
class Rows:
    """A batch to encode: uint8 pixels, the views of an image one after the other."""

    part: str
    pixels_N3SS: Tensor

    @classmethod
    def of(cls, task: Task, views: Sequence[Image.Image]) -> Rows:
        return cls(task.part, torch.from_numpy(np.stack([planes(view) for view in views])))


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
                f"{distinct} differ; take ``crop`` random, or ``views`` {distinct}"
            )
        if settings.flip and settings.views < 2:
            raise UserError("flip: mirrors odd views, and with one view there is none; give ``views`` 2 or more")
        self.settings = settings
        self.train = build_transform(settings.crop, settings.image_size, settings.resize_ratio)
        self.val = build_transform(settings.val_crop, settings.image_size, settings.resize_ratio)

    def of(self, image: Image.Image, split: str, key: str) -> list[Image.Image]:
        """All views (S x S) of the image with that key. Raises SampleError where it is too long and thin."""
        crop = self.train if split == "train" else self.val
        views = []
        for view in range(self.settings.views_of(split)):
            cropped = crop(image, random.Random(f"{self.settings.seed}/{split}/{key}/view {view}"))
            if self.settings.flip and view % 2:
                cropped = cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            views.append(cropped)
        return views


class ViewStream(WorkerStream):
    """Rows of the tasks, each worker its own tasks; a part's rows come in order, then its `PartEnd`.

    Args:
        reader: of the shards; what it makes of pictures is not asked.
        views: those of each picture.
        tasks: this process' share.
        num_shards: of all shares; damaged shards are counted against it.
    """

    def __init__(self, reader: ImageReader, views: Views, tasks: Sequence[Task], num_shards: int) -> None:
        self.reader, self.views, self.tasks, self.num_shards = reader, views, list(tasks), num_shards
        self.settings = views.settings

    @property
    def num_views(self) -> int:
        """Of all images that the shards should hold."""
        return sum(self._views_of(task) for task in self.tasks)

    def num_batches(self, workers: int) -> int:
        return sum(-(-self._views_of(task) // self.settings.batch_size) + 1 for task in self.tasks)

    def _views_of(self, task: Task) -> int:
        return task.shard.samples * self.settings.views_of(task.split)

    def batches(self, worker: int, workers: int) -> Iterator[Rows | PartEnd]:
        faults = Faults(self.num_shards)
        for task in self.tasks[worker::workers]:
            yield from self._part(task, faults)

    def _part(self, task: Task, faults: Faults) -> Iterator[Rows | PartEnd]:
        end = PartEnd(task)
        waiting: list[Image.Image] = []
        for raw in self.reader.read(task.shard, faults):
            faults.seen += 1
            try:
                label = self.reader.label(raw)
                waiting += self.views.of(self.reader.picture(raw), task.split, raw.key)
                end.labels.append(label)
            except SampleError as error:
                faults.sample(raw.shard, raw.key, str(error))
                end.damaged.append(f"{raw.key}: {error}")
            while len(waiting) >= self.settings.batch_size:
                yield Rows.of(task, waiting[: self.settings.batch_size])
                del waiting[: self.settings.batch_size]
        if waiting:
            yield Rows.of(task, waiting)
        lost = task.shard.samples - len(end.labels) - len(end.damaged)
        if lost > 0:
            end.damaged.append(f"{task.shard.name}: cut off, {lost} images are lost")
        yield end
