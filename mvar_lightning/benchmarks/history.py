"""Where the figures of a measurement are kept: a file of its own for each run, so that none takes another's place."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path("benchmarks/results")


def now() -> str:
    """Date and time of a run, in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def dated(name: str, date: str, suffix: str, folder: Path = RESULTS) -> Path:
    """The file of one run: ``NAME-DATE.SUFFIX``."""
    return folder / f"{name}-{date.replace(':', '')}.{suffix}"


def write_whole(path: Path, text: str) -> None:
    """Aside, then renamed: the history holds no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.aside")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
