"""Writing WebDataset shards: same images, same bytes, whatever the number of processes, and nothing half-written.

A sample is two members of a tar file: KEY.cls (the label as an ASCII integer) and KEY.jpg, .png or .webp (the image
file as it was). Samples are shuffled with a fixed seed on the way, so every shard mixes the classes.

The shuffled row of a split is cut into chunks of equally many samples, the units of work. A chunk becomes one shard, or
more where it is over the limit of bytes. Finished chunks lie in a working folder beside the destination, each with a
record; once all are there the shards get their numbers, the index is written, and the folder takes its name.
"""

from __future__ import annotations

import hashlib
import io
import math
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from webdataset import TarWriter

from mvar_lightning.data.chunks import Chunk, ChunkRecord, WritingFailed, run_chunks
from mvar_lightning.data.images import ImageError, decode_rgb, suffix_of
from mvar_lightning.data.index import INDEX_NAME, ShardIndex, ShardInfo, SplitIndex, sha256_of
from mvar_lightning.data.sources import Example, Source
from mvar_lightning.data.transforms import resize_shorter
from mvar_lightning.data.work_folder import RECORDS_NAME, WorkFolder, thrown_away_on_failure
from mvar_lightning.errors import UserError

Progress = Callable[[int], None]
"""Told the number of samples just written."""

SKIPPED_NAME = "skipped.txt"


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


@dataclass(frozen=True)
class ChunkWriter:
    """Writes one chunk; made once and sent to every process.

    Args:
        folder: the working folder.
        max_bytes: a shard ends once it is this long.
        resize: new shorter side in pixels, None copies the bytes.
        skip_damaged: leave out and note images that cannot be read, instead of stopping at the first.
    """

    folder: Path
    max_bytes: int
    resize: int | None
    skip_damaged: bool

    def __call__(self, chunk: Chunk, report: Progress = lambda count: None) -> ChunkRecord:
        """Raises UserError at an unreadable image unless those are skipped, OSError where writing fails."""
        shards: list[ShardInfo] = []
        skipped: list[str] = []
        done = 0
        while done < len(chunk.examples):
            name = f"{chunk.split}/part-{chunk.number:06d}-{len(shards):02d}.tar"
            taken, written = self._shard(self.folder / name, chunk, done, skipped, report)
            if written:
                path = self.folder / name
                shards.append(ShardInfo(name, written, path.stat().st_size, sha256_of(path)))
            done += taken
        return ChunkRecord(tuple(shards), tuple(skipped), len(chunk.examples))

    def _shard(self, path: Path, chunk: Chunk, first: int, skipped: list[str], report: Progress) -> tuple[int, int]:
        """Write examples from the first on until the shard is full: how many were taken, how many went in."""
        taken = written = total = 0
        # Fixed owner, mode and time: the bytes of a shard depend on its samples alone.
        with path.open("wb") as file, TarWriter(file, user="mvar", group="mvar", mtime=0, encoder=False) as tar:
            for example in chunk.examples[first:]:
                sample = self._encode(example, chunk.first_key + first + taken, skipped)
                taken += 1
                if sample is not None:
                    total += tar.write(sample)
                    written += 1
                report(1)
                if total >= self.max_bytes:
                    break
        if not written:
            path.unlink()
        return taken, written

    def _encode(self, example: Example, number: int, skipped: list[str]) -> dict[str, str | bytes] | None:
        try:
            data = example.load()
            suffix = suffix_of(data)
            if self.resize is not None:
                data = shrink(data, suffix, self.resize)
        except (ImageError, UserError) as error:
            told = str(error) if isinstance(error, UserError) else f"image {example.name}: {error}"
            if not self.skip_damaged:
                raise UserError(f"{told}; remove or replace it, or leave such out with --skip-damaged") from None
            skipped.append(told)
            return None
        return {"__key__": f"{number:08d}", "cls": str(example.label).encode("ascii"), suffix: data}


