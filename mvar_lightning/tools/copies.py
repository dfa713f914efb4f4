"""Copies on this machine of what lies elsewhere: whole or not there, resumed, one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mvar_lightning.errors import UserError
from mvar_lightning.tools.files import kind_of, told, write_json
from mvar_lightning.tools.remote import PROGRESS, TAIL, About, RemoteFile, TransferError, about

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where fetched files are kept: ``$MVAR_CACHE``, else ``mvar`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("MVAR_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mvar"


Progress = Callable[[int, int | None], Callable[[int], None]]
"""(bytes that are there, bytes in all) -> what is told of each piece."""


def download(url: str, target: Path, sha256: str = "", what: str = "", progress: Progress | None = None) -> str:
    """Copy an address to a file, whole or not at all; what an earlier call got is kept in a part beside it.

    Args:
        url: one of `SCHEMES`.
        target: the file; its folder is made.
        sha256: hex digest, or the beginning of one; empty where it is not known.
        what: word before the address in messages.
        progress: told how far it is.

    Returns:
        The SHA-256 of what came.

    Raises:
        UserError: it cannot be had or written, or is something else; then nothing is kept.
    """
    found = about(url, what)
    with _alone(target):
        return _get(url, target, found, sha256, what, progress)


def _get(url: str, target: Path, found: About, sha256: str, what: str, progress: Progress | None) -> str:
    version = hashlib.sha256(f"{url} {found.size} {found.version}".encode()).hexdigest()[:12]
    part = target.with_name(f".{target.name}.{version}.part")
    for other in target.parent.glob(f".{target.name}.*.part"):
        if other != part:
            other.unlink(missing_ok=True)  # of another version
    digest = _fill(part, url, found.size, what, progress)
    if not digest.startswith(sha256):
        part.unlink()
        name = f"{what} {url}".strip()
        way_out = "nothing is kept; fetch it again, or from another place"
        raise UserError(f"{name}: has the SHA-256 {digest} instead of {sha256}; {way_out}")
    with told(target):
        part.replace(target)
    return digest


def _fill(part: Path, url: str, size: int | None, what: str, progress: Progress | None) -> str:
    """Bring a part to its end; the SHA-256 of it."""
    digest, tail, had = hashlib.sha256(), b"", 0
    with told(part), part.open("a+b") as file:
        file.seek(0)
        while block := file.read(PROGRESS):
            digest.update(block)
            tail, had = (tail + block)[-TAIL:], had + len(block)
        advance = progress(had, size) if progress else None
        try:
            with RemoteFile(url, size or 0, what, had, tail) as source:
                while block := source._next(PROGRESS):
                    file.write(block)
                    digest.update(block)
                    if advance:
                        advance(len(block))
        except TransferError as error:
            kept = "what came is kept, and the same command goes on"
            if "other bytes" in str(error) or "was changed" in str(error):
                part.unlink()
                kept = "begin again"
            raise UserError(f"{what} {url}: {error}; {kept}".strip()) from None
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """One process at a time; others wait."""
    with told(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with told(target), target.with_name(f".{target.name}.lock").open("ab") as file:
        with contextlib.suppress(OSError):  # no locks on this file system
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def fetched(path: str | os.PathLike[str]) -> Path:
    """A path; of a bare file name, or one in ``weights/``, where nothing is, the file that `mvar fetch` got."""
    path, kept = Path(path), weights_folder() / Path(path).name
    is_named = path.parent in (Path(), Path("weights")) and kind_of(path) is None
    return kept if is_named and kind_of(kept) == "file" else path


def weights_folder() -> Path:
    """Where `mvar fetch` puts files."""
    return cache_folder() / "weights"


def local_root(root: str, version: str = "") -> Path:
    """Where copies of what lies at an address are kept."""
    return cache_folder() / "remote" / hashlib.sha256(f"{root.rstrip('/')} {version}".encode()).hexdigest()[:16]


def _noted(note: Path) -> Any:
    try:
        return json.loads(note.read_bytes())
    except (OSError, ValueError):  # none there, or a damaged one
        return None


def local_copy(root: str, name: str, what: str = "", version: str = "") -> Path:
    """A file of a folder at an address, in `local_root`; fetched anew where it has changed there since.

    Raises `UserError` as `download` does.
    """
    url = f"{root.rstrip('/')}/{name}"
    target = local_root(root, version) / name.partition("?")[0]
    note = target.with_name(f".{target.name}.json")
    found = about(url, what)
    known = {"url": url} | asdict(found)
    with _alone(target):
        if kind_of(target) != "file" or _noted(note) != known:
            note.unlink(missing_ok=True)
            log.info("fetching %s", url)
            _get(url, target, found, "", what, None)
            write_json(note, known)
    return target
