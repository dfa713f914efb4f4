"""One run at a time in a folder: a lock that the system gives back when its process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from mvar_lightning.errors import UserError

NAME = ".lock"


class FolderLock:
    """Held by rank zero for as long as its run lasts.

    A record lock (`fcntl.lockf`): it belongs to the process alone, so that neither data workers nor other children keep
    it alive, and network file systems that lock at all (NFS, Lustre with flock, GPFS) know it across nodes. Where the
    file system cannot lock, the run goes on without.
    """

    _held: dict[Path, FolderLock] = {}  # noqa: RUF012 (of the process: closing any handle of the file would drop its lock)

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._handle: int | None = None

    def take(self) -> None:
        """Raises `UserError` where another process has it."""
        if self.path.resolve() in self._held:
            return
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(handle, 200).decode(errors="replace").strip()
            os.close(handle)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"run folder {self.path.parent}: another run is at work in it ({owner or 'just started'}); "
                    "wait for it or stop it, or name another folder with --run-folder"
                ) from None
            return  # no locks on this file system
        os.ftruncate(handle, 0)
        told = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        os.write(handle, told.encode())
        self._handle = handle
        self._held[self.path.resolve()] = self

    def release(self) -> None:
        if self._handle is not None:
            self._held.pop(self.path.resolve(), None)
            os.close(self._handle)
            self._handle = None


def check_free(folder: Path) -> None:
    """Raise `UserError` where another process runs in a folder; leaves nothing behind."""
    if (folder / NAME).is_file():
        lock = FolderLock(folder)
        lock.take()
        lock.release()
