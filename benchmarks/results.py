"""Where the figures of a measurement are kept: a file of its own for each run, so that none takes another's place."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mvar_lightning.errors import UserError
from mvar_lightning.tools.files import write

RESULTS = Path("benchmarks/results")


def now() -> str:
    """Date and time of a run, in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def dated(name: str, date: str, suffix: str, folder: Path = RESULTS) -> Path:
    """The file of one run: ``NAME-DATE.SUFFIX``."""
    return folder / f"{name}-{date.replace(':', '')}.{suffix}"


def add_out(parser: argparse.ArgumentParser, name: str) -> None:
    """The option of a measurement that keeps one JSON file."""
    default = RESULTS / f"{name}-DATE.json"
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"JSON with all figures ({default})")


def check_numbers(args: argparse.Namespace, *names: str) -> None:
    """Raise `UserError` for an option of a measurement that is below 1."""
    for name in names:
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")


def write_figures(figures: dict[str, Any], name: str, out: Path | None) -> Path:
    """Write all figures with their date, to ``out`` or to a file of this run's own; gives its path."""
    date = now()
    path = dated(name, date, "json") if out is None else out
    write_whole(path, json.dumps({"date": date, **figures}, indent=2) + "\n")
    return path


def write_whole(path: Path, text: str) -> None:
    """The history holds no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, text)
