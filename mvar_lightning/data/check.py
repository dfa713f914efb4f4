"""`mvar shards check`: whether shards are what their index says, and hold samples that can be used."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from mvar_lightning.data.images import PixelForm, SampleError
from mvar_lightning.data.images import decode as decode_picture
from mvar_lightning.data.index import INDEX_NAME, ShardInfo, content_problem, not_listed, read_index
from mvar_lightning.data.tar import RawSample, TarDamage, label_of, read_samples
from mvar_lightning.errors import UserError
from mvar_lightning.tools.processes import process_pool
from mvar_lightning.tools.remote import is_url, open_remote, plain


def check(
    folder: str | Path, workers: int = 1, decode: bool = False, progress: Callable[[int], None] | None = None
) -> list[str]:
    """Compare shards with the index: one line for each that is missing, damaged or not listed, and for each sample that
    lacks a picture or a label, or has two; empty when sound. At an address each shard is read once, and what is not
    listed is not looked for.

    Args:
        folder: what `mvar shards make` wrote, here or at an address.
        workers: shards that are read at a time.
        decode: also decode every image and label, and name those that cannot be.
        progress: given the number of shards just checked.

    Raises:
        UserError: there is no index.
    """
    folder = plain(str(folder))
    index = read_index(folder)
    listed = [shard for split in index.splits.values() for shard in split.shards]
    found = set() if is_url(folder) else {p.relative_to(folder).as_posix() for p in Path(folder).rglob("*.tar")}
    problems = []
    of_shard = partial(_problems, folder, _Wanted(index.num_classes, index.form) if decode else None)
    samples = sum(shard.samples for shard in listed) if decode else 0
    try:
        with _pool(max(1, workers), samples) as pool:
            for found_there in pool.map(of_shard, listed):
                problems += found_there
                if progress is not None:
                    progress(1)
    except BrokenProcessPool:
        raise UserError(f"{folder}: a checking process was killed, often for memory; give fewer ``workers``") from None
    return problems + not_listed(found, {shard.name for shard in listed}, INDEX_NAME)


class _Wanted(NamedTuple):
    """What samples are held against that are decoded."""

    classes: int
    form: PixelForm


WORTH_PROCESSES = 1000
"""Samples to decode: fewer are done before processes have started."""


def _pool(workers: int, samples: int) -> AbstractContextManager[Executor]:
    """Hashing lets other threads run; decoding a JPEG holds Python's lock (Pillow 12), so it wants processes."""
    if workers == 1 or samples < WORTH_PROCESSES:
        return ThreadPoolExecutor(workers)
    return process_pool(workers, __name__)


def _problems(folder: str, wanted: _Wanted | None, shard: ShardInfo) -> list[str]:
    """What is wrong with a shard; its samples are decoded where it is said what is wanted of them."""
    try:
        if is_url(folder):
            return _remote_problems(folder, wanted, shard)
        path = Path(folder) / shard.name
        if problem := content_problem(shard, {shard.name: path}, INDEX_NAME):
            return [problem]
        with path.open("rb") as file:
            return list(_sample_problems(file, shard, wanted))
    except OSError as error:
        return [f"{shard.name}: cannot be read ({error.strerror or error})"]


class _Hashed(io.RawIOBase):
    """A file that is read in order, and its checksum."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def read(self, size: int = -1, /) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        return data


def _remote_problems(root: str, wanted: _Wanted | None, shard: ShardInfo) -> list[str]:
    try:
        with open_remote(f"{root.rstrip('/')}/{shard.name}", shard.bytes, "shard") as file:
            hashed = _Hashed(file)
            problems = list(_sample_problems(hashed, shard, wanted))  # type: ignore[arg-type]
            while hashed.read(1 << 20):
                pass
    except UserError as error:
        return [str(error).removeprefix("shard ")]
    damaged = hashed.digest.hexdigest() != shard.sha256
    return [f"{shard.name}: damaged (its content does not match the checksum in {INDEX_NAME})"] if damaged else problems


def _sample_problems(file: IO[bytes], shard: ShardInfo, wanted: _Wanted | None) -> Iterator[str]:
    samples = 0
    try:
        for raw in read_samples(file, shard.name, load=wanted is not None):
            samples += 1
            if problem := raw.fault or (_undecodable(raw, wanted) if wanted is not None else None):
                yield f"{shard.name}, {raw.key}: {problem}"
    except TarDamage as damage:
        yield f"{shard.name}: {damage}"
    if samples != shard.samples:
        yield f"{shard.name}: {samples} samples instead of {shard.samples}"


def _undecodable(raw: RawSample, wanted: _Wanted) -> str | None:
    try:
        if not 0 <= label_of(raw.label) < wanted.classes:
            return f"label {raw.label[:20]!r} is not one of {wanted.classes} classes"
        decode_picture(raw.image, wanted.form)
    except SampleError as error:
        return str(error)
    return None
