"""The processes of one run, told from the environment that their launcher made: torchrun, SLURM or Lightning.

A command runs in each of them. Rank zero alone prepares folders, prints and reports; the others wait for it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from mvar_lightning.errors import UserError

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
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    if under_slurm():
        return int(os.environ["SLURM_PROCID"])
    # Lightning's own launcher: its first process has no LOCAL_RANK, or 0, and node 0
    return int(os.environ.get("LOCAL_RANK", "0")) + int(os.environ.get("NODE_RANK", "0"))


def under_slurm() -> bool:
    """Whether `srun` started this process (Lightning's rule, with its exception for interactive jobs)."""
    return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def is_main() -> bool:
    return global_rank() == 0


def started_by_lightning() -> bool:
    """Whether this is a further process that Lightning started from the first one, with the same command line."""
    return "RANK" not in os.environ and not under_slurm() and not is_main()


def launched() -> int | None:
    """How many processes torchrun or SLURM have started; None where Lightning is to start them."""
    if "RANK" in os.environ:  # torchrun, also where it runs within SLURM
        return int(os.environ.get("WORLD_SIZE", "1"))
    return int(os.environ["SLURM_NTASKS"]) if under_slurm() else None


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
