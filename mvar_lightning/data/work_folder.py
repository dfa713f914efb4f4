"""Where shards are while they are made: a folder beside the destination, which gets its content once all is there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from mvar_lightning.errors import UserError

PLAN_NAME, LOCK_NAME = "plan.json", "lock"


class WorkFolder:
    """Two folders: `shards`, which becomes the destination, and `records` of what is finished.

    Args:
        destination: what `shards` becomes.
        plan: what must be the same for unfinished work to be used.
        keep: whether the work outlives a failure, so that it can go on; otherwise nothing is left behind.
        fresh: forget what an earlier failure left.
    """

    def __init__(self, destination: Path, plan: Mapping[str, Any], keep: bool, fresh: bool = False) -> None:
        self.destination = Path(os.path.realpath(destination))
        self.plan, self.keep, self.fresh = dict(plan), keep, fresh
        self.path = work_path(self.destination)

    @property
    def shards(self) -> Path:
        return self.path / "shards"

    @property
    def records(self) -> Path:
        return self.path / "records"

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """The folder, for this process alone; it becomes the destination when the block ends without an exception.

        Raises:
            UserError: the destination holds something, unfinished work there has another plan, another process is at
                it, or the disk refuses.
        """
        self._check_destination()
        with self._telling("cannot be written"):
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            if self.keep:
                self.path.mkdir(exist_ok=True)
            else:
                prefix = f".{self.destination.name}.partial-"
                self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=self.destination.parent))
            lock = (self.path / LOCK_NAME).open("w")
        with lock:
            self._lock(lock)
            try:
                self._claim()
                yield
                with self._telling("writing failed"):
                    self.shards.rename(self.destination)
                shutil.rmtree(self.path, ignore_errors=True)
            finally:
                if not self.keep:
                    shutil.rmtree(self.path, ignore_errors=True)

    @property
    def kept(self) -> str:
        """What a message adds after a failure."""
        return f"; what is finished is kept in {self.path}, the same command goes on" if self.keep else ""

    def _check_destination(self) -> None:
        folder = self.destination
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"destination {folder}: already exists and is not empty; remove it or give another")
        if folder.is_mount():
            raise UserError(f"destination {folder}: is a mount point, which cannot be replaced; give a folder in it")

    def _lock(self, lock: IO[str]) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"destination {self.destination}: another process is making it ({self.path})") from None
        except OSError:  # some network file systems have no locks
            return

    def _claim(self) -> None:
        stamp = self.path / PLAN_NAME
        with self._telling("cannot be written"):
            if self.fresh:
                for folder in (self.shards, self.records):
                    shutil.rmtree(folder, ignore_errors=True)
                stamp.unlink(missing_ok=True)
            for folder in (self.shards, self.records):
                folder.mkdir(exist_ok=True)
            if not stamp.exists():
                aside = stamp.with_suffix(".aside")
                aside.write_text(json.dumps(self.plan, indent=1))
                aside.replace(stamp)
                return
        try:
            found = json.loads(stamp.read_text())
            differing = [
                f"other {name} ({str(found.get(name))[:8]}, now {str(value)[:8]})"
                for name, value in self.plan.items()
                if found.get(name) != value
            ]
        except (OSError, ValueError, AttributeError):
            differing = [f"no readable {PLAN_NAME}"]
        if differing:
            raise UserError(
                f"destination {self.destination}: unfinished work in {self.path} has {differing[0]}; "
                "go on with the command it was begun with, begin anew with --fresh, or give another destination"
            )

    @contextlib.contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"destination {self.destination}: {what} ({error.strerror}); give another") from error


def work_path(destination: Path) -> Path:
    """Where unfinished shards of a destination lie."""
    return destination.parent / f".{destination.name}.partial"
