"""ImageNet's archives as distributed (ILSVRC 2012), read in place: nothing is unpacked.

`ILSVRC2012_img_train.tar` holds a tar file for each class, named by its WordNet id; `ILSVRC2012_img_val.tar` holds the
validation images, and what they show stands elsewhere. Labels number the sorted WordNet ids, as in every published
model. The development kit numbers classes in another order, so its ground truth is of use only beside its `meta.mat`.
"""

from __future__ import annotations

import csv
import io
import os
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any, cast, overload

from mvar_lightning.data.images import SUFFIXES
from mvar_lightning.data.sources import Example, Source
from mvar_lightning.errors import UserError

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
GROUND_TRUTHS = (DEVKIT, "LOC_val_solution.csv", "ILSVRC2012_validation_ground_truth.txt")
"""Found by themselves beside the archives, in this order."""

WAYS = f"give --ground-truth with {DEVKIT}, Kaggle's LOC_val_solution.csv, or a text file with one WordNet id a line"
_WNID = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"_(\d{8})\.")


class TarExamples(Sequence[Example]):
    """Members of a tar file as examples, by their place in it: 16 bytes and a name each."""

    def __init__(self, tar: str, names: Sequence[str], labels: Sequence[int], starts: array, sizes: array) -> None:
        self.tar, self.names, self.labels, self.starts, self.sizes = tar, names, array("l", labels), starts, sizes

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> TarExamples: ...
    def __getitem__(self, place: int | slice) -> Example | TarExamples:
        if isinstance(place, slice):
            return TarExamples(self.tar, self.names[place], self.labels[place], self.starts[place], self.sizes[place])
        load = partial(read_range, self.tar, self.starts[place], self.sizes[place])
        return Example(f"{self.names[place]} in {self.tar}", self.labels[place], load)


def is_imagenet(folder: str | Path) -> bool:
    """Whether a folder holds the training archive."""
    return (Path(folder) / TRAIN).is_file()


def read_imagenet(folder: str | Path, ground_truth: str | Path | None = None) -> Source:
    """Both archives of a folder; ``ground_truth`` says where the validation labels stand, if not beside them.

    Raises:
        UserError: an archive or the ground truth is missing or damaged, or does not tell the classes.
    """
    folder = Path(folder)
    names, train = _train(folder / TRAIN)
    if not (folder / VAL).is_file():
        raise UserError(f"ImageNet {folder}: {VAL} is not there; put it beside {TRAIN}")
    return Source(names, train, _val(folder / VAL, _ground_truth(folder, ground_truth), names))


def read_range(path: str, start: int, size: int) -> bytes:
    """Bytes of a file. Raises UserError where they are not there."""
    try:
        data = os.pread(_opened(path), size, start)
    except OSError as error:
        raise UserError(f"archive {path}: cannot be read ({error.strerror})") from None
    if len(data) != size:
        raise UserError(f"archive {path}: ends at {start + len(data)} bytes, an image reaches beyond; copy it again")
    return data


@lru_cache(maxsize=8)
def _opened(path: str) -> int:
    return os.open(path, os.O_RDONLY)


