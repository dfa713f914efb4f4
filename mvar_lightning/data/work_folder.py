"""Where shards are while they are made: a folder beside the destination, which takes its name once all is there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mvar_lightning.errors import UserError

PLAN_NAME, LOCK_NAME, RECORDS_NAME = "plan.json", "lock", "records"


@contextlib.contextmanager
def thrown_away_on_failure(destination: Path) -> Iterator[Path]:
    """A temporary folder that becomes `destination` once everything is in it, and goes on failure."""
    _check_destination(destination)
    with _telling(destination, "cannot be written"):
        destination.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{destination.name}.partial-", dir=destination.parent))
    try:
        yield aside
        with _telling(destination, "writing failed"):
            _finish(aside, destination)
    except OSError as error:
        raise UserError(f"destination {destination}: writing failed ({error.strerror}); nothing was kept") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class WorkFolder:
    """A working folder that outlives a failure, so that the same work can go on.

    Args:
        destination: what the folder becomes.
        plan: what must be the same for the work in it to be used.
    """

    def __init__(self, destination: Path, plan: Mapping[str, Any]) -> None:
        self.destination, self.plan = destination, dict(plan)
        self.path = work_path(destination)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Path]:
        """The folder, for this process alone.

        Raises:
            UserError: the destination holds something, the folder holds other work or cannot be written, or another
                process is at it.
        """
        _check_destination(self.destination)
        with _telling(self.destination, "cannot be written"):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / LOCK_NAME).open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"destination {self.destination}: another process is making it ({self.path})") from None
            self._claim()
            yield self.path
            with _telling(self.destination, "writing failed"):
                for name in (PLAN_NAME, LOCK_NAME):
                    (self.path / name).unlink()
                _finish(self.path, self.destination)

    def _claim(self) -> None:
        stamp = self.path / PLAN_NAME
        if not stamp.exists():
            with _telling(self.destination, "cannot be written"):
                stamp.write_text(json.dumps(self.plan, indent=1))
            return
        try:
            found = json.loads(stamp.read_text())
        except (OSError, json.JSONDecodeError):
            found = {}
        differing = [name for name, value in self.plan.items() if found.get(name) != value]
        if differing:
            raise UserError(
                f"destination {self.destination}: unfinished work in {self.path} has other {differing[0]}; "
                "go on with the command it was begun with, or begin anew with --fresh"
            )


def work_path(destination: Path) -> Path:
    """Where unfinished shards of a destination lie."""
    return destination.parent / f".{destination.name}.partial"


def _check_destination(destination: Path) -> None:
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"destination {destination}: already exists and is not empty; remove it or give another")


@contextlib.contextmanager
def _telling(destination: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"destination {destination}: {what} ({error.strerror}); give another") from error


def _finish(aside: Path, destination: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    aside.chmod(0o777 & ~mask)
    aside.rename(destination)
