"""One chunk of samples to tar files: encoded images as they were or reduced, with length and checksum."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from webdataset import TarWriter

from mvar_lightning.data.chunks import Chunk, ChunkRecord
from mvar_lightning.data.images import ImageError, decode_rgb, suffix_of
from mvar_lightning.data.index import ShardInfo, sha256_of
from mvar_lightning.data.sources import Example
from mvar_lightning.data.transforms import resize_shorter
from mvar_lightning.errors import UserError

Progress = Callable[[int], None]
"""Told the number of samples just written."""


@dataclass(frozen=True)
class ChunkWriter:
    """Writes one chunk; made once and sent to every process.

    Args:
        folder: where the shards lie while they are made.
        max_bytes: a shard ends once it is this long.
        resize: new shorter side in pixels, None copies the bytes.
        skip_damaged: leave out and note images that cannot be read, instead of stopping at the first.
        decode: decode every image that is copied, not just its header.
    """

    folder: Path
    max_bytes: int
    resize: int | None
    skip_damaged: bool
    decode: bool = False

    def __call__(self, chunk: Chunk, report: Progress = lambda count: None) -> ChunkRecord:
        """Raises UserError at an unreadable image unless those are skipped, OSError where writing fails."""
        if chunk.record is not None and self._is_sound(chunk.record):
            report(chunk.record.taken)
            return chunk.record
        shards: list[ShardInfo] = []
        skipped: list[str] = []
        numbered = enumerate(chunk.examples(), start=chunk.first_key)
        done = False
        while not done:
            name = f"{chunk.split}/part-{chunk.number:06d}-{len(shards):02d}.tar"
            shard, done = self._shard(name, numbered, skipped, report)
            if shard is not None:
                shards.append(shard)
        return ChunkRecord(tuple(shards), tuple(skipped), len(chunk))

    def _is_sound(self, record: ChunkRecord) -> bool:
        if record.skipped and not self.skip_damaged:
            return False
        return all(_is_sound(self.folder / shard.name, shard) for shard in record.shards)

    def _shard(
        self, name: str, examples: Iterator[tuple[int, Example]], skipped: list[str], report: Progress
    ) -> tuple[ShardInfo | None, bool]:
        """Take examples until the shard is full: the shard, if anything went in, and whether they came to an end."""
        path = self.folder / name
        written, total, done = 0, 0, True
        try:
            # Fixed owner, mode and time: the bytes of a shard depend on its samples alone.
            with (
                path.open("wb") as file,
                TarWriter(hashed := _Hashed(file), user="mvar", group="mvar", mtime=0, encoder=False) as tar,
            ):
                for number, example in examples:
                    sample = self._encode(example, number, skipped)
                    if sample is not None:
                        total += tar.write(sample)
                        written += 1
                    report(1)
                    if total >= self.max_bytes:
                        done = False
                        break
        except BaseException:
            path.unlink(missing_ok=True)  # on a full disk it would be in the way
            raise
        if not written:
            path.unlink()
            return None, done
        return ShardInfo(name, written, hashed.bytes, hashed.sha256.hexdigest()), done

    def _encode(self, example: Example, number: int, skipped: list[str]) -> dict[str, str | bytes] | None:
        try:
            data = example.load()
            suffix = suffix_of(data)
            if self.resize is not None:
                data = shrink(data, suffix, self.resize)
            elif self.decode:
                decode_rgb(data)
        except (ImageError, UserError) as error:
            told = str(error) if isinstance(error, UserError) else f"image {example.name}: {error}"
            if not self.skip_damaged:
                raise UserError(f"{told}; replace it, or leave such images out with --skip-damaged") from None
            skipped.append(told)
            return None
        return {"__key__": f"{number:08d}", "cls": str(example.label).encode("ascii"), suffix: data}


class _Hashed:
    """A file that is written in one go, with its length and checksum at the end."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.bytes, self.sha256 = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self.file.write(data)


def _is_sound(path: Path, shard: ShardInfo) -> bool:
    try:
        return path.stat().st_size == shard.bytes and sha256_of(path) == shard.sha256
    except OSError:
        return False


def shrink(data: bytes, suffix: str, side: int) -> bytes:
    """The image with its shorter side at `side`, in its own format (JPEG and WebP at quality 95); small ones as is."""
    image = decode_rgb(data)
    if min(image.size) <= side:
        return data
    buffer = io.BytesIO()
    resize_shorter(image, side).save(buffer, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix], quality=95)
    return buffer.getvalue()