class _Part(io.RawIOBase):
    """A stretch of a file as a file of its own: a tar file inside a tar file."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        super().__init__()
        self.file, self.start, self.size, self.place = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.size}[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        self.file.seek(self.start + self.place)
        data = self.file.read(min(len(buffer), max(0, self.size - self.place)))
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)


def _images(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        if member.isfile() and member.name.rpartition(".")[2].lower() in SUFFIXES:
            yield member
        cast(Any, tar).members = []  # tarfile keeps every header it has seen


def _train(path: Path) -> tuple[tuple[str, ...], TarExamples]:
    """Class names, and all images class by class in the order of their names."""
    found: dict[str, list[tuple[str, int, int]]] = {}
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as outer:
            for member in outer:
                wnid = Path(member.name).stem
                if not (member.isfile() and _WNID.fullmatch(wnid) and member.name.endswith(".tar")):
                    continue
                with tarfile.open(fileobj=_Part(file, member.offset_data, member.size), mode="r:") as inner:
                    found[wnid] = sorted(
                        (image.name, member.offset_data + image.offset_data, image.size) for image in _images(inner)
                    )
    except (OSError, tarfile.TarError) as error:
        raise UserError(
            f"archive {path}: is damaged or cut off ({error}); compare its checksum, copy it again"
        ) from None
    if not found:
        raise UserError(f"archive {path}: holds no tar files named by WordNet ids; give the archive as distributed")
    names = tuple(sorted(found))
    if empty := [name for name in names if not found[name]]:
        raise UserError(f"archive {path}: {empty[0]}.tar holds no images; copy it again")
    rows = [(row, label) for label, name in enumerate(names) for row in found.pop(name)]
    return names, _tar_examples(path, rows)


def _val(path: Path, wnid_of: dict[int, str] | dict[str, str], names: tuple[str, ...]) -> TarExamples:
    label_of = {name: label for label, name in enumerate(names)}
    rows = []
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in _images(tar):
                label = label_of.get(_wnid(path, Path(member.name).name, wnid_of), -1)
                if label < 0:
                    raise UserError(f"archive {path}: {member.name} shows a class that {TRAIN} does not have")
                rows.append(((Path(member.name).name, member.offset_data, member.size), label))
    except (OSError, tarfile.TarError) as error:
        raise UserError(
            f"archive {path}: is damaged or cut off ({error}); compare its checksum, copy it again"
        ) from None
    if not rows:
        raise UserError(f"archive {path}: holds no images; copy it again")
    return _tar_examples(path, sorted(rows))


def _tar_examples(path: Path, rows: Sequence[tuple[tuple[str, int, int], int]]) -> TarExamples:
    return TarExamples(
        str(path),
        [name for (name, _, _), _ in rows],
        [label for _, label in rows],
        array("q", (start for (_, start, _), _ in rows)),
        array("q", (size for (_, _, size), _ in rows)),
    )


def _wnid(path: Path, name: str, wnid_of: dict[int, str] | dict[str, str]) -> str:
    known = cast(dict[int | str, str], wnid_of)
    number = _NUMBER.search(name)
    wnid = known.get(Path(name).stem) or (known.get(int(number[1])) if number else None)
    if wnid is None:
        raise UserError(f"archive {path}: the ground truth has no line for {name}; {WAYS}")
    return wnid


# -- what the validation images show: WordNet ids by image number (from 1), or by the file's stem


def _ground_truth(folder: Path, given: str | Path | None) -> dict[int, str] | dict[str, str]:
    places = [Path(given)] if given is not None else [folder / name for name in GROUND_TRUTHS]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        missing = f"{places[0]} does not exist" if given is not None else "no ground truth beside the archives"
        raise UserError(f"ImageNet {folder}: {missing}; {WAYS}")
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return _from_devkit(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"ground truth {path}: cannot be read ({error}); {WAYS}") from None
    if path.suffix.lower() == ".csv":
        return _from_kaggle(path, text)
    return _from_lines(path, text.split())


def _from_kaggle(path: Path, text: str) -> dict[str, str]:
    """Lines `ILSVRC2012_val_00048981,n03995372 85 1 499 272 ...` (the id of the first box)."""
    found = {}
    for number, row in enumerate(csv.reader(text.splitlines()), start=1):
        if number == 1 and row[:1] == ["ImageId"]:
            continue
        if len(row) != 2 or not _WNID.fullmatch(row[1].split(" ")[0]):
            raise UserError(f"ground truth {path}, line {number}: is not an image and its WordNet ids; {WAYS}")
        found[row[0]] = row[1].split(" ")[0]
    return found


def _from_lines(path: Path, words: list[str]) -> dict[int, str]:
    if words and all(word.isdecimal() for word in words):
        raise UserError(
            f"ground truth {path}: has numbers, and the development kit numbers classes in an order of its own; "
            f"give --ground-truth {DEVKIT}, which says what they mean"
        )
    if bad := [word for word in words if not _WNID.fullmatch(word)]:
        raise UserError(f"ground truth {path}: {bad[0]!r} is not a WordNet id such as n01440764; {WAYS}")
    return dict(enumerate(words, start=1))


def _from_devkit(path: Path) -> dict[int, str]:
    """The numbers of the ground truth, told as WordNet ids by `meta.mat`."""
    from scipy.io import loadmat

    try:
        with tarfile.open(path) as tar:
            files = {Path(member.name).name: member for member in tar if member.isfile()}
            meta, truth = (tar.extractfile(files[name]) for name in ("meta.mat", GROUND_TRUTHS[2]))
            assert meta is not None and truth is not None
            synsets = loadmat(io.BytesIO(meta.read()), squeeze_me=True)["synsets"]
            wnid_of = {int(number): str(wnid) for number, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"],
                                                                      strict=True)}  # fmt: skip
            return {place: wnid_of[int(word)] for place, word in enumerate(truth.read().split(), start=1)}
    except KeyError as error:
        raise UserError(f"ground truth {path}: lacks {error}; give the development kit as distributed") from None
    except (OSError, tarfile.TarError, ValueError) as error:
        raise UserError(f"ground truth {path}: is damaged ({error}); copy it again") from None
