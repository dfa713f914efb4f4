"""Ask the command line a question and judge the answer: the promise is the right result, or one line."""

from __future__ import annotations

import atexit
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SERVER = Path(__file__).with_name("server.py")
PROJECT = SERVER.parents[2]
ERROR = re.compile(r"^mvar(?: [\w-]+)*: (?:error: )?", re.MULTILINE)
LONGEST_LINE = 3000


@dataclass(frozen=True)
class Answer:
    """What a command said and cost: seconds, and the megabytes that it took beyond what the harness holds."""

    status: int
    out: str
    err: str
    seconds: float
    added_mb: float
    timed_out: bool

    @property
    def line(self) -> str:
        """The one line of a mistake, or nothing."""
        return next((line for line in self.err.splitlines() if ERROR.match(line)), "")


class Started:
    """A case at work in a harness."""

    def __init__(self, harness: Harness, number: int, pid: int, said: dict[str, Path]) -> None:
        self.harness, self.number, self.pid, self.said = harness, number, pid, said

    def send(self, number: signal.Signals) -> None:
        """Send a signal to this process alone."""
        os.kill(self.pid, number)

    def ended(self) -> bool:
        return self.harness.has_answer(self.number)

    def finish(self) -> Answer:
        """Wait for its end, at the latest the one that its request gave it."""
        answer = self.harness.read_answer(self.number, "status")
        said = {name: path.read_text("utf-8", "replace") for name, path in self.said.items()}
        for path in self.said.values():
            path.unlink()
        return Answer(
            status=answer["status"],
            out=said.get("stdout", ""),
            err=said.get("stderr", ""),
            seconds=answer["seconds"],
            added_mb=answer["peak_mb"] - self.harness.own_mb,
            timed_out=answer["timed_out"],
        )


class Harness:
    """One server that has a product imported, from this project or from a checkout in another folder."""

    def __init__(self, product: Path = PROJECT) -> None:
        self.surroundings = set(os.environ)
        path = f"{product}{os.pathsep}{PROJECT / 'tests'}"
        self.environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
        self.environment.pop("MVAR_TRACEBACK", None)
        self.folder = tempfile.TemporaryDirectory(prefix="faults-")
        Path(self.folder.name).chmod(0o755)
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self.environment,
            cwd=self.folder.name,
        )
        self.started = 0
        self.rest = b""
        self.answers: list[dict[str, Any]] = []
        self.own_mb = float(self.read_answer(-1, "own_mb")["own_mb"])

    def ask(self, *argv: object, **settings: Any) -> Answer:
        """`start` and its end."""
        return self.start(*argv, **settings).finish()

    def start(
        self,
        *argv: object,
        cwd: Path | str | None = None,
        code: str | None = None,
        uid: int | None = None,
        seconds: float = 60,
        memory_mb: int | None = None,
        file_mb: float | None = None,
        stdin: str = os.devnull,
        stdout: str = "pipe",
        stderr: str = "pipe",
        env: dict[str, str | None] | None = None,
        umask: int | None = None,
        delete_cwd: bool = False,
    ) -> Started:
        """Run `mvar ARGV`, or `code` as a script, in a fork.

        Args:
            argv: the arguments after `mvar`, turned into text.
            cwd: the folder to run in; the harness's own one by default.
            code: Python to run in place of the command.
            uid: a user (and group) to become.
            seconds: after these the case is killed with what it started.
            memory_mb: address space beyond what the harness holds, in megabytes.
            file_mb: the largest file that may be written, in megabytes; writing on fails as on a full disk.
            stdin: a file to read.
            stdout: "pipe" keeps what is printed, "closed" is a pipe without a reader, "full" a full device, "shut"
                no stream at all.
            stderr: as stdout.
            env: variables to set, or with None to take away.
            umask: mode bits that new files do not get.
            delete_cwd: remove the (empty) folder before the command runs.
        """
        streams = {"stdout": stdout, "stderr": stderr}
        self.started += 1
        kept = {
            name: Path(self.folder.name) / f"{name}-{self.started}" for name, kind in streams.items() if kind == "pipe"
        }
        request: dict[str, Any] = {
            "number": self.started,
            "argv": [str(part) for part in argv],
            "cwd": str(cwd or self.folder.name),
            "code": code,
            "uid": uid,
            "seconds": seconds,
            "memory_mb": memory_mb,
            "file_mb": file_mb,
            "stdin": stdin,
            **streams,
            **{name: str(path) for name, path in kept.items()},
            "env": env or {},
            "umask": umask,
            "delete_cwd": delete_cwd,
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        return Started(self, self.started, self.read_answer(self.started, "pid")["pid"], kept)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()

    def has_answer(self, number: int) -> bool:
        """Whether a case has ended."""
        while select.select([self.process.stdout], [], [], 0)[0]:
            self._read()
        return any(answer["number"] == number and "status" in answer for answer in self.answers)

    def read_answer(self, number: int, key: str) -> dict[str, Any]:
        while True:
            for answer in self.answers:
                if answer["number"] == number and key in answer:
                    self.answers.remove(answer)
                    return answer
            self._read()

    def _read(self) -> None:
        assert self.process.stdout is not None
        received = os.read(self.process.stdout.fileno(), 2**20)
        if not received:
            raise RuntimeError("the harness's server has ended")
        *lines, self.rest = (self.rest + received).split(b"\n")
        self.answers += map(json.loads, lines)


_shared: list[Harness] = []


def shared() -> Harness:
    """The one harness that a process of tests shares."""
    if not _shared:
        _shared.append(Harness())
        atexit.register(_shared[0].close)
    return _shared[0]


def ask(*argv: object, **settings: Any) -> Answer:
    """`Harness.ask` of the shared one."""
    return shared().ask(*argv, **settings)


def start(*argv: object, **settings: Any) -> Started:
    """`Harness.start` of the shared one."""
    return shared().start(*argv, **settings)


def start_ranks(
    processes: int, *argv: object, env: dict[str, str | None] | None = None, **settings: Any
) -> list[Started]:
    """As many processes of one run, with the environment that Lightning's own launcher gives them."""
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(processes), "NODE_RANK": "0"}
    ranks = [{**world, "LOCAL_RANK": str(rank), **(env or {})} for rank in range(processes)]
    return [start(*argv, env=rank if processes > 1 else env, **settings) for rank in ranks]


