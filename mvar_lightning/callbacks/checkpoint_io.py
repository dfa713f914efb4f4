"""Checkpoints that are whole or not there: written aside on the same file system, on the disk, then renamed.

Lightning's own writer goes through the system's temporary folder. Where that is another file system (on most
clusters), its last act is a copy over the old checkpoint, and a kill in the middle of it leaves neither.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from mvar_lightning.errors import UserError


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's reader, and a writer that a crash, a kill or a full disk cannot make lose the checkpoint before.

    The file being written is ``.NAME.partial`` beside it; what a killed run left there is overwritten by the next.
    Twice the size of a checkpoint must be free.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises `UserError` where the disk is full or cannot be written; the checkpoint before is then intact."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        aside = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(checkpoint, aside)
            aside.replace(path)
            _sync(path.parent)
        except OSError as error:
            aside.unlink(missing_ok=True)
            before = "the one written before it is intact" if path.is_file() else "there is none yet"
            raise UserError(
                f"checkpoint {path}: could not be written ({error.strerror}; {_free(path)} free); {before}; make room "
                "or mend the disk, then run the same command again"
            ) from error


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    """Straight to the file: 2B parameters with their moments are 24 GB, which another copy in memory would double.

    torch's writer tells of a failed write in words of its own; the error beneath is told instead.
    """
    with path.open("wb") as file:
        watched: Any = _Watched(file)
        try:
            torch.save(checkpoint, watched)
        except RuntimeError as error:
            if watched.error is not None:
                raise watched.error from error
            raise
        file.flush()
        os.fsync(file.fileno())


class _Watched:
    """A file that remembers why it could not be written."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return int(self.file.write(data))
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def _sync(folder: Path) -> None:
    """Put the new name on the disk; some file systems know no such thing for folders."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def _free(path: Path) -> str:
    try:
        room = os.statvfs(path.parent)
    except OSError:
        return "unknown"
    return f"{room.f_bavail * room.f_frsize / 1e9:.1f} GB"
