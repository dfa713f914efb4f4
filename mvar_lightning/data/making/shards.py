"""Writing WebDataset shards: same images, same bytes, whatever the number of processes, and nothing half-written.

A sample is two members of a tar file: KEY.cls (the label as an ASCII integer) and KEY.jpg, .png or .webp (the image
file as it was). Samples are shuffled with a fixed seed on the way, so every shard mixes the classes.

The shuffled row of a split is cut into chunks of equally many samples, the units of work. A chunk becomes one shard, or
more where it is over the limit of bytes. Finished chunks lie in a working folder beside the destination, each with a
record; once all are there the shards get their numbers, the index is written, and they become the destination.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import logging
import math
import os
import random
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mvar_lightning.data.images import RGB, TIFF, PixelForm
from mvar_lightning.data.index import INDEX_NAME, ShardIndex, ShardInfo, SplitIndex, read_index
from mvar_lightning.data.making.embedded import EMBEDDED, load_source
from mvar_lightning.data.making.sources import Source
from mvar_lightning.data.making.writer import Chunk, ChunkRecord, ChunkWriter, WritingFailed, run_chunks
from mvar_lightning.errors import UserError
from mvar_lightning.tools.console import Bar
from mvar_lightning.tools.files import Lock, claim, is_alive
from mvar_lightning.tools.processes import is_first_here, wait_until_visible
from mvar_lightning.tools.remote import is_url, plain

log = logging.getLogger(__name__)

SKIPPED_NAME = "skipped.txt"

WORTH_PROCESSES = 10_000
"""Images from which on several processes, which take seconds to start, are worth it."""


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
                "each must be 1 or more (``samples_per_shard``, ``mb_per_shard``)"
            )

    def samples_per_shard(self, total: int) -> int:
        """Samples a shard, evened out so that the last shard is not a stub."""
        shards = max(math.ceil(total / self.samples), min(self.min_shards, total))
        return math.ceil(total / shards)


@dataclass(frozen=True)
class ShardsRequest:
    """What to write as shards, where, and how.

    Args:
        source: the images, or their name or path (see `load_source`).
        destination: a new or empty folder.
        limits: when a shard is full.
        resize: shrinks the shorter side to that many pixels (Lanczos, from the full picture) and encodes anew, in the
            same format (JPEG and WebP at quality 95); otherwise bytes are copied.
        seed: of the order, and of the split where the source has none.
        workers: processes that write; 0 writes in this one, None has one a core from 10,000 images on. The bytes do
            not depend on it.
        resume: keep finished chunks when something fails or the process is killed, and go on from those of an earlier
            call with the same source and options; otherwise nothing is left behind.
        fresh: forget those of an earlier call.
        skip_damaged: leave out images that cannot be read, and list them in ``skipped.txt``.
        decode: decode every image that is copied, so that truncated ones are found, too.
        val_fraction: share of each class for validation, where the source has no split.
        ground_truth: file with the labels of ImageNet's validation images, if it is not beside them.
        channels, bits: of the pictures. 3 of 8 takes every kind: reading converts it to RGB. 1 (of 8 or 16 bits) and 4
            keep gray and RGBA pictures as they are, and others are refused; TIFF is read then, too, and kept as PNG.

    Raises:
        UserError: a number that cannot be.
    """

    source: Source | str | Path
    destination: str | Path
    limits: ShardLimits = field(default_factory=ShardLimits)
    resize: int | None = None
    seed: int = 0
    workers: int | None = 0
    resume: bool = False
    fresh: bool = False
    skip_damaged: bool = False
    decode: bool = False
    val_fraction: float = 0.1
    ground_truth: str | Path | None = None
    channels: int = 3
    bits: int = 8

    @property
    def form(self) -> PixelForm:
        return PixelForm(self.channels, self.bits)

    def __post_init__(self) -> None:
        PixelForm(self.channels, self.bits)
        if self.resize is not None and self.resize < 1:
            raise UserError(f"resize {self.resize}: give the new shorter side in pixels, 1 or more")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"``workers`` {self.workers}: must be 0 (this process) or more")


def make_shards(
    request: ShardsRequest, show: Callable[[str, int], AbstractContextManager[Bar]] | None = None
) -> ShardIndex:
    """Write both splits and the index into a new folder. `show` makes a progress bar (`tools.console.progress`).

    Raises:
        UserError: no such source, the destination holds something or cannot be written, an earlier call with other
            options has left its work there, another one is at it, or an image is unreadable (named).
    """
    source = request.source
    if not isinstance(source, Source):
        scans = () if request.form == RGB else TIFF
        source = load_source(source, request.val_fraction, request.seed, request.ground_truth, scans)
    work = WorkFolder(request, _plan(source, request))
    images = len(source.train) + len(source.val)
    with work.opened(), show("images", images) if show is not None else nullcontext() as bar:
        for note in source.notes:
            (log.warning if bar is None else bar.say)(note)
        try:
            return _fill(work, source, request, bar)
        except WritingFailed as failure:
            raise UserError(f"destination {work.destination}: {failure}{work.kept}") from failure
        except OSError as error:
            raise UserError(f"destination {work.destination}: writing failed ({error.strerror}){work.kept}") from error
        except UserError as error:
            raise UserError(f"{error.marked}{work.kept}") from None
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped{work.kept}") from None


def ensure(path: str | Path) -> ShardIndex:
    """Index of a shard folder or URL; a missing folder named like an embedded data set (`data/digits`) is made first.

    Raises UserError for any other folder that is missing or empty. Several processes may call this at once: the first
    of each machine makes it, the others wait.
    """
    folder = Path(plain(str(path)))
    is_there = is_url(plain(str(path))) or folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if is_there or folder.name not in EMBEDDED:
        return read_index(path)
    if not is_first_here():
        with contextlib.suppress(UserError):  # nobody makes it
            wait_until_visible(folder / INDEX_NAME)
            return read_index(folder)
    try:
        return make_shards(ShardsRequest(folder.name, folder))
    except UserError:
        if (folder / INDEX_NAME).is_file():  # another process was first; its folder is complete
            return read_index(folder)
        raise


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


SPLITS = ("train", "val")


def _fill(work: WorkFolder, source: Source, request: ShardsRequest, bar: Bar | None) -> ShardIndex:
    """Everything that the destination will hold."""
    for split in SPLITS:
        (work.shards / split).mkdir(exist_ok=True)
    chunks = [
        replace(chunk, record=ChunkRecord.read(chunk.record_path(work.records)))
        for chunk in _chunks(source, request.limits, request.seed)
    ]
    if bar is not None and (finished := sum(chunk.record is not None for chunk in chunks)):
        bar.say(f"{work.destination}: going on, {finished} of {len(chunks)} parts were finished and are verified")
    _take_back_names(work.shards, chunks)
    options = (request.resize, request.skip_damaged, request.decode, request.form)
    writer = ChunkWriter(work.shards, request.limits.bytes, *options)
    workers = request.workers
    if workers is None:
        workers = cores() if len(source.train) + len(source.val) >= WORTH_PROCESSES and cores() > 1 else 0
    records = run_chunks(chunks, work.records, writer, workers, bar.advance if bar is not None else lambda count: None)
    named = {split: list(_names(split, chunks, records)) for split in SPLITS}
    splits = {split: SplitIndex(tuple(shard for _, shard in named[split])) for split in SPLITS}
    index = ShardIndex(source.class_names, splits, request.form)
    skipped = [name for record in records for name in record.skipped]
    if not all(index.split(split).samples for split in SPLITS if source.split(split)):
        raise UserError(f"all images of a split are damaged, first: {skipped[0]}")
    # the shards get their names only now: how many shards a chunk makes is known when it is written
    for split in SPLITS:
        for working, shard in named[split]:
            (work.shards / working).rename(work.shards / shard.name)
    if skipped:
        (work.shards / SKIPPED_NAME).write_text("".join(f"{name}\n" for name in skipped), "utf-8", "backslashreplace")
    (work.shards / INDEX_NAME).write_text(index.to_json(), encoding="utf-8")
    return index


def _chunks(source: Source, limits: ShardLimits, seed: int) -> Iterator[Chunk]:
    """The units of work. Their examples are made when they are asked for."""
    for split in SPLITS:
        examples = source.split(split)
        if not examples:
            continue
        order = array("l", random.Random(f"{seed}/{split}").sample(range(len(examples)), len(examples)))
        size = limits.samples_per_shard(len(examples))
        for number, first in enumerate(range(0, len(order), size)):
            yield Chunk(split, number, first, examples, order[first : first + size])


def _plan(source: Source, request: ShardsRequest) -> dict[str, str | int | bool | None]:
    """What must be the same for finished chunks to be used again."""
    plan: dict[str, str | int | bool | None] = {
        "samples per shard": request.limits.samples,
        "bytes per shard": request.limits.bytes,
        "resize": request.resize,
        "seed": request.seed,
        "decode": request.decode,
        "classes": hashlib.sha256("\n".join(source.class_names).encode()).hexdigest(),
        **({} if request.form == RGB else asdict(request.form)),
    }
    for split in SPLITS:
        digest = hashlib.sha256()
        for example in source.split(split):
            digest.update(f"{example.label} {example.name}\n".encode(errors="surrogateescape"))
        plan[f"{split} images"] = f"{len(source.split(split))} {digest.hexdigest()}"
    return plan


def _names(split: str, chunks: Sequence[Chunk], records: Sequence[ChunkRecord]) -> Iterator[tuple[str, ShardInfo]]:
    """Working name of each shard of a split in order, and the shard under the name that it will have."""
    of_split = [record for chunk, record in zip(chunks, records, strict=True) if chunk.split == split]
    for number, part in enumerate(part for record in of_split for part in record.shards):
        yield part.name, replace(part, name=f"{split}/{number:06d}.tar")


def _take_back_names(folder: Path, chunks: Sequence[Chunk]) -> None:
    """Undo the numbering that a killed call had begun; it begins only when all chunks have records."""
    records = [chunk.record for chunk in chunks if chunk.record is not None]
    if len(records) < len(chunks):
        return
    for split in SPLITS:
        for working, shard in _names(split, chunks, records):
            if (folder / shard.name).exists():
                (folder / shard.name).rename(folder / working)


# Where shards are while they are made: a folder beside the destination, which gets its content once all is there.


class WorkFolder:
    """Two folders: `shards`, which becomes the destination, and `records` of what is finished.

    Where the request says `resume`, they outlive a failure. `plan` must be the same for unfinished work to be used.
    """

    def __init__(self, request: ShardsRequest, plan: Mapping[str, Any]) -> None:
        self.destination = Path(os.path.realpath(request.destination))
        self.plan, self.keep, self.fresh = plan, request.resume, request.fresh
        self.path = work_path(self.destination)

    @property
    def shards(self) -> Path:
        return self.path / "shards"

    @property
    def records(self) -> Path:
        return self.path / "records"

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """The folder, for this process alone; it becomes the destination when the block ends without an exception.

        Raises:
            UserError: the destination holds something, unfinished work there has another plan, another process is at
                it, or the disk refuses.
        """
        destination = self.destination
        if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
            raise UserError(f"destination {destination}: already exists and is not empty; remove it or give another")
        if destination.is_mount():
            raise UserError(
                f"destination {destination}: is a mount point, which cannot be replaced; give a folder in it"
            )
        with self._telling("cannot be written"):
            destination.parent.mkdir(parents=True, exist_ok=True)
            if self.keep:
                self.path.mkdir(exist_ok=True)
            else:
                self._sweep()
                self.path = Path(tempfile.mkdtemp(prefix=f"{self.path.name}-{os.getpid()}-", dir=destination.parent))
            lock = Lock(self.path / "lock", f"destination {destination}: another process is making it ({self.path})")
            lock.take()
        try:
            self._claim()
            yield
            with self._telling("writing failed"):
                self.shards.rename(destination)
            shutil.rmtree(self.path, ignore_errors=True)
        finally:
            if not self.keep:
                shutil.rmtree(self.path, ignore_errors=True)
            lock.release()

    def _sweep(self) -> None:
        """Remove the folders of killed processes; others may be at the same destination now."""
        for left in self.destination.parent.glob(f"{glob.escape(self.path.name)}-*"):
            pid = left.name.removeprefix(f"{self.path.name}-").partition("-")[0]
            if pid == str(os.getpid()) or not (pid.isdecimal() and is_alive(int(pid))):
                with contextlib.suppress(UserError, OSError):  # a process of another machine is at it
                    Lock(left / "lock", "").check()
                    shutil.rmtree(left, ignore_errors=True)

    @property
    def kept(self) -> str:
        """What a message adds after a failure."""
        return f"; what is finished is kept in {self.path}, the same command goes on" if self.keep else ""

    def _claim(self) -> None:
        with self._telling("cannot be written"):
            if self.fresh:
                for folder in (self.shards, self.records):
                    shutil.rmtree(folder, ignore_errors=True)
                (self.path / "plan.json").unlink(missing_ok=True)
            for folder in (self.shards, self.records):
                folder.mkdir(exist_ok=True)
            claim(self.path / "plan.json", self.plan, self._refusal)

    def _refusal(self, name: str, theirs: Any, ours: Any) -> str:
        return (
            f"destination {self.destination}: unfinished work in {self.path} has other {name} ({str(theirs)[:8]}, now "
            f"{str(ours)[:8]}); go on with the command it was begun with, begin anew with ``fresh``, or give another "
            "destination"
        )

    @contextlib.contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"destination {self.destination}: {what} ({error.strerror}); give another") from error


def work_path(destination: Path) -> Path:
    """Where unfinished shards of a destination lie."""
    return destination.parent / f".{destination.name}.partial"
