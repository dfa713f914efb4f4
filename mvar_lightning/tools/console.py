"""What a command shows while it works and when it is done: how far it is, and tables.

Progress goes to standard error: a bar on a terminal, a line every so often elsewhere.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

SECONDS_BETWEEN_LINES = 30.0

TABLE_WIDTH = 160
"""Columns of text; a wider table breaks the lines in its cells."""


class PatientFile(io.FileIO):
    """A standard stream that never stops the work: once a write fails, the rest of what is said is dropped."""

    failure = ""
    """Why a write failed, unless the reader (`head`, a terminal that was closed) has just gone."""

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content) or 0
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                self.failure = str(error.strerror)
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # for what child processes say, too
            return memoryview(content).nbytes


@contextmanager
def patient_streams() -> Iterator[list[str]]:
    """Put a `PatientFile` below this process's own standard output and error; at the end the list holds their failures.

    Streams that somebody else has put in place (a test, a notebook) stay as they are.
    """
    failures: list[str] = []
    with ExitStack() as at_the_end:
        for name, number in (("stdout", 1), ("stderr", 2)):
            stream = getattr(sys, name)
            if stream is None:  # it was closed before we began: its number must not go to a file of ours
                os.open(os.devnull, os.O_WRONLY)
                continue
            if not isinstance(stream, io.TextIOWrapper) or _number_of(stream) != number:
                continue
            stream.flush()
            file = PatientFile(number, "w", closefd=False)
            patient = io.TextIOWrapper(
                io.BufferedWriter(file), stream.encoding, "backslashreplace", line_buffering=stream.line_buffering
            )
            setattr(sys, name, patient)
            at_the_end.callback(setattr, sys, name, stream)
            at_the_end.callback(_finish, patient, file, failures)
        yield failures


def _number_of(stream: io.TextIOWrapper) -> int:
    try:
        return stream.fileno()
    except io.UnsupportedOperation:  # in memory
        return -1


def _finish(stream: io.TextIOWrapper, file: PatientFile, failures: list[str]) -> None:
    stream.flush()
    if file.failure:
        failures.append(file.failure)


class Bar(Protocol):
    """Told how much was just done (`advance`), or to show a line of its own (`say`)."""

    def advance(self, count: int) -> None: ...
    def say(self, line: str) -> None: ...


@contextmanager
def progress(unit: str, total: int, done: int = 0) -> Iterator[Bar]:
    """How much of ``total`` is done; ``unit`` names what is counted, ``done`` of it was there before.

    Nothing of a bar stays behind, so that a mistake is one line.
    """
    if not sys.stderr.isatty():
        yield Lines(unit, total, done=done)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, console=Console(stderr=True)) as rich_bar:
        yield _Rich(rich_bar, unit, total, done)


class _Rich:
    def __init__(self, bar, unit: str, total: int, done: int) -> None:  # type: ignore[no-untyped-def]  # rich is imported late
        self.bar, self.task = bar, bar.add_task(unit, total=total, completed=done)

    def advance(self, count: int) -> None:
        self.bar.advance(self.task, count)

    def say(self, line: str) -> None:
        self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)


class Lines:
    """A line every `seconds`: how much of how much, how fast, how long still."""

    def __init__(self, unit: str, total: int, seconds: float = SECONDS_BETWEEN_LINES, done: int = 0) -> None:
        self.unit, self.total, self.seconds = unit, total, seconds
        self.done = self.told = done
        self.last = time.monotonic()

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last >= self.seconds:
            rate = max(self.done - self.told, 1) / (now - self.last)
            minutes = (self.total - self.done) / rate / 60
            self.say(
                f"{self.done:,} of {self.total:,} {self.unit} ({self.done / max(self.total, 1):.0%}), "
                f"{rate:,.1f} a second, {minutes:,.0f} min left"
            )
            self.last, self.told = now, self.done

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def print_table(rows: Sequence[Sequence[str]], head: Sequence[str] | None = None, title: str | None = None) -> None:
    """A table on standard output. Under headings, columns after the first are numbers, aligned at the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=head is not None)
    for number, heading in enumerate(head or ()):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=TABLE_WIDTH, markup=False).print(table)  # a path may hold brackets


def table_of(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """A Markdown table; with ``numbers`` its columns after the first are aligned at the right."""
    rule = ["---", *["---:" if numbers else "---"] * (len(head) - 1)]
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, rule, *rows))
