"""Reading and writing files of tensors. Nothing in a file is ever executed.

PyTorch files are read with ``weights_only`` and, where their form allows, memory-mapped: tensors then take memory
only as they are copied out.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mvar_lightning.errors import UserError


def read_torch(path: str | Path) -> Any:
    """The content of a ``torch.save`` file: tensors on the CPU and plain values.

    Raises:
        UserError: no such file, a truncated or foreign file, or one that holds anything but tensors and plain values.
    """
    path = existing_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can make the reader fail in any way
        blocked = re.search(r"unsupported (?:global|class)\W+(?:GLOBAL )?([\w.]+)", str(error), re.IGNORECASE)
        if blocked:
            raise UserError(
                f"{path}: refused, it asks to run {blocked[1]} while being read; only tensors and plain values are "
                "accepted (nothing was executed)"
            ) from error
        raise UserError(
            f"{path}: not readable as a PyTorch file of tensors ({type(error).__name__}): it is truncated, of another "
            "kind, or a pickle with code (nothing was executed)"
        ) from error


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises `UserError` where it cannot be read."""
    path = existing_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(f"{path}: not a readable safetensors file (truncated, or of another kind): {error}") from error


def read_json(path: str | Path) -> Any:
    """The content of a JSON file. Raises `UserError` where it cannot be read."""
    path = existing_file(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error


def existing_file(path: str | Path) -> Path:
    """The path of a file that is there. Raises `UserError` otherwise."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    return path


def write_tensors(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Write as safetensors where the name says so, else as ``torch.save`` does."""
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    if Path(path).suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)


@contextmanager
def written_aside(*targets: str | Path) -> Iterator[list[Path]]:
    """Paths to write to in place of ``targets``; they take the targets' names only if nothing fails."""
    asides: list[Path] = []
    try:
        for target in map(Path, targets):
            if not target.parent.is_dir():
                raise UserError(f"{target}: the folder {target.parent} does not exist")
            handle, name = tempfile.mkstemp(prefix=".aside-", suffix=target.suffix, dir=target.parent)
            os.close(handle)
            asides.append(Path(name))
        yield asides
        for aside, path in zip(asides, targets, strict=True):
            aside.chmod(0o666 & ~_umask())
            aside.replace(path)
    finally:
        for aside in asides:
            aside.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# One run at a time in a folder: a lock that the system gives back when its process ends, however it ends.


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


# Whether results can be written where they are to go, asked before the work and not after it.


def check_folder(folder: Path, option: str = "--out") -> None:
    """Make a folder, write to it, and leave nothing behind.

    Folders that were missing are removed again: a mistake that is found later should leave no empty ones.

    Args:
        folder: that files are to be written into.
        option: who named it, for the message.

    Raises:
        UserError: the folder cannot be made, or no file in it.
    """
    new: list[Path] = []
    try:
        for place in (folder, *folder.parents):
            if not place.exists():
                new.append(place)
            elif not place.is_dir():
                raise UserError(f"{option} {folder}: {place} is a file; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".trial-", dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{option} {folder}: cannot be written ({error.strerror}); choose another folder") from error
    finally:
        with suppress(OSError):  # not there, or by now another command's
            for place in new:
                place.rmdir()
