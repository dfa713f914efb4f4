"""Several processes: those of a run, as their launcher made them; what they tell each other; work shared among some.

A command runs in each process of a run. Rank zero alone prepares folders, prints and reports; the others wait for it.
torch is imported only by what needs it: a command asks for its rank before it knows whether there is anything to do.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from mvar_lightning.compat import is_broken
from mvar_lightning.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# The processes of a run, told from the environment that torchrun, SLURM or Lightning made

LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "connection refused",
    "socket closed",
    "remote process exited",
    "communicator was aborted",
    "ncclremoteerror",
    "failed to recv, got 0 bytes",
    "timed out waiting",
    "watchdog caught collective operation timeout",
    "application timeout caused pair closure",
)
"""What gloo, NCCL and torch's store say when the process at the other end is gone."""


def global_rank() -> int:
    """This process's number among those of the run; 0 where there is only one."""
    if under_torchrun():
        return number_in("RANK")
    if under_slurm():
        return number_in("SLURM_PROCID")
    # Lightning's own launcher: its first process has no LOCAL_RANK, or 0, and node 0
    return number_in("LOCAL_RANK") + number_in("NODE_RANK")


def number_in(variable: str, missing: str = "0") -> int:
    """Of the environment. Raises `UserError` where it is none."""
    try:
        return int(os.environ.get(variable, missing))
    except ValueError:
        raise UserError(f"environment: {variable} is {os.environ[variable]!r}, no number; unset {variable}") from None


def under_torchrun() -> bool:
    """Whether torchrun started this process: Lightning's and torch's rule. A RANK alone was left by something else."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def under_slurm() -> bool:
    """Whether `srun` started this process (Lightning's rule, with its exception for interactive jobs)."""
    return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def is_main() -> bool:
    return global_rank() == 0


def is_first_here() -> bool:
    """Whether this is the first process of the run on its machine."""
    slurm = under_slurm() and not under_torchrun()
    return number_in("SLURM_LOCALID" if slurm else "LOCAL_RANK") == 0


def started_by_lightning() -> bool:
    """Whether this is a further process that Lightning started from the first one, with the same command line."""
    return not under_torchrun() and not under_slurm() and not is_main()


def launched() -> int | None:
    """How many processes torchrun or SLURM have started; None where Lightning is to start them."""
    if under_torchrun():  # also where it runs within SLURM
        return number_in("WORLD_SIZE", "1")
    return number_in("SLURM_NTASKS") if under_slurm() else None


def check_number(trainer_processes: int) -> None:
    """Raise `UserError` where a launcher started another number of processes than the trainer is told of."""
    number = launched()
    if number is not None and number != trainer_processes:
        raise UserError(
            f"trainer.devices x trainer.num_nodes is {trainer_processes}, but {number} processes were started; "
            "make them agree (--trainer.devices=PROCESSES_PER_NODE --trainer.num_nodes=NODES)"
        )


def is_lost_process(error: BaseException) -> bool:
    """Whether an error says that another process of the run is gone."""
    import torch

    errors = (torch.distributed.DistError, RuntimeError, ConnectionError)
    return isinstance(error, errors) and any(words in str(error).lower() for words in LOST)


def wait_until_visible(path: Path, seconds: float = 90.0) -> None:
    """Wait for a file that another process has written: network file systems show it late on other nodes."""
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise UserError(
                f"{path}: rank zero has written it, but this node does not see it; use a shared file system"
            )
        time.sleep(0.2)


# Sums, means and rows over all training processes; on one process they are what they are given.
# N rows, Z width of a row.


def world_size() -> int:
    """Number of processes."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def tell(log: logging.Logger, message: str) -> None:
    """A warning, of the first process alone."""
    import torch.distributed as dist

    if world_size() == 1 or dist.get_rank() == 0:
        log.warning(message)


def gather_rows(rows_NZ: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks and without gradient. Each must bring equally many.

    So processes together see what one would whose batch is theirs one after the other.
    """
    import torch

    rows_NZ = rows_NZ.detach().contiguous()
    if world_size() == 1:
        return rows_NZ
    parts = [torch.empty_like(rows_NZ) for _ in range(world_size())]
    torch.distributed.all_gather(parts, rows_NZ)
    return torch.cat(parts)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """A new tensor, without gradient."""
    import torch.distributed as dist

    total = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def take_from_first(tensor: Tensor) -> None:
    """Put rank zero's values into the tensor of every process."""
    import torch.distributed as dist

    if world_size() > 1:
        dist.broadcast(tensor, src=0)


PATIENCE = timedelta(days=2)
"""How long processes wait for what the first one does alone."""


def done_by_first(work: Callable[[], T]) -> T:
    """What the work gives, done by the first process while the others wait; all must call this together.

    In the run's own group they would wait for its timeout at most: NCCL's watchdog then ends them, however well the
    work goes. So they wait in one of their own, on the CPU. Where the first process dies its connections close, and
    they end at once.

    Raises:
        UserError: in every process, where the work does.
    """
    import torch.distributed as dist

    if world_size() == 1:
        return work()
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    said: list[Any] = [None, None]
    try:
        if dist.get_rank() == 0:
            try:
                said = [work(), None]
            except UserError as error:
                said = [None, error.marked]
        dist.broadcast_object_list(said, src=0, group=group)
        dist.barrier(group)  # nobody closes a connection that another still reads
    finally:
        dist.destroy_process_group(group)
    done, refused = said
    if refused is not None:
        raise UserError(refused)
    return cast(T, done)


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean over the processes, differentiable with respect to each process' share.

    With gradients averaged over the processes (DDP), a loss of this mean trains as a loss of all rows at once would.
    """
    return tensor if world_size() == 1 else cast("Tensor", _mean().apply(tensor))


@cache
def _mean() -> Any:
    import torch

    class Mean(torch.autograd.Function):
        """Every process' loss depends on every share: the gradients of all of them come back to it."""

        @staticmethod
        def forward(ctx: Any, tensor: Tensor) -> Tensor:
            return sum_over_ranks(tensor) / world_size()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return sum_over_ranks(gradient) / world_size()

    return Mean


# Work shared among processes of this machine that only decode and write.


@contextmanager
def process_pool(workers: int, module: str) -> Iterator[ProcessPoolExecutor]:
    """Processes that have a module imported and work for this one alone: they end with it, however it ends.

    They are ended at once where the block is left by an exception, or one of them was killed: Python 3.11's pool would
    else wait for ever for one that it was starting just then.
    """
    context = multiprocessing.get_context("forkserver")  # a fork of this process would copy the bar's thread and locks
    context.set_forkserver_preload([module])
    leave, stay = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, work_for_parent, (leave,))
    try:
        yield pool
    except BaseException:
        stay.close()
        raise
    finally:
        if is_broken(pool):  # also where the block asked for no result after that, and so was told nothing
            stay.close()
        pool.shutdown(cancel_futures=True)
        stay.close()
        leave.close()


def work_for_parent(*leave: Connection) -> None:
    """In such a process: Ctrl-C is the parent's to handle, and nobody works on when it was killed or gave up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=([parent.sentinel, *leave],), daemon=True).start()


def _end_with(signs: list[Any], end: Callable[[int], None] = os._exit) -> None:
    wait_for(signs)
    end(1)
