"""Chunks of samples, written by this process or by several, each finished one kept with a record of what it became."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import TYPE_CHECKING

from mvar_lightning.data.index import ShardInfo
from mvar_lightning.data.sources import Example

if TYPE_CHECKING:
    from mvar_lightning.data.writing import ChunkWriter, Progress


class WritingFailed(Exception):
    """The disk or a process failed; the message says how."""


@dataclass(frozen=True)
class ChunkRecord:
    """What a chunk became: shards by their working names, what was left out, and how many samples were taken."""

    shards: tuple[ShardInfo, ...]
    skipped: tuple[str, ...]
    taken: int

    def write(self, path: Path) -> None:
        """Write aside, then rename: a record is there only when its shards are."""
        aside = path.with_suffix(".aside")
        aside.write_text(json.dumps(asdict(self)), encoding="utf-8")
        aside.replace(path)

    @classmethod
    def read(cls, path: Path) -> ChunkRecord | None:
        """The record, if there is one."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            shards = tuple(ShardInfo(**row) for row in content["shards"])
            return cls(shards, tuple(content["skipped"]), int(content["taken"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class Chunk:
    """Samples that are written together: a stretch of the shuffled row of a split.

    Args:
        split, number: the chunk's name; the number counts the chunks of the split.
        first_key: place of the first sample in the row.
        of, places: the split's examples, and which of them these are. They are made on demand, and sent to another
            process by themselves: the split has a million.
        record: what an earlier call made of the chunk.
    """

    split: str
    number: int
    first_key: int
    of: Sequence[Example]
    places: Sequence[int]
    record: ChunkRecord | None = None

    def __len__(self) -> int:
        return len(self.places)

    def examples(self) -> Iterator[Example]:
        return (self.of[place] for place in self.places)

    def by_itself(self) -> Chunk:
        return replace(self, of=list(self.examples()), places=range(len(self)))

    def record_path(self, folder: Path) -> Path:
        return folder / f"{self.split}-{self.number:06d}.json"


def run_chunks(
    chunks: Sequence[Chunk], records: Path, writer: ChunkWriter, workers: int, report: Progress
) -> list[ChunkRecord]:
    """Write every chunk that has no record with sound shards; the records of all, in order.

    Raises:
        UserError: an unreadable image, the first in the order of the chunks.
        WritingFailed: the disk is full, or a process died.
    """
    found: dict[int, ChunkRecord] = {}
    results = _here(chunks, writer, report) if workers == 0 else _in_processes(chunks, writer, workers, report)
    try:
        for place, record in results:
            if record != chunks[place].record:
                record.write(chunks[place].record_path(records))
            found[place] = record
    except OSError as error:
        raise WritingFailed(f"writing failed ({error.strerror})") from error
    except BrokenProcessPool as error:
        raise WritingFailed("a writing process was killed (out of memory?); try fewer --workers") from error
    return [found[place] for place in range(len(chunks))]


Results = Iterator[tuple[int, ChunkRecord]]


def _here(chunks: Iterable[Chunk], writer: ChunkWriter, report: Progress) -> Results:
    for place, chunk in enumerate(chunks):
        yield place, writer(chunk, report)


def _in_processes(chunks: Sequence[Chunk], writer: ChunkWriter, workers: int, report: Progress) -> Results:
    """Some chunks ahead of the processes, no more: each carries its examples along.

    After a failure the chunks before it are finished, so that the failure told is the first in order.
    """
    context = multiprocessing.get_context("forkserver")  # a fork of this process would copy the bar's thread and locks
    context.set_forkserver_preload([writer.__class__.__module__])
    pool = ProcessPoolExecutor(workers, context, _begin)
    ahead = iter(range(len(chunks)))
    running: dict[Future[ChunkRecord], int] = {}
    failures: dict[int, Exception] = {}
    try:
        while True:
            while not failures and len(running) < 2 * workers and (place := next(ahead, None)) is not None:
                running[pool.submit(writer, chunks[place].by_itself())] = place
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                place = running.pop(future)
                if future.cancelled():
                    continue
                if error := future.exception():
                    failures[place] = _checked(error)
                    _cancel(future for future, other in running.items() if other > place)
                    continue
                report(future.result().taken)
                yield place, future.result()
        if failures:
            raise failures[min(failures)]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _checked(error: BaseException) -> Exception:
    if not isinstance(error, Exception):
        raise error
    return error


def _cancel(futures: Iterable[Future[ChunkRecord]]) -> None:
    for future in futures:
        future.cancel()


def _begin() -> None:
    """In a writing process: Ctrl-C is the parent's to handle, and nobody writes on when the parent was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int, end: Callable[[int], None] = os._exit) -> None:
    wait_for([sentinel])
    end(1)
