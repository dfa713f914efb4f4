"""Class folders: the images in them, how classes are numbered, and what is left out, which is told."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mvar_lightning.data.images import FORMATS, SUFFIXES, is_image
from mvar_lightning.errors import UserError

TOOLS = ("__MACOSX", "__pycache__", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
"""Folders that tools leave among images; so do those whose names begin with a dot."""


class FolderScan:
    """Reads class folders, and counts what it leaves out of them for `notes`; ``scans`` are suffixes of images, too."""

    def __init__(self, scans: tuple[str, ...] = ()) -> None:
        self.scans = scans
        self.others: Counter[str] = Counter()
        self.tools: Counter[str] = Counter()
        self.links = 0
        self.numbered = ""

    def classes(self, folder: Path) -> list[Path]:
        """The class folders of a folder: by name, or by value where all names are numbers, as in lists."""
        with _reading(folder):
            found = sorted(folder.iterdir())
        classes = [path for path in found if path.is_dir() and not is_tools(path.name)]
        if all(path.name.isdecimal() for path in classes):
            classes.sort(key=lambda path: (int(path.name), path.name))
        return classes

    def images_by_class(self, folder: Path) -> dict[str, list[str]]:
        """Raises UserError where there are none, or a class has none."""
        with _reading(folder):
            beside = list(folder.iterdir())
        classes = self.classes(folder)
        if not classes:
            hint = "it holds files only" if beside else "it is empty"
            raise UserError(f"image folder {folder}: no class folders ({hint}); put images into {folder}/CLASS/")
        for path in beside:
            self._leave_out(path.name, path.is_dir())
        files: dict[str, list[str]] = {}
        empty: list[str] = []
        for path in classes:
            if os.fsencode(path.name).decode("utf-8", "ignore") != path.name:
                raise UserError(f"class folder {str(path)!r}: its name is no text that can be written; rename it")
            before = self.others.copy()
            files[path.name] = self.images(path)
            if not files[path.name]:
                held = _counts(self.others - before)
                empty.append(f"class folder {path}: no images in it{held and f', but {held}'} (read are {_READ})")
        if len(empty) == len(files):
            raise UserError(f"image folder {folder}: no images in its class folders (looked for {', '.join(SUFFIXES)})")
        if empty:
            raise UserError(f"{empty[0]}; add some or remove the folder")
        self.numbered = self.numbered or numbering(list(files))
        return files

    def images(self, folder: Path) -> list[str]:
        """All images below a folder, in an order that depends on their names alone. Links to folders are followed, each
        real folder is read once."""
        found = []
        real = folder.resolve()
        seen = {_identity(place) for place in (real, *real.parents)}  # a link to one of these leads back
        with _reading(folder):
            for root, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
                folders[:] = [name for name in sorted(folders) if self._enters(root, name, seen)]
                for name in names:
                    if name[0] != "." and is_image(name, self.scans):
                        found.append(os.path.join(root, name))  # noqa: PTH118 (a million Path objects are a gigabyte)
                    else:
                        self._leave_out(name, is_folder=False)
        return sorted(found, key=lambda path: path.replace(os.sep, "/"))

    def _enters(self, root: str, name: str, seen: set[tuple[int, int]]) -> bool:
        if is_tools(name):
            self._leave_out(name, is_folder=True)
            return False
        identity = _identity(Path(root) / name)
        if identity in seen:
            self.links += 1
            return False
        seen.add(identity)
        return True

    def _leave_out(self, name: str, is_folder: bool) -> None:
        if is_folder:
            self.tools.update([name] if is_tools(name) else [])
        elif name[0] != ".":
            self.others[Path(name).suffix.lower() or "without suffix"] += 1

    @property
    def notes(self) -> tuple[str, ...]:
        said = (
            (_counts(self.others), f"left out of the images: {{}} (read are {_READ})"),
            (_counts(self.tools), "left out, folders of tools: {}"),
            (self.links, "left out, links to folders that are read already: {}"),
            (self.numbered, "{}"),
        )
        return tuple(text.format(what) for what, text in said if what)


_READ = f"{', '.join(FORMATS)} by the names {', '.join(SUFFIXES)}"


def is_tools(name: str) -> bool:
    return name.startswith(".") or name in TOOLS


def numbering(names: Sequence[str]) -> str:
    """What to say of class names that are numbers; nothing of others."""
    if not all(name.isdecimal() for name in names):
        return ""
    ends = f"label 0 is {names[0]}, label {len(names) - 1} is {names[-1]}"
    return f"class names are numbers, in the order of their values: {ends}"


def _counts(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _identity(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_dev, about.st_ino


def _raise(error: OSError) -> None:
    raise error


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"image folder {error.filename or folder}: cannot be read ({error.strerror})") from None
