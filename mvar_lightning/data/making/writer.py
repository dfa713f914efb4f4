"""One chunk of samples to tar files: encoded images as they were or reduced, with length and checksum."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from mvar_lightning.data.images import RGB, ImageError, PixelForm, decode, of_form, suffix_of
from mvar_lightning.data.index import INDEX_NAME, ShardInfo, content_problem, parse, read_bytes, typed
from mvar_lightning.data.making.sources import Example
from mvar_lightning.data.transforms import resize_shorter
from mvar_lightning.errors import UserError
from mvar_lightning.tools.files import write
from mvar_lightning.tools.processes import process_pool


@dataclass(frozen=True)
class ChunkWriter:
    """Writes one chunk; made once and sent to every process.

    Args:
        folder: where the shards lie while they are made.
        max_bytes: a shard ends once it is this long.
        resize: new shorter side in pixels, None copies the bytes.
        skip_damaged: leave out and note images that cannot be read, instead of stopping at the first.
        decode: decode every image that is copied, not just its header.
        form: of the pictures. RGB takes every kind, as reading converts it; of others they must be.
    """

    folder: Path
    max_bytes: int
    resize: int | None
    skip_damaged: bool
    decode: bool = False
    form: PixelForm = RGB

    def __call__(self, chunk: Chunk) -> ChunkRecord:
        """Raises UserError at an unreadable image unless those are skipped, OSError where writing fails."""
        if chunk.record is not None and self._is_sound(chunk.record):
            return chunk.record
        shards: list[ShardInfo] = []
        skipped: list[str] = []
        numbered = enumerate(chunk.examples(), start=chunk.first_key)
        done = False
        while not done:
            name = f"{chunk.split}/part-{chunk.number:06d}-{len(shards):02d}.tar"
            shard, done = self._shard(name, numbered, skipped)
            if shard is not None:
                shards.append(shard)
        return ChunkRecord(tuple(shards), tuple(skipped), len(chunk))

    def _is_sound(self, record: ChunkRecord) -> bool:
        if record.skipped and not self.skip_damaged:
            return False
        try:
            return not any(content_problem(s, {s.name: self.folder / s.name}, INDEX_NAME) for s in record.shards)
        except OSError:
            return False

    def _shard(
        self, name: str, examples: Iterator[tuple[int, Example]], skipped: list[str]
    ) -> tuple[ShardInfo | None, bool]:
        """Take examples until the shard is full: the shard, if anything went in, and whether they came to an end."""
        path = self.folder / name
        written, total, done = 0, 0, True
        try:
            with path.open("wb") as file:
                tar = TarWriter(hashed := _Hashed(file))
                for number, example in examples:
                    sample = self._encode(example, number, skipped)
                    if sample is not None:
                        total += tar.write(sample)
                        written += 1
                    if total >= self.max_bytes:
                        done = False
                        break
                tar.end()
        except BaseException:
            path.unlink(missing_ok=True)  # on a full disk it would be in the way
            raise
        if not written:
            path.unlink()
            return None, done
        return ShardInfo(name, written, hashed.bytes, hashed.sha256.hexdigest()), done

    def _encode(self, example: Example, number: int, skipped: list[str]) -> dict[str, bytes] | None:
        """Members of the sample by their names, in order."""
        try:
            data = example.load() if self.form == RGB else of_form(example.load(), self.form)
            suffix = example.suffix or suffix_of(data)
            if self.resize is not None:
                data = shrink(data, suffix, self.resize, self.form)
            elif self.decode:
                decode(data, self.form)
        except (ImageError, UserError) as error:
            message = error.marked if isinstance(error, UserError) else f"image {example.name}: {error}"
            if not self.skip_damaged:
                raise UserError(f"{message}; replace it, or leave such images out with ``skip_damaged``") from None
            skipped.append(message)
            return None
        return {f"{number:08d}.cls": str(example.label).encode("ascii"), f"{number:08d}.{suffix}": data}


class TarWriter:
    """A tar file as webdataset and tarfile write it, to the byte, with a fixed owner, mode and time: a shard's bytes
    depend on its samples alone.

    tarfile makes one header, which every member has a copy of with its own name, size and sum: making each anew was
    half of the time that a small image took.
    """

    def __init__(self, file: IO[bytes] | _Hashed) -> None:
        info = tarfile.TarInfo()
        info.uname = info.gname = "mvar"
        info.mode = 0o444
        self.file, self.bytes = file, 0
        self.blank = info.tobuf(tarfile.USTAR_FORMAT)
        # of all but name, size and the sum itself, which counts as eight spaces
        self.blank_sum = sum(self.blank[:124]) + sum(self.blank[136:148]) + 8 * ord(" ") + sum(self.blank[156:])

    def write(self, members: Mapping[str, bytes]) -> int:
        """Append files by their names, which are ASCII of at most 99 characters; gives the bytes of their content."""
        parts = []
        for name, content in members.items():
            parts += [self._header(name.encode("ascii"), len(content)), content, bytes(-len(content) % BLOCK)]
        whole = b"".join(parts)
        self.file.write(whole)
        self.bytes += len(whole)
        return sum(map(len, members.values()))

    def end(self) -> None:
        """Two blocks of zeros, and more up to a whole record."""
        ending = 2 * BLOCK
        self.file.write(bytes(ending + -(self.bytes + ending) % tarfile.RECORDSIZE))

    def _header(self, name: bytes, size: int) -> bytes:
        digits = b"%011o\0" % size
        total = b"%06o\0" % (self.blank_sum + sum(name) + sum(digits))
        return b"".join((name, self.blank[len(name) : 124], digits, self.blank[136:148], total, self.blank[155:]))


BLOCK = tarfile.BLOCKSIZE


class _Hashed:
    """A file that is written in one go, with its length and checksum at the end."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.bytes, self.sha256 = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self.file.write(data)


