"""The loader around a stream: worker processes, a length, and a position that checkpoints keep."""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

from mvar_lightning.compat import abandon_workers, end_workers, workers_of
from mvar_lightning.data.reading.order import EpochStream, Failure, WorkerStream
from mvar_lightning.errors import UserError


class StreamLoader:
    """Iterates what a stream gives, over worker processes or in this one, and knows the number of batches.

    Workers stay from pass to pass. A `UserError` of one of them, or its death, ends all and is raised here.
    """

    def __init__(self, stream: WorkerStream, num_workers: int, pin_memory: bool = False) -> None:
        if num_workers < 0:
            raise UserError(f"num_workers {num_workers}: must be 0 (load in the main process) or more")
        self.stream: Any = stream
        self.num_workers = num_workers
        self._loader = DataLoader(
            stream,
            batch_size=None,  # the stream makes the batches
            num_workers=num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=outlive_stop_signals,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
        )

    @property
    def batch_size(self) -> int:
        return self.stream.config.batch_size

    def __len__(self) -> int:
        return self.stream.num_batches(max(1, self.num_workers))

    def __iter__(self) -> Iterator[Any]:
        # Not a generator: worker processes start here, and with them the next epoch's first batches.
        batches = self._unwrapped(iter(self._loader))
        if self.num_workers:
            hold_worker_deaths()
        return batches

    @property
    def _iterator(self) -> Any:
        """Lightning looks here for worker processes to end. Left to the garbage collector they can take 5 s each."""
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self._loader._iterator = iterator

    def close(self) -> None:
        """End the worker processes; the next pass starts new ones."""
        end_workers(self)

    def _unwrapped(self, items: Iterator[Any]) -> Iterator[Any]:
        while True:
            # before each batch: torch waits for the worker whose turn it is, and would not notice that another died
            self._check_workers()
            try:
                item = next(items)
            except StopIteration:
                return
            except (RuntimeError, EOFError, OSError):  # among others, torch waited for a worker that died
                self._check_workers(wait=1.0)
                raise
            if isinstance(item, Failure):
                self.close()
                raise UserError(item.message)
            yield from self.stream.unpack(item)

    def _check_workers(self, wait: float = 0.0) -> None:
        workers = workers_of(self)
        if wait:
            ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], wait)
            for worker in workers:
                if worker.sentinel in ended:  # its files are closed; how it ended is known only a moment later
                    worker.join(wait)
        if died := worker_death(workers):
            abandon_workers(self)
            raise died from None


class TrainLoader(StreamLoader):
    """Each pass is the next epoch. `state_dict` is the position of the next batch, so that a resumed run goes on with
    the batch that an uninterrupted one would have had (same ranks and workers).

    The position counts batches as they are taken, not as workers make them: what was made ahead is made again after a
    resume. A pass moves it to the next epoch *before* it gives its last batch, for a checkpoint that is written after
    that batch belongs to the epoch that follows.
    """

    def __init__(self, stream: EpochStream, num_workers: int, pin_memory: bool = False, epoch: int = 0) -> None:
        super().__init__(stream, num_workers, pin_memory)
        self.epoch, self.batch = epoch, 0
        self._drawn = False  # whether the pass under way has given a batch

    def __iter__(self) -> Iterator[Any]:
        # A pass that was left early is over, and the next one a new epoch; but one that begins in the middle because
        # `load_state_dict` said so has given nothing yet, and goes on there.
        if self._drawn and self.batch:
            self.epoch, self.batch = self.epoch + 1, 0
        self._drawn = False
        return self._counted(self._pass(), (self.epoch, self.batch))

    def _pass(self) -> Iterator[Any]:
        # the workers read it as they start the pass; torch tells them to when it makes the iterator
        self.stream.position[0], self.stream.position[1] = self.epoch, self.batch
        return super().__iter__()

    def _counted(self, batches: Iterator[Any], begun_at: tuple[int, int]) -> Iterator[Any]:
        # Workers are ahead of the first `next`, and a checkpoint may be read in between: under sharding it is.
        if begun_at != (self.epoch, self.batch):
            self.close()
            batches = self._pass()
        for batch in batches:
            self._drawn = True
            self.batch += 1
            if self.batch >= self.stream.epoch_batches:
                self.epoch, self.batch = self.epoch + 1, 0
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batch = int(state["epoch"]), int(state["batch"])
        self._drawn = False


@contextlib.contextmanager
def loading(loader: Any) -> Iterator[Any]:
    """A loader for a pass that may stop early: its worker processes end with the block, not when memory is tidied.

    Anything that can be iterated will do; what has no `close` is left alone.
    """
    try:
        yield loader
    finally:
        getattr(loader, "close", lambda: None)()


def _as_it_is(batch: Any) -> Any:
    return batch


# Worker processes that end before they should: killed, or told to stop by a scheduler.


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


def outlive_stop_signals(worker: int) -> None:
    """For a loader's ``worker_init_fn``: of SIGTERM only the parent's counts, SIGUSR1 is left to the parent.

    Schedulers signal every process of a job to stop; a worker killed by that would end the run at once, before it has
    saved. The parent ends its workers by a message, and by SIGTERM if they do not hear it.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()

    def end_with_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:  # nothing else tells who sent a signal
            pass
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
