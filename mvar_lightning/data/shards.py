"""Writing WebDataset shards: same images, same bytes, and nothing half-written.

A sample is two members of a tar file: KEY.cls (the label as an ASCII integer) and KEY.jpg, .png or .webp (the image
file as it was). Samples are shuffled with a fixed seed on the way, so every shard mixes the classes.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from webdataset import TarWriter

from mvar_lightning.data.images import ImageError, decode_rgb, suffix_of
from mvar_lightning.data.index import INDEX_NAME, ShardIndex, ShardInfo, SplitIndex, sha256_of
from mvar_lightning.data.sources import Example, Source
from mvar_lightning.data.transforms import resize_shorter
from mvar_lightning.errors import UserError

Progress = Callable[[int], None]
"""Told the number of samples just written."""


@dataclass(frozen=True)
class ShardLimits:
    """When a shard is full. Small sets still get `min_shards` shards, so that several workers have work."""

    samples: int = 1000
    bytes: int = 256 * 1024**2
    min_shards: int = 4

    def __post_init__(self) -> None:
        if self.samples < 1 or self.bytes < 1 or self.min_shards < 1:
            raise UserError(
                f"shard limits: {self.samples} samples, {self.bytes} bytes, {self.min_shards} shards; "
                "each must be 1 or more (--samples-per-shard, --mb-per-shard)"
            )

    def samples_per_shard(self, total: int) -> int:
        """Samples a shard, evened out so that the last shard is not a stub."""
        shards = max(math.ceil(total / self.samples), min(self.min_shards, total))
        return math.ceil(total / shards)


def write_shards(
    source: Source,
    destination: str | Path,
    limits: ShardLimits | None = None,
    resize: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> ShardIndex:
    """Write both splits and the index into a new folder.

    `resize` shrinks the shorter side to that many pixels (Lanczos) and encodes anew; otherwise bytes are copied.
    Raises UserError when the destination holds something, cannot be written, or an image is unreadable (named).
    """
    if resize is not None and resize < 1:
        raise UserError(f"resize {resize}: give the new shorter side in pixels, 1 or more")
    limits = limits or ShardLimits()
    report = progress or (lambda count: None)
    with written_aside(Path(destination)) as folder:
        splits = {}
        for name, examples in (("train", source.train), ("val", source.val)):
            order = random.Random(f"{seed}/{name}").sample(examples, len(examples))
            splits[name] = _write_split(folder, name, order, limits, resize, report)
        index = ShardIndex(source.class_names, splits)
        (folder / INDEX_NAME).write_text(index.to_json(), encoding="utf-8")
    return index


@contextlib.contextmanager
def written_aside(destination: Path) -> Iterator[Path]:
    """A temporary folder beside `destination` that takes its name once everything is in it, and goes on failure."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"destination {destination}: already exists and is not empty; remove it or give another")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{destination.name}.partial-", dir=destination.parent))
    except OSError as error:
        raise UserError(f"destination {destination}: cannot be written ({error.strerror}); give another") from None
    try:
        yield aside
        aside.chmod(0o777 & ~_umask())
        aside.rename(destination)
    except OSError as error:
        raise UserError(f"destination {destination}: writing failed ({error.strerror}); nothing was kept") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_split(
    folder: Path, split: str, examples: Sequence[Example], limits: ShardLimits, resize: int | None, report: Progress
) -> SplitIndex:
    (folder / split).mkdir()
    per_shard = limits.samples_per_shard(len(examples)) if examples else 1
    shards: list[ShardInfo] = []
    written = 0
    while written < len(examples):
        name = f"{split}/{len(shards):06d}.tar"
        chunk = examples[written : written + per_shard]
        count = _write_shard(folder / name, chunk, written, limits.bytes, resize, report)
        shards.append(ShardInfo(name, count, (folder / name).stat().st_size, sha256_of(folder / name)))
        written += count
    return SplitIndex(tuple(shards))


def _write_shard(
    path: Path, examples: Sequence[Example], first_key: int, max_bytes: int, resize: int | None, report: Progress
) -> int:
    """Write examples until the shard is full; returns how many went in."""
    count = total = 0
    # Fixed owner, mode and time: the bytes of a shard depend on its samples alone.
    with path.open("wb") as file, TarWriter(file, user="mvar", group="mvar", mtime=0, encoder=False) as tar:
        for example in examples:
            total += tar.write(_encode(example, first_key + count, resize))
            count += 1
            report(1)
            if total >= max_bytes:
                break
    return count


def _encode(example: Example, number: int, resize: int | None) -> dict[str, str | bytes]:
    data = example.load()
    try:
        suffix = suffix_of(data)
        if resize is not None:
            data = shrink(data, suffix, resize)
    except ImageError as error:
        raise UserError(f"image {example.name}: {error}; remove or replace it") from None
    return {"__key__": f"{number:08d}", "cls": str(example.label).encode("ascii"), suffix: data}


def shrink(data: bytes, suffix: str, side: int) -> bytes:
    """The image with its shorter side at `side`, in its own format (JPEG and WebP at quality 95); small ones as is."""
    image = decode_rgb(data)
    if min(image.size) <= side:
        return data
    buffer = io.BytesIO()
    resize_shorter(image, side).save(buffer, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix], quality=95)
    return buffer.getvalue()
