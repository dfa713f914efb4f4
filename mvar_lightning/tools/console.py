"""What a command shows while it works and when it is done: how far it is, and tables.

Progress goes to standard error: a bar on a terminal, a line every so often elsewhere.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

SECONDS_BETWEEN_LINES = 30.0

TABLE_WIDTH = 160
"""Columns of text; a wider table breaks the lines in its cells."""


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
