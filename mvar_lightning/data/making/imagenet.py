"""Folders of images as ImageNet's are (ILSVRC 2012): unpacked, or its archives as distributed, read in place.

`ILSVRC2012_img_train.tar` holds a tar file for each class, named by its WordNet id; `ILSVRC2012_img_val.tar` holds the
validation images, and what they show stands elsewhere. Labels number the sorted names of the classes, as in every
published model.
"""

from __future__ import annotations

import csv
import io
import os
import re
import tarfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, NamedTuple, cast

from mvar_lightning.data.images import is_image
from mvar_lightning.data.making.folders import FolderScan
from mvar_lightning.data.making.sources import Example, FileExamples, LazyExamples, Source, labeled, split_by_class
from mvar_lightning.data.tar import TarDamage, TarReader
from mvar_lightning.errors import UserError

# What the validation images show: the files that say so all number or name the images, each in its own way. Labels
# follow the sorted WordNet ids, so everything becomes WordNet ids first. Bare numbers are never guessed at: the
# development kit counts classes from 1 in an order of its own, Caffe's `val.txt` from 0 in sorted order.

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
KAGGLE = "LOC_val_solution.csv"

FOUND = (DEVKIT, "ILSVRC2012_devkit_t12", KAGGLE, TRUTH)
"""Found by themselves beside the images, in this order."""

WAYS = f"give ``ground_truth`` with {DEVKIT}, Kaggle's {KAGGLE}, or a text file with one WordNet id a line"

WNID = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"_(\d{8})\.")  # of ILSVRC2012_val_00000001.JPEG

Wnids = dict[int | str, str]
"""WordNet ids by the image's number (from 1), or by its file name without the suffix."""


@dataclass(frozen=True)
class GroundTruth:
    """The WordNet ids that a file tells, and the file, for messages."""

    path: Path
    wnids: Mapping[int | str, str]

    def labels(self, images: list[str], class_names: tuple[str, ...], where: str | Path) -> list[int]:
        """A label for each image. Raises UserError where images, ground truth and classes do not belong together."""
        label_of = {name: label for label, name in enumerate(class_names)}
        labels = []
        for name in images:
            number = _NUMBER.search(name)
            wnid = self.wnids.get(Path(name).stem) or (self.wnids.get(int(number[1])) if number else None)
            if wnid is None:
                raise UserError(f"ground truth {self.path}: has no line for {name}; {WAYS}")
            if wnid not in label_of:
                raise UserError(
                    f"ground truth {self.path}: {name} shows {wnid}, a class that the training images do not have"
                )
            labels.append(label_of[wnid])
        if len(images) != len(self.wnids):
            raise UserError(
                f"ground truth {self.path}: is for {len(self.wnids)} images, {where} has {len(images)}; "
                "copy the images again, or give the ground truth that belongs to them"
            )
        return labels


def find_ground_truth(folders: list[Path], given: str | Path | None = None) -> GroundTruth:
    """The file that the user named, or the first of `FOUND` in one of the folders.

    Raises:
        UserError: there is none, it cannot be read, or it does not tell the classes.
    """
    if given is None:
        path = next((path for folder in folders for name in FOUND if (path := folder / name).exists()), None)
        if path is None:
            raise UserError(f"validation images of {folders[0]}: no ground truth beside them; {WAYS}")
    elif not (path := Path(given)).exists():
        raise UserError(f"ground truth {path}: does not exist; {WAYS}")
    return GroundTruth(path, _read(path))


def _read(path: Path) -> Wnids:
    if path.is_dir():
        for data in (path, path / "data"):
            if (data / TRUTH).is_file() and (data / META).is_file():
                return _wnids(path, (data / TRUTH).read_text(encoding="utf-8").split(), (data / META).read_bytes())
        raise UserError(f"ground truth {path}: lacks data/{TRUTH} or data/{META}; give the development kit as it was")
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return _from_devkit(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"ground truth {path}: cannot be read ({error.strerror}); {WAYS}") from None
    except UnicodeDecodeError:
        raise UserError(f"ground truth {path}: is no text; {WAYS}") from None
    if path.suffix.lower() == ".csv":
        return _from_kaggle(path, text)
    return _from_lines(path, [line.split() for line in text.splitlines() if line.strip()])


