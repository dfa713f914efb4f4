"""What a command says: how far it is (a bar on a terminal, a line every so often elsewhere, both to standard error),
and tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

SECONDS_BETWEEN_LINES = 30.0


class Bar(Protocol):
    """Told how much was just done (`advance`), or to show a line of its own (`say`)."""

    def advance(self, count: int) -> None: ...
    def say(self, line: str) -> None: ...


@contextmanager
def progress(unit: str, total: int) -> Iterator[Bar]:
    """`unit` names what is counted. Nothing of a bar stays behind, so that a mistake is one line."""
    if not sys.stderr.isatty():
        yield Lines(unit, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, console=Console(stderr=True)) as rich_bar:
        yield _Rich(rich_bar, unit, total)


class _Rich:
    def __init__(self, bar, unit: str, total: int) -> None:  # type: ignore[no-untyped-def]  # rich is imported late
        self.bar, self.task = bar, bar.add_task(unit, total=total)

    def advance(self, count: int) -> None:
        self.bar.advance(self.task, count)

    def say(self, line: str) -> None:
        self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)


class Lines:
    """A line every `seconds`: how much of how much, how fast, how long still."""

    def __init__(self, unit: str, total: int, seconds: float = SECONDS_BETWEEN_LINES) -> None:
        self.unit, self.total, self.seconds = unit, total, seconds
        self.done = self.told = 0
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


def table_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
