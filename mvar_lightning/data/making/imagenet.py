"""ImageNet's archives as distributed (ILSVRC 2012), read in place: nothing is unpacked.

`ILSVRC2012_img_train.tar` holds a tar file for each class, named by its WordNet id; `ILSVRC2012_img_val.tar` holds the
validation images, and what they show stands elsewhere (`ground_truth`). Labels number the sorted WordNet ids, as in
every published model.
"""

from __future__ import annotations

import os
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, NamedTuple

from mvar_lightning.data.images import is_image
from mvar_lightning.data.making.ground_truth import WNID, find_ground_truth
from mvar_lightning.data.making.sources import Example, LazyExamples, Source
from mvar_lightning.errors import UserError

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_BLOCK = tarfile.BLOCKSIZE


class Member(NamedTuple):
    """A file in a tar file: its bytes lie from `start` on."""

    name: str
    start: int
    size: int


class TarExamples(LazyExamples):
    """Members of a tar file, by where their bytes lie in it: 16 bytes and a name each."""

    def __init__(self, path: Path, rows: Sequence[Member], labels: Sequence[int]) -> None:
        super().__init__(labels)
        self.tar, self.names = str(path), [row.name for row in rows]
        self.starts, self.sizes = array("q", (row.start for row in rows)), array("q", (row.size for row in rows))

    def example(self, index: int) -> Example:
        load = partial(read_range, self.tar, self.starts[index], self.sizes[index])
        return Example(f"{self.names[index]} in {self.tar}", self.labels[index], load)


def archives_of(path: str | Path) -> Path | None:
    """The folder that holds the training archive, where `path` is that folder or the archive itself."""
    path = Path(path)
    if path.name == TRAIN and path.is_file():
        return path.parent
    return path if (path / TRAIN).is_file() else None


def read_imagenet(folder: str | Path, ground_truth: str | Path | None = None) -> Source:
    """Both archives of a folder; ``ground_truth`` says where the validation labels stand, if not beside them.

    Raises:
        UserError: an archive or the ground truth is missing or damaged, or they do not belong together.
    """
    folder = Path(folder)
    if not (folder / VAL).is_file():
        raise UserError(f"ImageNet {folder}: {VAL} is not there; put it (or a link to it) beside {TRAIN}")
    truth = find_ground_truth([folder], ground_truth)  # before the archive of 138 GB is walked through
    names, train = _train(folder / TRAIN)
    rows = sorted(_images(folder / VAL))
    if not rows:
        raise UserError(f"archive {folder / VAL}: holds no images; copy it again")
    labels = truth.labels([row.name for row in rows], names, folder / VAL)
    of_classes = sorted(zip(labels, rows, strict=True))  # the order of class folders, so that bytes agree with theirs
    val = TarExamples(folder / VAL, [row for _, row in of_classes], [label for label, _ in of_classes])
    return Source(names, train, val)


def read_range(path: str, start: int, size: int) -> bytes:
    """Bytes of a file. Raises UserError where they are not there."""
    try:
        data = os.pread(_opened(path), size, start)
        end = os.fstat(_opened(path)).st_size
    except OSError as error:
        raise UserError(f"archive {path}: cannot be read ({error.strerror})") from None
    if len(data) != size:
        raise UserError(f"archive {path}: ends at {end} bytes, an image reaches beyond; copy it again")
    return data


@lru_cache(maxsize=8)
def _opened(path: str) -> int:
    return os.open(path, os.O_RDONLY)


def members(path: Path, file: IO[bytes], start: int, end: int) -> Iterator[Member]:
    """Files of the tar file that lies at bytes `start` to `end` of an open file.

    tarfile takes a header that it cannot read, and an end that comes too soon, for the end of the archive; here
    they are errors. Raises UserError.
    """
    after = start
    try:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while after < end and (member := tar.next()) is not None and member.offset < end:
                after = member.offset_data + (-(-member.size // _BLOCK) * _BLOCK if member.isfile() else 0)
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"{member.name} reaches beyond its end")
                tar.members.clear()  # type: ignore[attr-defined]  # it keeps every header it has seen
                if member.isfile():
                    yield Member(member.name, member.offset_data, member.size)
        file.seek(after)
        if after < end and any(file.read(min(_BLOCK, end - after))):
            raise tarfile.ReadError(f"no header at byte {after}")
    except (OSError, tarfile.TarError) as error:
        raise UserError(
            f"archive {path}: is damaged or cut off ({error}); compare its checksum, copy it again"
        ) from None


def _images(path: Path) -> Iterator[Member]:
    """Images of a plain archive, by the names of their files."""
    with _open(path) as file:
        for member in _whole(path, file):
            if is_image(member.name):
                yield Member(Path(member.name).name, member.start, member.size)


def _train(path: Path) -> tuple[tuple[str, ...], TarExamples]:
    """Class names, and all images class by class in the order of their names."""
    found: dict[str, list[Member]] = {}
    with _open(path) as file, _open(path) as inside:
        for archive in _whole(path, file):
            wnid = Path(archive.name).stem
            if not (WNID.fullmatch(wnid) and archive.name.endswith(".tar")):
                continue
            inner = members(path, inside, archive.start, archive.start + archive.size)
            found[wnid] = sorted(member for member in inner if is_image(member.name))
    if not found:
        raise UserError(f"archive {path}: holds no tar files named by WordNet ids; give the archive as distributed")
    names = tuple(sorted(found))
    if empty := [name for name in names if not found[name]]:
        raise UserError(f"archive {path}: {empty[0]}.tar holds no images; copy it again")
    labels = array("l", (label for label, name in enumerate(names) for _ in found[name]))
    return names, TarExamples(path, [member for name in names for member in found.pop(name)], labels)


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"archive {path}: cannot be read ({error.strerror})") from None


def _whole(path: Path, file: IO[bytes]) -> Iterator[Member]:
    """Files of an archive of its own, which must have its end mark: without it, it was cut between two files."""
    size = os.fstat(file.fileno()).st_size
    last = Member("", 0, 0)
    for last in members(path, file, 0, size):
        yield last
    if last.start + last.size + _BLOCK > size:
        raise UserError(f"archive {path}: is cut off (no end mark); compare its checksum, copy it again")