def _from_kaggle(path: Path, text: str) -> Wnids:
    """Lines `ILSVRC2012_val_00048981,n03995372 85 1 499 272 ...` (the id of the first box)."""
    found: Wnids = {}
    for number, row in enumerate(csv.reader(text.splitlines()), start=1):
        if number == 1 and row[:1] == ["ImageId"]:
            continue
        if len(row) != 2 or not WNID.fullmatch(row[1].split(" ")[0]):
            raise UserError(f"ground truth {path}, line {number}: is not an image and its WordNet ids; {WAYS}")
        found[Path(row[0]).stem] = row[1].split(" ")[0]
    return found


def _from_lines(path: Path, rows: list[list[str]]) -> Wnids:
    """One WordNet id a line, or an image and its WordNet id."""
    if not rows:
        raise UserError(f"ground truth {path}: is empty; {WAYS}")
    if all(row[-1].isdecimal() for row in rows):
        meta = path.parent / META
        if meta.is_file() and all(len(row) == 1 for row in rows):
            return _wnids(path, [row[0] for row in rows], meta.read_bytes())
        raise UserError(
            f"ground truth {path}: has numbers, and lists number the classes differently (the development kit in an "
            f"order of its own); give ``ground_truth`` {DEVKIT}, which says what they mean, or put its {META} beside"
        )
    for number, row in enumerate(rows, start=1):
        if len(row) != len(rows[0]) or len(row) > 2 or not WNID.fullmatch(row[-1]):
            shown = " ".join(row)[:60]
            raise UserError(
                f"ground truth {path}, line {number}: {shown!r} is not a WordNet id such as n01440764; {WAYS}"
            )
    if len(rows[0]) == 2:
        return {Path(name).stem: wnid for name, wnid in rows}
    return dict(enumerate((row[0] for row in rows), start=1))


def _from_devkit(path: Path) -> Wnids:
    try:
        with tarfile.open(path) as tar:
            files = {Path(member.name).name: member for member in tar if member.isfile()}
            if lacking := [name for name in (META, TRUTH) if name not in files]:
                raise UserError(f"ground truth {path}: lacks {lacking[0]}; give the development kit as distributed")
            meta, truth = (cast(IO[bytes], tar.extractfile(files[name])).read() for name in (META, TRUTH))
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"ground truth {path}: is damaged ({error}); copy it again") from None
    return _wnids(path, truth.decode("ascii", "replace").split(), meta)


def _wnids(path: Path, words: list[str], meta: bytes) -> Wnids:
    """The development kit's numbers as WordNet ids, by its `meta.mat`."""
    from scipy.io import loadmat

    try:  # loadmat reads MATLAB's own format; it has many ways to say that a file is none
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        ids = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
        wnid_of = {str(int(number)): str(wnid) for number, wnid in ids}
    except Exception as error:
        raise UserError(f"ground truth {path}: its {META} is not the development kit's ({error})") from None
    for line, word in enumerate(words, start=1):
        if word not in wnid_of:
            raise UserError(
                f"ground truth {path}, line {line}: {word!r} is not a class number of the development kit, which "
                f"counts from 1; {WAYS}"
            )
    return {line: wnid_of[word] for line, word in enumerate(words, start=1)}


# A folder of image files.


