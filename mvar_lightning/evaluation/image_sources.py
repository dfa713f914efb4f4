"""Where images to compare come from: a folder of pictures, an npz, or a split of shards. All are uint8 RGB, in parts:
gray pictures and RGBA ones are compared as they look, three equal channels and laid on white.

A part is what is read, and noted as done, in one go; it can be read without those before it.
B batch, N images, HW pixels.
"""

from __future__ import annotations

import hashlib
import random
import struct
import sys
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mvar_lightning.data.image_data import ShardsDataModule
from mvar_lightning.data.images import SUFFIXES, ImageError, decode_rgb, open_image
from mvar_lightning.data.reading.loader import StreamLoader, loading
from mvar_lightning.data.reading.order import ValidationStream
from mvar_lightning.data.transforms import Transform, planes
from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import Size, as_written, height_width
from mvar_lightning.tools.ranks import Ranks
from mvar_lightning.tools.tensors import DAMAGED, array_header, open_arrays, read_array

PART = 1000
"""Images of a part, where a source does not come in parts of its own."""


class ImageSource(ABC):
    """A set of images of one size. Can be sent to other processes.

    Attributes:
        name: what errors and reports call it.
        size: height and width.
        parts: images in each part.
        identity: changes if the images do; plain values.
        enlarged: whether an image that was read was smaller than what it was cut to.
    """

    name: str
    size: tuple[int, int]
    parts: Sequence[int]
    identity: Mapping[str, Any]
    enlarged: bool = False

    def __len__(self) -> int:
        return sum(self.parts)

    @abstractmethod
    def read(self, part: int, batch_size: int) -> Iterator[Tensor]:
        """The images of one part: uint8 (B, 3, H, W). Raises UserError for one that cannot be read."""


def cut(count: int) -> list[int]:
    """``count`` images in parts."""
    return [min(PART, count - first) for first in range(0, count, PART)]