def write_shards(
    source: Source,
    destination: str | Path,
    limits: ShardLimits | None = None,
    resize: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    workers: int = 0,
    resume: bool = False,
    skip_damaged: bool = False,
) -> ShardIndex:
    """Write both splits and the index into a new folder.

    Args:
        source: the images.
        destination: a new or empty folder.
        limits: when a shard is full.
        resize: shrinks the shorter side to that many pixels (Lanczos, from the full picture) and encodes anew, in the
            same format (JPEG and WebP at quality 95); otherwise bytes are copied.
        seed: of the order.
        progress: told what is done.
        workers: processes that write; 0 writes in this one. The bytes do not depend on it.
        resume: keep finished chunks when something fails or the process is killed, and go on from those of an earlier
            call with the same source and options; otherwise nothing is left behind.
        skip_damaged: see `ChunkWriter`; what was left out is listed in ``skipped.txt``.

    Raises:
        UserError: the destination holds something or cannot be written, an earlier call with other options has left its
            work there, another one is at it, or an image is unreadable (named).
    """
    if resize is not None and resize < 1:
        raise UserError(f"resize {resize}: give the new shorter side in pixels, 1 or more")
    if workers < 0:
        raise UserError(f"--workers {workers}: must be 0 (this process) or more")
    limits, report = limits or ShardLimits(), progress or (lambda count: None)
    plan = _plan(source, limits, resize, seed, skip_damaged)
    opened = WorkFolder(Path(destination), plan).opened() if resume else thrown_away_on_failure(Path(destination))
    with opened as folder:
        writer = ChunkWriter(folder, limits.bytes, resize, skip_damaged)
        for split in SPLITS:
            (folder / split).mkdir(exist_ok=True)
        try:
            records = run_chunks(list(_chunks(source, limits, seed)), folder, writer, workers, report)
        except WritingFailed as failure:
            kept = f"; what is finished is kept in {folder}, the same command goes on" if resume else ""
            raise UserError(f"destination {destination}: {failure}{kept}") from failure
        index = ShardIndex(source.class_names, {split: _named(folder, split, records[split]) for split in SPLITS})
        _write_skipped(folder, [name for split in SPLITS for record in records[split] for name in record.skipped])
        (folder / INDEX_NAME).write_text(index.to_json(), encoding="utf-8")
        shutil.rmtree(folder / RECORDS_NAME)
    return index


SPLITS = ("train", "val")


def _examples(source: Source, split: str) -> Sequence[Example]:
    return source.train if split == "train" else source.val


def _chunks(source: Source, limits: ShardLimits, seed: int) -> Iterator[Chunk]:
    """The units of work. Their examples are made when they are asked for."""
    for split in SPLITS:
        examples = _examples(source, split)
        if not examples:
            continue
        order = random.Random(f"{seed}/{split}").sample(range(len(examples)), len(examples))
        size = limits.samples_per_shard(len(examples))
        for number, first in enumerate(range(0, len(order), size)):
            yield Chunk(split, number, first, examples, order[first : first + size])


def _plan(
    source: Source, limits: ShardLimits, resize: int | None, seed: int, skip_damaged: bool
) -> dict[str, str | int | bool | None]:
    """What must be the same for finished chunks to be used again."""
    plan: dict[str, str | int | bool | None] = {
        "samples per shard": limits.samples,
        "bytes per shard": limits.bytes,
        "resize": resize,
        "seed": seed,
        "skip damaged": skip_damaged,
        "classes": hashlib.sha256("\n".join(source.class_names).encode()).hexdigest(),
    }
    for split in SPLITS:
        digest = hashlib.sha256()
        for example in _examples(source, split):
            digest.update(f"{example.label} {example.name}\n".encode())
        plan[f"{split} images"] = digest.hexdigest()
    return plan


def _named(folder: Path, split: str, records: Sequence[ChunkRecord]) -> SplitIndex:
    """Give the shards their numbers. A call that was killed in here finds some of them renamed already."""
    shards = []
    for number, part in enumerate(shard for record in records for shard in record.shards):
        name = f"{split}/{number:06d}.tar"
        if (folder / part.name).exists():
            (folder / part.name).rename(folder / name)
        shards.append(ShardInfo(name, part.samples, part.bytes, part.sha256))
    return SplitIndex(tuple(shards))


def _write_skipped(folder: Path, skipped: Sequence[str]) -> None:
    if skipped:
        (folder / SKIPPED_NAME).write_text("".join(f"{name}\n" for name in skipped), encoding="utf-8")


def shrink(data: bytes, suffix: str, side: int) -> bytes:
    """The image with its shorter side at `side`, in its own format (JPEG and WebP at quality 95); small ones as is."""
    image = decode_rgb(data)
    if min(image.size) <= side:
        return data
    buffer = io.BytesIO()
    resize_shorter(image, side).save(buffer, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix], quality=95)
    return buffer.getvalue()
