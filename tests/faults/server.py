"""A thousand commands for the price of one start: torch and the command line are imported once, then each case forks.

Run as a script with the product first in PYTHONPATH; `harness.py` talks to it. A request is a line of JSON on stdin, an
answer a line on stdout. The child of a fork leaves the loop and ends as an interpreter does (an uncaught error as a
traceback, exit functions, streams flushed), but for the teardown of modules, which would cost a second a case.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import pkgutil
import resource
import select
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

MEGABYTE = 2**20


def import_all() -> None:
    """Whatever a command might import while it runs, so that no case pays for it."""
    # all of multiprocessing, too: another user may not be allowed to read where Python is
    import importlib.readers
    import multiprocessing.managers
    import multiprocessing.pool
    import multiprocessing.popen_fork
    import multiprocessing.shared_memory
    import multiprocessing.synchronize  # noqa: F401

    import lightning.pytorch.cli  # noqa: F401
    import torch
    import webdataset  # noqa: F401

    import mvar_lightning

    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(mvar_lightning.__path__, "mvar_lightning."):
        with contextlib.suppress(ImportError):  # what only runs elsewhere
            importlib.import_module(module.name)


def virtual_size() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def become(request: dict[str, Any]) -> None:
    """Give the child the folder, user, limits, environment and streams that its case asks for."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.dup2(open_stream(request[name], number), number)
    if request["stdout"] == "shut":
        os.close(1)
    os.environ.update({key: value for key, value in request["env"].items() if value is not None})
    for key in (key for key, value in request["env"].items() if value is None):
        os.environ.pop(key, None)
    sys.path[1:1] = filter(None, (request["env"].get("PYTHONPATH") or "").split(os.pathsep))
    os.chdir(request["cwd"])
    if request["delete_cwd"]:
        Path(request["cwd"]).rmdir()
    if request["umask"] is not None:
        os.umask(request["umask"])
    if request["file_mb"] is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(request["file_mb"] * MEGABYTE),) * 2)
    if request["memory_mb"] is not None:
        resource.setrlimit(resource.RLIMIT_AS, (virtual_size() + request["memory_mb"] * MEGABYTE,) * 2)
    if request["uid"] is not None:
        os.setgroups([])
        os.setgid(request["uid"])
        os.setuid(request["uid"])


def open_stream(name: str, number: int) -> int:
    if name == "closed":  # a pipe whose reader has gone
        reader, writer = os.pipe()
        os.close(reader)
        return writer
    if name == "full":
        return os.open("/dev/full", os.O_WRONLY)
    if name == "shut":
        return number
    return os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)


@dataclass
class Child:
    """A case at work."""

    pid: int
    end: float
    start: float
    timed_out: bool = False


def look_after(children: dict[int, Child], answers: IO[str]) -> None:
    """Tell of the cases that have ended, and kill those whose time is over, with all that they started."""
    for number, child in list(children.items()):
        found, status, usage = os.wait4(child.pid, os.WNOHANG)
        if not found:
            if not child.timed_out and time.monotonic() > child.end:
                child.timed_out = True
                kill_group(child.pid)
            continue
        kill_group(child.pid)  # a worker that a killed case left
        del children[number]
        answer = {"status": os.waitstatus_to_exitcode(status), "peak_mb": usage.ru_maxrss / 1024}
        answer |= {"timed_out": child.timed_out, "seconds": time.monotonic() - child.start}
        answers.write(json.dumps({"number": number, **answer}) + "\n")
        answers.flush()


def kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def serve(requests: int, answers: IO[str]) -> dict[str, Any] | None:
    """Fork for each request; returns the request in a child, None in the server when there are no more."""
    # what is held now, not the peak of the imports: a child begins with the former
    own = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / MEGABYTE
    answers.write(json.dumps({"number": -1, "own_mb": own}) + "\n")
    answers.flush()
    children: dict[int, Child] = {}
    rest = b""
    while True:
        look_after(children, answers)
        if not select.select([requests], [], [], 0.003 if children else None)[0]:
            continue
        received = os.read(requests, 2**20)
        if not received:
            for child in children.values():
                kill_group(child.pid)
            return None
        *lines, rest = (rest + received).split(b"\n")
        for line in lines:
            request: dict[str, Any] = json.loads(line)
            pid = os.fork()
            if pid == 0:
                os.close(requests)
                answers.close()
                become(request)
                return request
            now = time.monotonic()
            children[request["number"]] = Child(pid, now + request["seconds"], now)
            answers.write(json.dumps({"number": request["number"], "pid": pid}) + "\n")
            answers.flush()


def renew_streams() -> None:
    """The interpreter's own streams, made anew on the child's file descriptors."""
    sys.stdin, sys.stderr = os.fdopen(0, closefd=False), os.fdopen(2, "w", 1, closefd=False, errors="backslashreplace")
    try:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    except OSError:  # as the interpreter starts when stdout was shut
        sys.stdout = None  # type: ignore[assignment]
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]


def run(request: dict[str, Any]) -> int:
    sys.argv = [str(Path(sys.executable).with_name("mvar")), *request["argv"]]  # Lightning starts it again, for a rank
    if request["code"] is not None:
        exec(compile(request["code"], "<case>", "exec"), {"__name__": "__main__"})
        return 0
    from mvar_lightning import cli

    return int(cli.main(request["argv"]))


def end(request: dict[str, Any]) -> NoReturn:
    """Run a case and leave with the status that an interpreter would."""
    renew_streams()
    try:
        status = run(request)
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            if stream is sys.stdout:
                traceback.print_exc()
            status = 120
    os._exit(status)


if __name__ == "__main__":
    import_all()
    gc.collect()
    gc.freeze()  # a child's collector would copy every page
    # private copies: what a library prints in between must not meet the answers
    own_requests, own_answers = os.dup(0), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    case = serve(own_requests, own_answers)
    if case is not None:
        end(case)