def shrink(data: bytes, suffix: str, side: int, form: PixelForm = RGB) -> bytes:
    """The image with its shorter side at `side`, in its own format (JPEG and WebP at quality 95); small ones as is."""
    image = decode(data, form)
    if min(image.size) <= side:
        return data
    buffer = io.BytesIO()
    resize_shorter(image, side).save(buffer, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix], quality=95)
    return buffer.getvalue()


# Chunks of samples, written by this process or by several, each finished one kept with a record of what it became.


class WritingFailed(Exception):
    """The disk or a process failed; the message says how."""


@dataclass(frozen=True)
class ChunkRecord:
    """What a chunk became: shards by their working names, what was left out, and how many samples were taken."""

    shards: tuple[ShardInfo, ...]
    skipped: tuple[str, ...]
    taken: int

    @classmethod
    def read(cls, path: Path) -> ChunkRecord | None:
        """The record that `run_chunks` wrote, if there is one."""
        try:
            return parse(read_bytes(path), cls._of, str(path), "")
        except (OSError, UserError):
            return None

    @classmethod
    def _of(cls, content: Any) -> ChunkRecord:
        shards = tuple(map(ShardInfo.from_json, typed(content, "shards", list)))
        return cls(shards, tuple(map(str, typed(content, "skipped", list))), typed(content, "taken", int))


@dataclass(frozen=True)
class Chunk:
    """Samples that are written together: a stretch of the shuffled row of a split.

    Args:
        split, number: the chunk's name; the number counts the chunks of the split.
        first_key: index of the first sample in the row.
        of, indices: the split's examples, and which of them these are. They are made on demand, and sent to another
            process by themselves: the split has a million.
        record: what an earlier call made of the chunk.
    """

    split: str
    number: int
    first_key: int
    of: Sequence[Example]
    indices: Sequence[int]
    record: ChunkRecord | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def examples(self) -> Iterator[Example]:
        return (self.of[index] for index in self.indices)

    def by_itself(self) -> Chunk:
        return replace(self, of=list(self.examples()), indices=range(len(self)))

    def record_path(self, folder: Path) -> Path:
        return folder / f"{self.split}-{self.number:06d}.json"


def run_chunks(
    chunks: Sequence[Chunk], records: Path, writer: ChunkWriter, workers: int, report: Callable[[int], None]
) -> list[ChunkRecord]:
    """Write every chunk that has no record with sound shards; the records of all, in order.

    `report` is given the number of samples of each chunk that is done.

    Raises:
        UserError: an unreadable image, the first in the order of the chunks.
        WritingFailed: the disk is full, or a process died.
    """
    found: dict[int, ChunkRecord] = {}
    here = ((index, writer(chunk)) for index, chunk in enumerate(chunks))
    try:
        for index, record in _in_processes(chunks, writer, workers) if workers else here:
            if record != chunks[index].record:
                write(chunks[index].record_path(records), json.dumps(asdict(record)))  # only now: its shards are there
            found[index] = record
            report(record.taken)
    except OSError as error:
        raise WritingFailed(f"writing failed ({error.strerror})") from error
    except BrokenProcessPool as error:
        raise WritingFailed("a writing process was killed (out of memory?); try fewer ``workers``") from error
    return [found[index] for index in range(len(chunks))]


def _in_processes(chunks: Sequence[Chunk], writer: ChunkWriter, workers: int) -> Iterator[tuple[int, ChunkRecord]]:
    """Indices and records of chunks as they get done, some ahead, no more: each carries its examples along.

    After a failure the chunks before it are finished, so that the failure raised is the first in order.
    """
    ahead = iter(range(len(chunks)))
    running: dict[Future[ChunkRecord], int] = {}
    failures: dict[int, BaseException] = {}
    with process_pool(workers, writer.__class__.__module__) as pool:
        while True:
            while not failures and len(running) < 2 * workers and (index := next(ahead, None)) is not None:
                running[pool.submit(writer, chunks[index].by_itself())] = index
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                index = running.pop(future)
                if future.cancelled():
                    continue
                if error := future.exception():
                    failures[index] = error
                    for other, later in running.items():
                        if later > index:
                            other.cancel()
                else:
                    yield index, future.result()
        if failures:
            raise failures[min(failures)]
