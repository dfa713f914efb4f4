"""Damaged data while streaming: skip, count and name it; stop when there is too much. And workers that are killed."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from types import FrameType

from mvar_lightning.errors import UserError

log = logging.getLogger(__name__)

MAX_SHARE = 0.01
"""Share of damaged samples, and of damaged shards, above which a run stops."""

MIN_SAMPLES = 10
"""So many damaged samples never stop a run."""

NAMED = 20
"""Damaged samples named one by one; after that every hundredth."""


class SampleError(Exception):
    """This sample cannot be used; the message says why. Callers add which one it was."""


class Faults:
    """Counts of one pass of one worker. Raises UserError past the threshold."""

    def __init__(self, num_shards: int) -> None:
        self.num_shards = num_shards
        self.seen = 0
        self.samples = 0
        self.shards: set[str] = set()

    def sample(self, shard: str, key: str, reason: str) -> None:
        self.samples += 1
        if self.samples <= NAMED or self.samples % 100 == 0:
            log.warning("skipped sample %s of shard %s: %s (%d skipped so far)", key, shard, reason, self.samples)
        if self.samples > max(MIN_SAMPLES, MAX_SHARE * self.seen):
            raise UserError(
                f"{self.samples} of {self.seen} samples are damaged, last {key} of shard {shard} ({reason}); {CHECK}"
            )

    def shard(self, shard: str, reason: str) -> None:
        if shard in self.shards:
            return
        self.shards.add(shard)
        log.warning("shard %s is damaged: %s; going on with what it still gives", shard, reason)
        if len(self.shards) > MAX_SHARE * self.num_shards:
            raise UserError(
                f"shard {shard} is damaged: {reason} ({len(self.shards)} of {self.num_shards} shards so far); {CHECK}"
            )


CHECK = "run `mvar shards check` on its folder and make the shards anew"


def worker_death(workers: Sequence[BaseProcess]) -> UserError | None:
    """What to tell the user if one of these loading processes has ended on its own."""
    for worker in workers:
        if worker.exitcode in (None, 0):
            continue
        how = signal.Signals(-worker.exitcode).name if worker.exitcode < 0 else f"status {worker.exitcode}"
        way_out = (
            "shared memory was short: lower data.num_workers or data.batch_size, or enlarge /dev/shm"
            if how == "SIGBUS"
            else "if memory was short, lower data.num_workers, data.shuffle_buffer or data.batch_size"
        )
        return UserError(f"a data loading process ended (pid {worker.pid}, {how}); {way_out}; then start the run again")
    return None


def hold_worker_deaths() -> None:
    """Let the loader tell that a worker has died, when it asks for the next batch.

    torch's signal handler, set when the first workers start, raises wherever the main thread is: in the middle of a
    step, and again while the first error is dealt with.
    """
    inner = signal.getsignal(signal.SIGCHLD)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or not callable(inner) or getattr(inner, "holds_deaths", False):
        return

    def handler(signum: int, frame: FrameType | None) -> None:
        try:
            inner(signum, frame)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise

    handler.holds_deaths = True  # type: ignore[attr-defined]
    signal.signal(signal.SIGCHLD, handler)
