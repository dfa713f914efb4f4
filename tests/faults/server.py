"""A thousand commands for the price of one start: torch and the command line are imported once, then each case forks.

Run as a script with the product first in PYTHONPATH; `harness.py` talks to it. A request is a line of JSON on stdin, an
answer a line on stdout. The child of a fork leaves the loop and ends as an interpreter does (an uncaught error as a
traceback, exit functions, streams flushed), but for the teardown of modules, which would cost a second a case.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import IO, Any, NoReturn

MEGABYTE = 2**20


def import_all() -> None:
    """Whatever a command might import while it runs, so that no case pays for it."""
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


def wait_for(pid: int, seconds: float) -> dict[str, Any]:
    """The end of a case, at its own time or killed with all that it started when its time is over."""
    start = time.monotonic()
    timed_out = False
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            break
        if not timed_out and time.monotonic() - start > seconds:
            timed_out = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        time.sleep(0.003)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # a worker that a killed case left
        os.killpg(pid, signal.SIGKILL)
    return {
        "status": os.waitstatus_to_exitcode(status),
        "timed_out": timed_out,
        "seconds": time.monotonic() - start,
        "peak_mb": usage.ru_maxrss / 1024,
    }


def serve(requests: IO[str], answers: IO[str]) -> dict[str, Any] | None:
    """Fork for each request; returns the request in a child, None in the server when there are no more."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    answers.write(json.dumps({"ready": True, "own_mb": own}) + "\n")
    answers.flush()
    for line in requests:
        request: dict[str, Any] = json.loads(line)
        pid = os.fork()
        if pid == 0:
            requests.close()
            answers.close()
            become(request)
            return request
        answers.write(json.dumps(wait_for(pid, request["seconds"])) + "\n")
        answers.flush()
    return None


def renew_streams() -> None:
    """The interpreter's own streams, made anew on the child's file descriptors."""
    sys.stdin, sys.stderr = os.fdopen(0, closefd=False), os.fdopen(2, "w", 1, closefd=False, errors="backslashreplace")
    try:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    except OSError:  # as the interpreter starts when stdout was shut
        sys.stdout = None  # type: ignore[assignment]
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]


def run(request: dict[str, Any]) -> int:
    sys.argv = ["mvar", *request["argv"]]
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
    own_requests, own_answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    case = serve(own_requests, own_answers)
    if case is not None:
        end(case)
