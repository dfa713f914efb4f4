"""Chunks of samples, written by this process or by several, each finished one kept with a record of what it became."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mvar_lightning.data.index import ShardInfo
from mvar_lightning.data.sources import Example
from mvar_lightning.data.work_folder import RECORDS_NAME

if TYPE_CHECKING:
    from mvar_lightning.data.shards import ChunkWriter, Progress


class WritingFailed(Exception):
    """The disk or a process failed; the message says how."""


class Chunk:
    """Samples that are written together: a stretch of the shuffled row of a split, whose examples are made on demand.

    ``number`` counts the chunks of the split, ``first_key`` is the place of the first sample in the row.
    """

    def __init__(self, split: str, number: int, first_key: int, of: Sequence[Example], places: Sequence[int]) -> None:
        self.split, self.number, self.first_key = split, number, first_key
        self._of: Sequence[Example] | None = of
        self._places = places
        self._made: list[Example] = []

    def __len__(self) -> int:
        return len(self._places)

    @property
    def examples(self) -> list[Example]:
        if self._of is None:
            return self._made
        return [self._of[place] for place in self._places]

    def __getstate__(self) -> dict[str, object]:
        """What another process gets: these examples, not the whole split."""
        return {**self.__dict__, "_of": None, "_made": self.examples}


@dataclass(frozen=True)
class ChunkRecord:
    """What a chunk became: shards by their working names, what was left out, and how many samples were taken."""

    shards: tuple[ShardInfo, ...]
    skipped: tuple[str, ...]
    taken: int

    def write(self, path: Path) -> None:
        """Write aside, then rename: a record is there only when its shards are."""
        aside = path.with_suffix(".aside")
        aside.write_text(json.dumps(asdict(self)))
        aside.replace(path)

    @classmethod
    def read(cls, path: Path, folder: Path) -> ChunkRecord | None:
        """The record, if there is one whose shards are there in full length (or have their final names already)."""
        try:
            content = json.loads(path.read_text())
            shards = tuple(ShardInfo(**row) for row in content["shards"])
            sizes = [(folder / shard.name).stat().st_size for shard in shards if (folder / shard.name).exists()]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        renamed = any((folder / shards[0].name).parent.glob("[0-9]*.tar")) if shards else False
        if renamed or sizes == [shard.bytes for shard in shards]:
            return cls(shards, tuple(content["skipped"]), int(content["taken"]))
        return None


def run_chunks(
    chunks: Sequence[Chunk], folder: Path, writer: ChunkWriter, workers: int, report: Progress
) -> dict[str, list[ChunkRecord]]:
    """Write every chunk that has no record yet; the records of all, in order, by split.

    Raises:
        UserError: an unreadable image.
        WritingFailed: the disk is full, or a process died.
    """
    (folder / RECORDS_NAME).mkdir(exist_ok=True)
    records = {_place(chunk): ChunkRecord.read(_record_path(folder, chunk), folder) for chunk in chunks}
    report(sum(record.taken for record in records.values() if record is not None))
    missing = [chunk for chunk in chunks if records[_place(chunk)] is None]
    results = _here(missing, writer, report) if workers == 0 else _in_processes(missing, writer, workers, report)
    try:
        for chunk, written in results:
            written.write(_record_path(folder, chunk))
            records[_place(chunk)] = written
    except OSError as error:
        raise WritingFailed(f"writing failed ({error.strerror})") from error
    except BrokenProcessPool as error:
        raise WritingFailed("a writing process died (out of memory?); try fewer --workers") from error
    found: dict[str, list[ChunkRecord]] = {"train": [], "val": []}
    for chunk in chunks:
        record = records[_place(chunk)]
        assert record is not None
        found[chunk.split].append(record)
    return found


def _place(chunk: Chunk) -> tuple[str, int]:
    return chunk.split, chunk.number


def _record_path(folder: Path, chunk: Chunk) -> Path:
    return folder / RECORDS_NAME / f"{chunk.split}-{chunk.number:06d}.json"


Results = Iterator[tuple[Chunk, ChunkRecord]]
Write = Callable[[Chunk], ChunkRecord]


def _here(chunks: Sequence[Chunk], writer: ChunkWriter, report: Progress) -> Results:
    for chunk in chunks:
        yield chunk, writer(chunk, report)


def _in_processes(chunks: Sequence[Chunk], writer: ChunkWriter, workers: int, report: Progress) -> Results:
    """Some chunks ahead of the processes, no more: each carries its examples along."""
    context = multiprocessing.get_context("spawn")  # a fork would copy the progress bar's thread and its locks
    waiting = iter(chunks)
    pool = ProcessPoolExecutor(workers, context, _begin, (os.getpid(),))
    try:
        running: dict[Future[ChunkRecord], Chunk] = {}
        while True:
            while len(running) < 2 * workers and (chunk := next(waiting, None)) is not None:
                running[pool.submit(writer, chunk)] = chunk
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                chunk = running.pop(future)
                record = future.result()
                report(record.taken)
                yield chunk, record
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(parent: int) -> None:
    """In a writing process: Ctrl-C is the parent's to handle, and nobody writes on when the parent was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
