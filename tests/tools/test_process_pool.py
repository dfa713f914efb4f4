"""Processes that work for one process end with it, however it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

LEFT = """
import os, time
from mvar_lightning.tools.processes import process_pool
with process_pool(1, "json") as pool:
    pool.submit(os.getpid).result()  # it has started
    pool.submit(time.sleep, 600)
    raise SystemExit(7)
"""
KILLED = """
import os, signal
from mvar_lightning.tools.processes import process_pool
with process_pool(1, "json") as pool:
    print(pool.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
STARTED_MEANWHILE = """
import os, signal, time
from concurrent.futures import ProcessPoolExecutor
from mvar_lightning.tools.processes import process_pool

spawn = ProcessPoolExecutor._spawn_process

def second(pool):  # the first one is killed while this one starts: the pool learns of it too late to end it
    known, pool._processes = pool._processes, {}
    spawn(pool)
    os.kill(next(iter(known)), signal.SIGKILL)
    while not pool._broken:
        time.sleep(0.01)
    time.sleep(0.3)
    known |= pool._processes
    pool._processes = known

with process_pool(2, "json") as pool:
    pool.submit(os.getpid).result()
    pool.submit(time.sleep, 600)
    ProcessPoolExecutor._spawn_process = second
    pool.submit(os.getpid)
print("left", flush=True)
"""


def works(pid: int) -> bool:
    """Whether a process is there and not only waits to be buried."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_worker_ends_with_a_process_that_was_killed(tmp_path: Path) -> None:
    with (tmp_path / "said").open("w") as said:  # no pipe: the worker would hold it open
        done = subprocess.run([sys.executable, "-c", KILLED], stdout=said, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    worker, deadline = int((tmp_path / "said").read_text()), time.monotonic() + 10
    while works(worker) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not works(worker)


def test_a_block_left_by_an_exception_does_not_wait_for_its_processes() -> None:
    assert subprocess.run([sys.executable, "-c", LEFT], check=False, timeout=60).returncode == 7


def test_a_block_that_asks_for_nothing_after_a_kill_is_left_too() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTED_MEANWHILE], check=False, timeout=60, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr
