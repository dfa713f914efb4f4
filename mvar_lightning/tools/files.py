"""Files: read safely, write whole, lock, claim by settings. Nothing in a file is ever executed.

What a file system, or a damaged file, has against being read becomes a `UserError` here, so that nobody else has to
think of it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

from mvar_lightning.errors import UserError

JSON_BYTES = 2**28  # no JSON of ours comes near; a larger file is something else

# Reading


def read_json(path: str | Path, damaged: str = "not readable as JSON: {error}") -> Any:
    """The content of a JSON file. Raises `UserError` where there is none, or with ``damaged`` where it is no JSON."""
    path = existing_file(path)
    try:
        with path.open("rb") as file:
            return parse_json(file.read(JSON_BYTES + 1))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {damaged.format(error=in_a_line(error))}") from error


def parse_json(content: bytes, **options: Any) -> Any:
    """Raises ValueError, or RecursionError (nested too deep), where the content is no JSON of ours."""
    if len(content) > JSON_BYTES:
        raise ValueError(f"more than {JSON_BYTES:,} bytes")
    return json.loads(content, **options)


def in_a_line(error: Exception, longest: int = 300) -> str:
    """What an error says, in one line of bounded length."""
    return " ".join(str(error).split())[:longest] or type(error).__name__


def kind_of(path: str | Path) -> Literal["file", "folder", "device"] | None:
    """What is at a path, links followed; None where nothing is.

    Raises:
        UserError: that cannot be found out, as a folder above may not be read, or the name is none.
    """
    try:
        mode = Path(path).stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # the latter: a null character
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(
            f"{str(path)[:300]}: cannot be read ({reason}); give another path or mend the rights"
        ) from error
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "device"


def existing_file(path: str | Path) -> Path:
    """The path of a file that is there and may be read. Raises `UserError` otherwise."""
    path, kind = Path(path), kind_of(path)
    if kind != "file":
        raise UserError(f"{path}: {'no such file' if kind is None else f'is a {kind}, not a file'}")
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give another path or mend the rights") from error
    return path


def sha256_of(*paths: Path) -> str:
    """Hex digest of the content of files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# Writing: a file is whole, or not there


def write(path: Path, content: bytes | str | Callable[[IO[bytes]], object], *, durable: bool = False) -> None:
    """Write a file aside and rename it: a reader never sees half of it, and a failure leaves the one before.

    Args:
        path: in a folder that exists.
        content: what to write; text is UTF-8. A function is given the open file.
        durable: the content lies on the disk before the name is given (see `writing`).

    Raises:
        OSError: it cannot be written. Also where ``content`` is a function that wraps such an error in one of its own,
            as torch's writer does.
    """
    with writing(path, durable=durable) as (aside,), _Watched(io.FileIO(aside, "wb")) as file:
        if not callable(content):
            file.write(content.encode() if isinstance(content, str) else content)
            return
        try:
            content(file)
        except RuntimeError as error:
            if file.error is not None:
                raise file.error from error
            raise


def write_json(path: Path, value: Any, *, durable: bool = False) -> None:
    """Write a value as JSON, as `write` does."""
    write(path, json.dumps(value, indent=2) + "\n", durable=durable)


@contextmanager
def writing(*targets: Path, durable: bool = False) -> Iterator[list[Path]]:
    """Paths to write to in place of ``targets``, which take the targets' names together, if nothing fails.

    The files aside lie beside their targets, so that a rename is all it takes. What was written there has the mode that
    the umask gives, whoever wrote it (safetensors would make it the owner's alone).

    Args:
        durable: put the content, and then its name, on the disk first: a machine that loses its power then has the
            old file or the new one. What killed processes left beside it is removed.
    """
    asides = [_aside(target) for target in targets]
    try:
        modes = []
        for target, aside in zip(targets, asides, strict=True):
            if durable:
                _sweep(target)
            aside.open("wb").close()
            modes.append(aside.stat().st_mode)
        yield asides
        for target, aside, mode in zip(targets, asides, modes, strict=True):
            if aside.stat().st_mode != mode:
                aside.chmod(mode)
            if durable:
                _sync(aside)
            aside.replace(target)
        if durable:
            for folder in {target.parent for target in targets}:
                with suppress(OSError):  # some file systems know no such thing for folders
                    _sync(folder)
    finally:
        for aside in asides:
            with suppress(OSError):  # the disk may have gone with what was being written
                aside.unlink(missing_ok=True)


@contextmanager
def writing_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of the folder ``target``, if there is one, once nothing has failed.

    No file system exchanges two folders by one call, so the one before waits under another name until the new one is in
    its place: whatever ends the process, one of them stands, and `standing` finds it.

    Raises:
        OSError: something cannot be written.
    """
    target = Path(os.path.realpath(target))  # of a link the folder that it leads to
    aside, before = _aside(target), _aside(target, "before")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        aside.mkdir()
        yield aside
        if target.exists():
            target.rename(before)
        aside.rename(target)
    finally:
        if before.exists() and not target.exists():
            before.rename(target)
        for left in (aside, before):
            shutil.rmtree(left, ignore_errors=True)


def standing(target: Path) -> Path:
    """Where a folder is that `writing_folder` replaces: under its own name, but for the moment of the exchange."""
    return target if kind_of(target) else next(_left(target, "before"), target)


def _aside(target: Path, kind: str = "partial") -> Path:
    """A name beside a target that is no other process's and no other thread's; of the same suffix."""
    thread = "" if threading.current_thread() is threading.main_thread() else f"{threading.get_ident()}-"
    return target.with_name(f".{kind}-{os.getpid()}-{thread}{_tail(target)}")


def _left(target: Path, kind: str) -> Iterator[Path]:
    """Names of this form that are there, whoever gave them."""
    form = re.compile(rf"\.{kind}-\d+-(\d+-)?{re.escape(_tail(target))}")
    return (left for left in target.parent.glob(f".{kind}-*") if form.fullmatch(left.name))


def _tail(target: Path) -> str:
    """A target's name, or where a longer one would be too long for a file system, a digest of it."""
    name = target.name
    return name if len(os.fsencode(name)) < 200 else hashlib.sha256(os.fsencode(name)).hexdigest() + target.suffix[-20:]


class _Watched(io.BufferedWriter):
    """A file that remembers why it could not be written."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sweep(target: Path) -> None:
    """Remove what processes that are gone left of this file or folder; a folder that none has replaced is put back."""
    names = _aside(target), _aside(target, "before")  # in a container a killed process may have had this number, too
    for left in [*_left(target, "before"), *_left(target, "partial")]:
        if not (left in names and left.is_dir()) and is_alive(int(left.name.split("-")[1])):
            continue
        if left.name.startswith(".before-") and not target.exists():
            left.rename(target)
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """Whether a process of this machine is at work; somebody else's may be."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def check_folder(folder: Path, option: str = "``out``") -> None:
    """Whether results can be written where they are to go, asked before the work and not after it: make the folder,
    write to it, and leave nothing behind.

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


# Whose folder it is: locked for the length of a job, claimed for good


class Lock:
    """One job at a time in a folder: a lock on a file in it, which the system gives back however its process ends.

    A record lock (`fcntl.lockf`): it belongs to the process alone, so that neither data workers nor other children keep
    it alive, and network file systems that lock at all (NFS, Lustre with flock, GPFS) know it across nodes. Where the
    file system cannot lock, the job goes on without.

    Args:
        path: of the lock's file; its folder exists.
        busy: message where another process has it; ``{owner}`` in it becomes that process.
    """

    # of the process: closing any handle of the file would drop its lock
    _held: dict[Path, Lock] = {}  # noqa: RUF012

    def __init__(self, path: Path, busy: str) -> None:
        self.path, self.busy = path, busy
        self._handle: int | None = None

    def take(self) -> None:
        """Raises `UserError` where another process, or job of this one, has it, or it is another user's; OSError where
        it cannot be made."""
        if self.path.resolve() in self._held:
            raise UserError(self.busy.replace("{owner}", "this process"))
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}), the folder is another user's; choose another one"
            ) from error
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(handle, 200).decode(errors="replace").strip()
            os.close(handle)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(self.busy.replace("{owner}", owner or "just started")) from None
            return  # no locks on this file system
        os.ftruncate(handle, 0)
        owner = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        os.write(handle, owner.encode())
        self._handle = handle
        self._held[self.path.resolve()] = self

    def release(self) -> None:
        if self._handle is not None:
            self._held.pop(self.path.resolve(), None)
            os.close(self._handle)
            self._handle = None

    def check(self) -> None:
        """Raise `UserError` where another process has it (this one may); leaves nothing behind."""
        if kind_of(self.path) == "file" and self.path.resolve() not in self._held:
            self.take()
            self.release()

    def __enter__(self) -> Lock:
        self.take()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


Refuse = Callable[[str, Any, Any], str]
"""(name of a setting, theirs, ours) -> why a folder cannot be taken."""


def check_claim(note: Path, settings: Mapping[str, Any], refuse: Refuse) -> bool:
    """Whether a folder is claimed, by the settings that its note holds.

    Raises:
        UserError: it is, and a setting differs from ours (the first is told, by ``refuse``); or the note is damaged.
    """
    if kind_of(note) is None:
        return False
    found = read_json(note, f"is damaged ({{error}}); choose another folder, or remove {note.parent} and begin anew")
    for name, value in json.loads(json.dumps(settings)).items():
        theirs = found.get(name) if isinstance(found, dict) else None
        if theirs != value:
            raise UserError(refuse(name, theirs, value))
    return True


def claim(note: Path, settings: Mapping[str, Any], refuse: Refuse) -> None:
    """Note in a folder, which is made if it is missing, which settings its content follows from; or check that.

    Raises:
        UserError: as `check_claim`.
        OSError: it cannot be written.
    """
    if not check_claim(note, settings, refuse):
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, settings)


@contextmanager
def told(*paths: Path) -> Iterator[None]:
    """Say in one line why files cannot be written: a full disk, a read-only one, no rights, a file in the way."""
    try:
        yield
    except OSError as error:
        names = " and ".join(map(str, paths))
        reason = error.strerror or in_a_line(error)
        raise UserError(
            f"{names}: cannot be written ({reason}); nothing was changed; make room or choose another place"
        ) from error
