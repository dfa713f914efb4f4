"""A job of several processes: those that torchrun or SLURM made on any number of machines, or some of this one.

They talk through gloo, on GPUs too: what they say is small, and no watchdog ends the wait for one that is at work.
Lightning Fabric connects and starts them, as Lightning does for training. Each process takes its share by its rank and
writes what it makes itself; rank zero joins.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast
from uuid import uuid4

from mvar_lightning.errors import UserError
from mvar_lightning.tools.console import progress
from mvar_lightning.tools.files import told
from mvar_lightning.tools.processes import (
    PATIENCE,
    is_lost_process,
    launched,
    number_in,
    under_torchrun,
    wait_until_visible,
    work_for_parent,
)

if TYPE_CHECKING:
    from lightning.fabric import Fabric

T = TypeVar("T")
R = TypeVar("R")

GO_ON = "what is finished is kept, and the same command goes on"

VISIBLE_SECONDS = 10.0
"""How long a file with a new name may take to be seen on another machine."""


class Ranks:
    """Which process of a job this is, of how many, on which device; and what they tell each other.

    Where one of them raises `UserError` all do, with its words: none waits for what will not come. Where one is gone,
    the others say so.

    Args:
        rank, size: of the processes that are connected.
        device: of this one.
        here: processes of this machine that `run` is to start; 1 where it need not.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu", here: int = 1) -> None:
        self.rank, self.size, self.device, self.here = rank, size, device, here

    @classmethod
    def of(cls, device: str, devices: int | None = None, num_nodes: int | None = None, on_its_own: int = 1) -> Ranks:
        """Connect the processes that a launcher started; where it started none, note how many are to be.

        Args:
            device: ``cpu`` or ``cuda``, or another of Lightning's accelerators.
            devices, num_nodes: processes of each machine, and machines; as many as were started, if not given.
            on_its_own: processes of this machine where nothing was started and nothing given.

        Raises:
            UserError: other numbers than a launcher started, machines without a launcher, or too few GPUs.
        """
        on_each, nodes, outside = _processes(devices, num_nodes, on_its_own)
        _check_gpus(on_each, device)
        if on_each * nodes == 1 or not outside:
            return cls(device=device, here=on_each)
        return _ranks(_fabric(device, on_each, nodes), launch=True)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def processes(self) -> int:
        """How many will share the work."""
        return self.size * self.here

    def run(self, job: Callable[..., T], *arguments: Any) -> T:
        """``job(ranks, *arguments)`` in every process; gives what the job gave here, or in the first of those started.

        Args:
            job: with its arguments and its answer, can be sent to other processes.

        Raises:
            UserError: of the job, or where a process of it was killed.
        """
        if self.here == 1:
            return job(self, *arguments)
        import torch.multiprocessing as mp

        before, port = set(mp.active_children()), os.environ.get("MASTER_PORT")
        try:
            answer = _fabric(self.device, self.here).launch(partial(_in_process, job, arguments))
        except mp.ProcessExitedException as error:
            raise UserError(f"process {error.error_index} was killed ({error.signal_name}); {GO_ON}") from error
        finally:
            for process in set(mp.active_children()) - before:
                process.terminate()
            os.environ.pop("MASTER_PORT", None)  # Fabric's
            os.environ.update({} if port is None else {"MASTER_PORT": port})
        if answer.failure is not None:
            raise UserError(answer.failure)
        return cast("T", answer.value)

    # -- what all of them must call, in the same order

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every n-th of the items, which are the same on all."""
        return items[self.rank :: self.size]

    def turns(self, items: Sequence[T]) -> list[T | None]:
        """The share, with None at its end where another process has one more: for `each`."""
        rounds, share = -(-len(items) // self.size), self.share(items)
        return [*share, *[None] * (rounds - len(share))]

    def exchange(self, value: T) -> list[T]:
        """The values of all, in the order of the ranks."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with _company():
            dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What rank zero makes, on all; or its `UserError`."""
        value = None
        with self.agreed():
            value = make() if self.is_first else None
        if self.size == 1:
            return cast("T", value)
        import torch.distributed as dist

        values = [value]
        with _company():
            dist.broadcast_object_list(values, src=0)
        return cast("T", values[0])

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Wait for all processes at the end; where one has failed all do, with its words."""
        failure: UserError | None = None
        try:
            yield
        except UserError as error:
            failure = error
        said = [words for words in self.exchange(None if failure is None else failure.marked) if words is not None]
        if failure is not None:
            raise failure
        if said:
            raise UserError(said[0])

    def each(self, work: Callable[[T], R], turns: Iterable[T | None]) -> Iterator[R]:
        """The results of all processes in the order of rounds and ranks: to the first process, nothing to the others.

        Args:
            work: on one item, in the process whose turn it is.
            turns: this process' items, as many on all; None where it has none in a round.
        """
        for item in turns:
            result: R | None = None
            with self.agreed():
                result = None if item is None else work(item)
            yield from self._collect(result)

    def _collect(self, value: T | None) -> list[T]:
        """On rank zero the values of all that have one; else nothing."""
        values: list[Any] = [value]
        if self.size > 1:
            import torch.distributed as dist

            values = [None] * self.size
            with _company():
                dist.gather_object(value, values if self.is_first else None, dst=0)
        return [one for one in values if one is not None]

    @contextmanager
    def progress(self, unit: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        """What tells how far the share of this process is, shown by the first one alone.

        Args:
            unit: what is counted.
            total: of this process.
            done: before, by anybody.
        """
        if not self.is_first:
            yield lambda count: None
            return
        alone = self.size == 1
        with progress(unit if alone else f"{unit} (of this process)", total + alone * done, alone * done) as bar:
            yield bar.advance

    def check_same(self, **arguments: object) -> None:
        """Raise `UserError` where the processes were not started with the same."""
        mine = {name: repr(value) for name, value in arguments.items()}
        first, *others = self.exchange(mine)
        for rank, theirs in enumerate(others, 1):
            for name in sorted(first.keys() | theirs.keys()):
                if first.get(name) != theirs.get(name):
                    raise UserError(
                        f"``{name}``: process 0 has {str(first.get(name))[:80]}, process {rank} "
                        f"{str(theirs.get(name))[:80]}; start all of them with the same command and the same files"
                    )

    def check_shared(self, folder: Path) -> None:
        """Raise `UserError` where a folder, which exists, is not the same one for all."""
        if self.size == 1:
            return
        note = folder / f".shared-{self.from_first(lambda: uuid4().hex)}"
        try:
            with self.agreed(), told(note):
                if self.is_first:
                    note.touch()
            with self.agreed():
                wait_until_visible(note, VISIBLE_SECONDS)
        finally:
            if self.is_first:
                note.unlink(missing_ok=True)


ALONE = Ranks()


def _processes(devices: int | None, num_nodes: int | None, on_its_own: int) -> tuple[int, int, bool]:
    """Processes on each machine, machines, and whether something outside has started them."""
    started = launched()
    if started is None or started == 1:  # one task of a job may start others as if there were no launcher
        if (num_nodes or 1) > 1 and not ("MASTER_ADDR" in os.environ and started is None):
            raise UserError(
                f"``num_nodes`` {num_nodes}: nothing has started processes on other machines; start the command by "
                "torchrun or srun on each of them (docs/clusters.md)"
            )
        return devices or on_its_own, num_nodes or 1, started is None and "LOCAL_RANK" in os.environ
    default = started // max(1, number_in("SLURM_NNODES", str(num_nodes or 1)))
    on_each = number_in("LOCAL_WORLD_SIZE" if under_torchrun() else "SLURM_NTASKS_PER_NODE", str(default))
    nodes = started // max(1, on_each)
    if devices not in (None, on_each) or num_nodes not in (None, nodes) or on_each * nodes != started:
        raise UserError(
            f"``devices`` {devices or on_each}: on {num_nodes or nodes} machines, but {started} processes were started "
            f"({on_each} on each of {nodes}); leave the numbers out, or make them agree"
        )
    return on_each, nodes, True


def _check_gpus(devices: int, device: str) -> None:
    if device == "cuda" and devices > 1:
        import torch

        if devices > torch.cuda.device_count():
            raise UserError(f"``devices`` {devices}: there are {torch.cuda.device_count()} GPUs here")


def _fabric(device: str, devices: int, nodes: int | None = None) -> Fabric:
    """Of processes that are there; where ``nodes`` is not given, of some that it is to start here."""
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.fabric.strategies import DDPStrategy
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    start: Any = "popen"
    if nodes is None:  # one process imports, and the others are made of it
        multiprocessing.set_forkserver_preload(["lightning.fabric", __name__])
        start = "forkserver"
    strategy = DDPStrategy(process_group_backend="gloo", timeout=PATIENCE, start_method=start)
    environment: list[Any] = [LightningEnvironment()] if nodes is None else []
    try:
        return Fabric(accelerator=device, strategy=strategy, devices=devices, num_nodes=nodes or 1, plugins=environment)
    except (MisconfigurationException, ImportError, RuntimeError, ValueError) as error:
        raise UserError(f"``devices`` {devices} of {device}: {' '.join(str(error).split())}") from None


def _ranks(fabric: Fabric, launch: bool = False) -> Ranks:
    if launch:
        with _company():
            fabric.launch()
    return Ranks(fabric.global_rank, fabric.world_size, str(fabric.device))


class _Parcel:
    """What a process gives: a value, or why there is none. Fabric would look into a plain one, and takes no frozen
    dataclass."""

    def __init__(self, value: Any = None, failure: str | None = None) -> None:
        self.value, self.failure = value, failure


def _in_process(job: Callable[..., Any], arguments: Sequence[Any], fabric: Fabric) -> _Parcel:
    work_for_parent()
    try:
        return _Parcel(job(_ranks(fabric), *arguments))
    except UserError as error:
        return _Parcel(failure=error.marked)


@contextmanager
def _company() -> Iterator[None]:
    """Say in one line that another process is gone."""
    try:
        yield
    except Exception as error:
        if not is_lost_process(error):
            raise
        reason = re.sub(r"^\[\S+:\d+\] ", "", str(error).strip().splitlines()[0])[:160]  # not where in whose source
        raise UserError(f"another process of this job has ended, so this one ends too ({reason}); {GO_ON}") from error