def call(function: Callable[..., object], *arguments: object) -> str:
    """Code that calls a function of a test's file with arguments that can be written down."""
    path = function.__code__.co_filename
    return f"import runpy; runpy.run_path({path!r})[{function.__name__!r}](*{arguments!r})"


def as_here(env: dict[str, str] | None = None) -> dict[str, str | None]:
    """The environment of this process, which may have changed since the harness began, and `env` on top of it."""
    return {**dict.fromkeys(shared().surroundings - os.environ.keys()), **os.environ, **(env or {})}


def completed(
    *argv: object, env: dict[str, str] | None = None, cwd: Path | None = None, seconds: float = 120, **settings: Any
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` of this command, here and now, comes to."""
    answer = ask(*argv, env=as_here(env), cwd=cwd or Path.cwd(), seconds=seconds, **settings)
    assert not answer.timed_out, answer.err[-3000:]
    return subprocess.CompletedProcess(argv, answer.status, answer.out, answer.err)


def script(path: Path, *arguments: object) -> str:
    """Code that runs a script as the interpreter would."""
    argv = [str(path), *map(str, arguments)]
    return f"import runpy, sys; sys.argv = {argv!r}; runpy.run_path({str(path)!r}, run_name='__main__')"


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def refused(answer: Answer, *words: str) -> None:
    """One line, which says these words."""
    assert broken_promise(answer) is None
    assert answer.status == 2
    assert all(word in answer.line for word in words), answer.line


def broken_promise(answer: Answer, memory_mb: float = 1500) -> str | None:
    """Why an answer is neither a result nor one line, or None; `memory_mb` is what a tiny case may take."""
    if answer.timed_out:
        return f"did not end in {answer.seconds:.0f} s"
    if answer.status < 0:
        return f"killed by signal {-answer.status}"
    if "Traceback (most recent call last)" in answer.err:
        return "traceback: " + answer.err.strip().splitlines()[-1][:200]
    if answer.added_mb > memory_mb:
        return f"took {answer.added_mb:.0f} MB"
    if answer.status == 0:
        return None
    lines = answer.err.splitlines()
    marks = [number for number, line in enumerate(lines) if ERROR.match(line)]
    if not marks:
        return f"status {answer.status} without a line"
    if len(marks) > 1 or any(line.strip() for line in lines[marks[0] + 1 :]):
        return "more than one line: " + " | ".join(lines[marks[0] :])[:200]
    if len(lines[marks[0]]) > LONGEST_LINE:
        return f"a line of {len(lines[marks[0]])} characters"
    return None
