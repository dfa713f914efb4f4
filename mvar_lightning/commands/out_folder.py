"""Whether results can be written where they are to go, asked before the work and not after it."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

from mvar_lightning.errors import UserError


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