class FolderImages(ImageSource):
    """PNG, JPEG or WebP files of one size, as they are: nothing is resized.

    Args:
        folder: searched with its subfolders, in the order of the names; hidden files are left out.
        files: these alone, instead; the folder is not searched.
        identity: of files that are yet to be made; else it follows from names, lengths and times.
        size: the same.

    Raises:
        UserError: no folder, no image in it, or an image of another size.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[str] | None = None,
        identity: Mapping[str, Any] | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.name, self.folder = str(folder), folder
        self.files = list(_pictures(folder) if files is None else files)
        self.parts = cut(len(self.files))
        if size is None:
            with _naming(folder / self.files[0]), open_image((folder / self.files[0]).read_bytes()) as image:
                size = image.height, image.width
        self.size = size
        if identity is None:
            digest = hashlib.sha256()
            for name in self.files:
                about = (folder / name).stat()
                digest.update(f"{name}/{about.st_size}/{about.st_mtime_ns}\n".encode())
            identity = {"folder": self.name, "images": len(self.files), "files": digest.hexdigest()}
        self.identity = identity

    def read(self, part: int, batch_size: int) -> Iterator[Tensor]:
        files = self.files[part * PART : (part + 1) * PART]
        for first in range(0, len(files), batch_size):
            batch = []
            for path in (self.folder / name for name in files[first : first + batch_size]):
                with _naming(path):
                    picture = decode_rgb(path.read_bytes())
                if (picture.height, picture.width) != self.size:
                    raise UserError(
                        f"image {path}: is {picture.width} x {picture.height}, the first one here {self.size[1]} x "
                        f"{self.size[0]}; images are compared as they are: give a folder of one size, or shards, "
                        "which are cut"
                    )
                batch.append(planes(picture))
            yield torch.from_numpy(np.stack(batch))


def _pictures(folder: Path) -> list[str]:
    if folder.is_file():
        raise UserError(f"{folder}: is a file, but no npz; give a folder of images, an npz, or a shard folder")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder of images, an npz, or a shard folder")
    sampled = (folder / "sampling.json").is_file()  # then our overview of all images lies beside them
    kept = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.suffix.lower()[1:] not in SUFFIXES or any(part.startswith(".") for part in name.parts):
            continue
        # an evaluation's overview lies there, too, where its ``out`` is inside of the folder that is evaluated
        report = path.name == "images.png" and path.with_suffix(".json").is_file()
        if not report and not (sampled and str(name) == "grid.png"):
            kept.append(str(name))
    if not kept:
        raise UserError(f"{folder}: holds no images ({', '.join(SUFFIXES)}); give a folder that does")
    return sorted(kept)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What is wrong with a picture's file, in one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"image {path}: cannot be read ({error.strerror})") from error
    except ImageError as error:
        raise UserError(f"image {path}: {error}; replace or remove it") from error


class ArchiveImages(ImageSource):
    """``arr_0`` of an npz, uint8 (N, H, W, 3), as ADM's evaluator reads it. Mapped where it is stored uncompressed.

    Raises:
        UserError: no such file or array, or one of another type or shape.
    """

    def __init__(self, path: Path) -> None:
        self.name, self.path = str(path), path
        self._offset = _stored_offset(path)
        images = self._images()
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not len(images):
            raise UserError(
                f"{path}: arr_0 is {images.dtype} of shape {images.shape}; it must be uint8 (images, height, width, 3)"
            )
        self.parts, self.size = cut(len(images)), (images.shape[1], images.shape[2])
        about = path.stat()
        self.identity = {"npz": self.name, "images": len(images), "bytes": about.st_size, "modified": about.st_mtime_ns}

    def _images(self) -> np.ndarray:
        try:
            if self._offset is None:
                return _unpacked(self.path)
            with self.path.open("rb") as stream:
                stream.seek(self._offset)
                shape, fortran, dtype = array_header(stream)
                return np.memmap(self.path, dtype, "r", stream.tell(), shape, "F" if fortran else "C")
        except DAMAGED as error:
            raise UserError(f"{self.path}: {_UNREADABLE}") from error

    def read(self, part: int, batch_size: int) -> Iterator[Tensor]:
        images = self._images()[part * PART : (part + 1) * PART]
        for first in range(0, len(images), batch_size):
            yield torch.from_numpy(np.ascontiguousarray(images[first : first + batch_size].transpose(0, 3, 1, 2)))


_UNREADABLE = "arr_0 cannot be read: it is damaged, cut off or pickled"


@lru_cache(maxsize=1)
def _unpacked(path: Path) -> np.ndarray:
    with open_arrays(path) as file:
        return read_array(path, file, "arr_0")


def _stored_offset(path: Path) -> int | None:
    """Where ``arr_0.npy`` begins in an npz; None where it is compressed."""
    with open_arrays(path) as file:
        if "arr_0" not in file:
            held = ", ".join(file) or "nothing"
            raise UserError(
                f"{path}: holds no arr_0 (it has {held}); images are uint8 (images, height, width, 3) there"
            )
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo("arr_0.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            return None
        with path.open("rb") as stream:
            stream.seek(member.header_offset + 26)  # of the local header, whose extra field is its own
            name, extra = struct.unpack("<HH", stream.read(4))
    except DAMAGED as error:
        raise UserError(f"{path}: {_UNREADABLE}") from error
    return member.header_offset + 30 + name + extra


class ShardImages(ImageSource):
    """A split of a shard folder, cut to size as validation does it; a part is a shard.

    Args:
        path: of the shard folder.
        split: its name.
        image_size: side of the images, or (height, width).
        crop, resize_ratio: as of `ShardsDataModule`.
        workers: loading processes.
        at_least: only as many shards as hold so many images; all if not given.

    Raises:
        UserError: no such folder or split, or a missing shard.
    """

    def __init__(
        self,
        path: str,
        split: str,
        image_size: Size,
        crop: str = "center",
        resize_ratio: float = 1.125,
        workers: int = 0,
        at_least: int | None = None,
    ) -> None:
        self.name, self.size, self.split, self.workers = f"{path} ({split})", height_width(image_size), split, workers
        cutting = {"resize_ratio": resize_ratio, "val_crop": crop}
        self.arguments: dict[str, Any] = {"path": path, "image_size": as_written(image_size), **cutting}
        data = open_data(path, image_size, split, 1, resize_ratio, crop, channels=3)
        self.parts, self.splits = [], {name for name, part in data.index.splits.items() if part.samples}
        shards = data.index.split(split).shards
        for shard in shards:
            if at_least is None or sum(self.parts) < at_least:
                self.parts.append(shard.samples)
        digest = hashlib.sha256(repr(shards[: len(self.parts)]).encode()).hexdigest()
        self.identity = {**self.arguments, "split": split, "images": len(self), "shards": digest}

    def read(self, part: int, batch_size: int) -> Iterator[Tensor]:
        data = ShardsDataModule(**self.arguments, batch_size=batch_size, num_workers=0, channels=3)
        watch = data.val_transform = SizeWatch(data.val_transform, self.size)
        whole = data.ordered_dataloader(self.split).stream
        config = replace(whole.config, rank=0, world_size=1)
        stream = ValidationStream(whole.reader, whole.shards[part : part + 1], config)
        loader = StreamLoader(stream, self.workers)
        try:
            for batch in loader:
                yield batch["image"]
                self.enlarged |= watch.enlarged
        finally:
            loader.close()


def open_data(
    path: str,
    image_size: Size,
    split: str,
    batch_size: int,
    resize_ratio: float,
    crop: str,
    workers: int = 0,
    channels: int | None = None,
) -> ShardsDataModule:
    """Shards, cut as validation does. Raises UserError for an empty split, a missing shard, or other channels."""
    cut: dict[str, Any] = {"resize_ratio": resize_ratio, "val_crop": crop}
    data = ShardsDataModule(path, image_size, batch_size, num_workers=workers, channels=channels, **cut)
    _ = data.form
    if not data.index.split(split).samples:
        held = ", ".join(name for name, part in data.index.splits.items() if part.samples)
        raise UserError(f"``split`` {split}: {path} has no such images; it has {held or 'none at all'}")
    data.setup("validate")
    return data


class Numbered(NamedTuple):
    """Images of a batch with what it holds beside them, and the number of the first among all."""

    first: int
    batch: Mapping[str, Tensor]


def numbered(
    ranks: Ranks, loader: Iterable[Mapping[str, Tensor]], count: int | None = None
) -> Iterator[Numbered | None]:
    """The first ``count`` images (all, if not given) of a loader that gives this process' turns, for `Ranks.each`."""
    seen, limit = 0, sys.maxsize if count is None else count
    with loading(loader) as opened:
        batches = iter(opened)
        while seen < limit:
            with ranks.agreed():
                batch = next(batches, None)
            sizes = ranks.exchange(-1 if batch is None else len(batch["image"]))
            if max(sizes) < 0:
                return
            first = seen + sum(max(size, 0) for size in sizes[: ranks.rank])
            if batch is None or first >= limit:
                yield None
            else:
                yield Numbered(first, {name: rows[: limit - first] for name, rows in batch.items()})
            seen += sum(max(size, 0) for size in sizes)


def open_images(path: Path) -> ImageSource:
    """A folder of pictures or an npz."""
    return ArchiveImages(path) if path.suffix.lower() == ".npz" else FolderImages(path)


# Notices images that had to be enlarged: figures of such images say little, and nothing else would tell.


class SizeWatch:
    """A transform that remembers whether any image was smaller than what it is cut to; also in loading processes."""

    def __init__(self, transform: Transform, image_size: Size) -> None:
        self.transform, (self.height, self.width) = transform, height_width(image_size)
        self._smaller = torch.zeros(1, dtype=torch.bool).share_memory_()

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        if image.width < self.width or image.height < self.height:
            self._smaller.fill_(True)
        return self.transform(image, rng)

    @property
    def enlarged(self) -> bool:
        return bool(self._smaller)