def scan_folder(
    folder: str | Path,
    val_fraction: float = 0.1,
    seed: int = 0,
    ground_truth: str | Path | None = None,
    scans: tuple[str, ...] = (),
) -> Source:
    """Images of FOLDER/CLASS/..., split by class with a fixed seed, or of FOLDER/train/CLASS and FOLDER/val/CLASS.

    FOLDER/val may also hold ImageNet's validation images without class folders, with their ``ground_truth``. Kaggle's
    folder (`ILSVRC/Data/CLS-LOC` below it) is taken, too. The order of files on the disk does not matter. ``scans`` are
    suffixes of images beside the usual ones.
    Raises UserError when there is nothing to read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"image folder {folder}: does not exist or is not a folder; give one with a subfolder a class")
    kaggle = folder / "ILSVRC" / "Data" / "CLS-LOC"
    if kaggle.is_dir():
        return _scan_given_splits(kaggle, ground_truth, [folder, kaggle], scans)
    scan = FolderScan(scans)
    names = {path.name for path in scan.classes(folder)}
    if {"train", "val"} <= names <= {"train", "val", "test"}:  # test has no labels where there is a val; it is left out
        return _scan_given_splits(folder, ground_truth, [folder], scans)
    # classes called `train` beside others would be splits taken for classes
    if (names and names <= {"train", "val", "valid", "validation", "test"}) or {"train", "val"} <= names:
        raise UserError(
            f"image folder {folder}: holds {', '.join(sorted(names))}, which look like splits; name the two to be read "
            "train and val, and move others away"
        )
    if ground_truth is not None:
        raise UserError(f"``ground_truth``: is for ImageNet's validation images, and {folder} holds none in val/")
    files = scan.images_by_class(folder)
    source = split_by_class(list(files.values()), tuple(files), val_fraction, seed, f"image folder {folder}")
    return replace(source, notes=scan.notes)


def _scan_given_splits(
    folder: Path, ground_truth: str | Path | None, beside: list[Path], scans: tuple[str, ...] = ()
) -> Source:
    scan = FolderScan(scans)
    of_train = scan.images_by_class(folder / "train")
    names, train = tuple(of_train), labeled(list(of_train.values()))
    if not scan.classes(folder / "val") and (flat := scan.images(folder / "val")):
        truth = find_ground_truth([*beside, folder / "val"], ground_truth)
        labels = truth.labels([Path(path).name for path in flat], names, folder / "val")
        rows = sorted(zip(labels, flat, strict=True))
        return Source(names, train, FileExamples([path for _, path in rows], [label for label, _ in rows]), scan.notes)
    if ground_truth is not None:
        raise UserError(f"``ground_truth``: is not needed, {folder / 'val'} has a subfolder for each class")
    of_val = scan.images_by_class(folder / "val")
    if unknown := sorted(set(of_val) - set(of_train)):
        raise UserError(f"class {unknown[0]!r}: is in {folder / 'val'} but not in {folder / 'train'}")
    return Source(names, train, labeled([of_val.get(name, []) for name in names]), scan.notes)


# The archives; nothing is unpacked.

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"


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
        load = partial(_read_range, self.tar, self.starts[index], self.sizes[index])
        return Example(f"{self.names[index]} in {self.tar}", self.labels[index], load)


def _read_range(path: str, start: int, size: int) -> bytes:
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


def archives_of(path: Path) -> Path | None:
    """The folder that holds the training archive, where `path` is that folder or the archive itself."""
    if path.name == TRAIN and path.is_file():
        return path.parent
    return path if (path / TRAIN).is_file() else None


def read_imagenet(folder: Path, ground_truth: str | Path | None = None) -> Source:
    """Both archives of a folder; ``ground_truth`` says where the validation labels stand, if not beside them.

    Raises:
        UserError: an archive or the ground truth is missing or damaged, or they do not belong together.
    """
    path = folder / VAL
    if not path.is_file():
        raise UserError(f"ImageNet {folder}: {VAL} is not there; put it (or a link to it) beside {TRAIN}")
    truth = find_ground_truth([folder], ground_truth)  # before the archive of 138 GB is walked through
    names, train = _train(folder / TRAIN)
    rows = sorted(row._replace(name=Path(row.name).name) for row in _whole(path) if is_image(row.name))
    if not rows:
        raise UserError(f"archive {path}: holds no images; copy it again")
    labels = truth.labels([row.name for row in rows], names, path)
    of_classes = sorted(zip(labels, rows, strict=True))  # the order of class folders, so that bytes agree with theirs
    val = TarExamples(path, [row for _, row in of_classes], [label for label, _ in of_classes])
    return Source(names, train, val)


def _train(path: Path) -> tuple[tuple[str, ...], TarExamples]:
    """Class names, and all images class by class in the order of their names."""
    found: dict[str, list[Member]] = {}
    with _open(path) as inside:
        for archive in _whole(path):
            wnid = Path(archive.name).stem
            if WNID.fullmatch(wnid) and archive.name.endswith(".tar"):
                inner = _members(path, inside, (archive.start, archive.start + archive.size))
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


def _whole(path: Path) -> Iterator[Member]:
    """Files of an archive of its own."""
    with _open(path) as file:
        yield from _members(path, file)


def _members(path: Path, file: IO[bytes], inside: tuple[int, int] | None = None) -> Iterator[Member]:
    """Files of an open archive, or of one that lies `inside` of it. Raises UserError."""
    try:
        for member in TarReader(file, inside):
            if member.isfile():
                yield Member(member.name, member.offset_data, member.size)
    except (TarDamage, OSError) as error:
        raise UserError(f"archive {path}: {error}; compare its checksum, copy it again") from None
