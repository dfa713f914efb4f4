"""Where images come from before they are shards: a folder with one subfolder for each class, or a list.

`imagenet` reads archives as distributed, `ground_truth` the labels of ImageNet's validation images, `embedded` has what
needs no download.
"""

from __future__ import annotations

import csv
import os
import random
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar, overload

from mvar_lightning.data.images import SUFFIXES, is_image
from mvar_lightning.data.making.ground_truth import find_ground_truth
from mvar_lightning.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """One image still outside a shard: `load` returns the encoded bytes, `name` is what errors call it."""

    name: str
    label: int
    load: Callable[[], bytes]


@dataclass(frozen=True)
class Source:
    """Everything that a shard folder is made from. Splits may make examples on demand."""

    class_names: tuple[str, ...]
    train: Sequence[Example]
    val: Sequence[Example]

    def split(self, name: str) -> Sequence[Example]:
        return self.train if name == "train" else self.val


class LazyExamples(Sequence[Example]):
    """Examples made on demand, of little that is kept: ImageNet has 1.3 million."""

    def __init__(self, labels: Sequence[int]) -> None:
        self.labels = array("l", labels)

    @abstractmethod
    def example(self, index: int) -> Example: ...

    def __len__(self) -> int:
        return len(self.labels)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self.example(each) for each in range(len(self))[index]]
        return self.example(index)


class FileExamples(LazyExamples):
    """Image files: a path and a number each are all that is kept."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int]) -> None:
        assert len(paths) == len(labels)
        super().__init__(labels)
        self.paths = paths

    def example(self, index: int) -> Example:
        path = self.paths[index]
        return Example(path, self.labels[index], partial(read_bytes, path))


def scan_folder(
    folder: str | Path, val_fraction: float = 0.1, seed: int = 0, ground_truth: str | Path | None = None
) -> Source:
    """Images of FOLDER/CLASS/..., split by class with a fixed seed, or of FOLDER/train/CLASS and FOLDER/val/CLASS.

    FOLDER/val may also hold ImageNet's validation images without class folders, with their ``ground_truth``. Kaggle's
    folder (`ILSVRC/Data/CLS-LOC` below it) is taken, too. The order of files on the disk does not matter.
    Raises UserError when there is nothing to read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"image folder {folder}: does not exist or is not a folder; give one with a subfolder a class")
    kaggle = folder / "ILSVRC" / "Data" / "CLS-LOC"
    if kaggle.is_dir():
        return _scan_given_splits(kaggle, ground_truth, [folder, kaggle])
    if _has_splits(folder):
        return _scan_given_splits(folder, ground_truth, [folder])
    if ground_truth is not None:
        raise UserError(f"--ground-truth: is for ImageNet's validation images, and {folder} holds none in val/")
    files = _files_by_class(folder)
    return split_by_class(list(files.values()), tuple(files), val_fraction, seed, f"image folder {folder}")


def _has_splits(folder: Path) -> bool:
    """Whether the subfolders are splits. Classes called `train` beside others would be splits taken for classes."""
    names = {path.name for path in _subfolders(folder)}
    if {"train", "val"} <= names <= {"train", "val", "test"}:  # test has no labels where there is a val; it is left out
        return True
    if (names and names <= {"train", "val", "valid", "validation", "test"}) or {"train", "val"} <= names:
        raise UserError(
            f"image folder {folder}: holds {', '.join(sorted(names))}, which look like splits; name the two to be read "
            "train and val, and move others away"
        )
    return False


def split_by_class(
    paths: Sequence[Sequence[str]], names: tuple[str, ...], val_fraction: float, seed: int, where: str
) -> Source:
    """The paths of each class in turn as training and validation images; a class's split depends on its name and the
    seed. Raises UserError where nothing would be left on one side."""
    if not 0 < val_fraction < 1:
        raise UserError(f"validation fraction {val_fraction}: must lie between 0 and 1, for instance 0.1")
    parts = [split_class(of_class, val_fraction, f"{seed}/{name}") for name, of_class in zip(names, paths, strict=True)]
    if not any(held for _, held in parts):
        raise UserError(f"{where}: each class has one image, so none is left for validation; add images")
    return Source(names, _labeled([kept for kept, _ in parts]), _labeled([held for _, held in parts]))


def _labeled(paths_of_classes: Sequence[Sequence[str]]) -> FileExamples:
    """Examples of the paths of class 0, class 1, ..."""
    paths = [path for paths in paths_of_classes for path in paths]
    return FileExamples(paths, [label for label, paths in enumerate(paths_of_classes) for _ in paths])


def split_class(items: Sequence[T], val_fraction: float, seed: str) -> tuple[list[T], list[T]]:
    """(train, validation) of one class: a seeded draw, at least one for validation where there are two."""
    held = min(max(1, round(val_fraction * len(items))), len(items) - 1)
    chosen = set(random.Random(seed).sample(range(len(items)), held))
    train = [item for number, item in enumerate(items) if number not in chosen]
    return train, [item for number, item in enumerate(items) if number in chosen]


def _scan_given_splits(folder: Path, ground_truth: str | Path | None, beside: list[Path]) -> Source:
    train = _files_by_class(folder / "train")
    names = tuple(train)
    if not _subfolders(folder / "val") and (flat := _images(folder / "val")):
        truth = find_ground_truth([*beside, folder / "val"], ground_truth)
        labels = truth.labels([Path(path).name for path in flat], names, folder / "val")
        rows = sorted(zip(labels, flat, strict=True))
        val = FileExamples([path for _, path in rows], [label for label, _ in rows])
        return Source(names, _labeled(list(train.values())), val)
    if ground_truth is not None:
        raise UserError(f"--ground-truth: is not needed, {folder / 'val'} has a subfolder for each class")
    of_class = _files_by_class(folder / "val")
    unknown = sorted(set(of_class) - set(train))
    if unknown:
        raise UserError(f"class {unknown[0]!r}: is in {folder / 'val'} but not in {folder / 'train'}")
    return Source(names, _labeled(list(train.values())), _labeled([of_class.get(name, []) for name in names]))


def _files_by_class(folder: Path) -> dict[str, list[str]]:
    classes = _subfolders(folder)
    if not classes:
        hint = "it holds files only" if any(folder.iterdir()) else "it is empty"
        raise UserError(f"image folder {folder}: no class folders ({hint}); put images into {folder}/CLASS/")
    for path in classes:
        if os.fsencode(path.name).decode("utf-8", "ignore") != path.name:
            raise UserError(f"class folder {str(path)!r}: its name is no text that can be written; rename it")
    files = {path.name: _images(path) for path in classes}
    empty = [name for name, paths in files.items() if not paths]
    if len(empty) == len(files):
        raise UserError(f"image folder {folder}: no images in its class folders (looked for {', '.join(SUFFIXES)})")
    if empty:
        raise UserError(f"class folder {folder / empty[0]}: no images in it; add some or remove the folder")
    return files


def _subfolders(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."), key=lambda p: p.name)


def _images(folder: Path) -> list[str]:
    """All images below a folder, in an order that depends on their names alone."""
    found = [
        os.path.join(root, name)  # noqa: PTH118 (a million Path objects are a gigabyte)
        for root, _, names in os.walk(folder)
        for name in names
        if name[0] != "." and is_image(name)
    ]
    return sorted(found, key=lambda path: path.replace(os.sep, "/"))


def read_bytes(path: str | Path) -> bytes:
    """Content of a file. Raises UserError where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"image {path}: cannot be read ({error.strerror})") from None


# Images named by a list: a CSV, TSV or text file with a path, a class and perhaps a split in each line.


LIST_SUFFIXES = (".csv", ".tsv", ".txt", ".lst")
"""A file with one of these is a list; commas in .csv, tabs in the others."""

HEADINGS = ("path", "file", "filename", "image")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}


class Line(NamedTuple):
    number: int
    path: str
    name: str
    split: str
    """train, val, or nothing where the list has no third column."""


def read_list(path: str | Path, val_fraction: float = 0.1, seed: int = 0) -> Source:
    """Lines of `path, class` or `path, class, split`; paths are relative to the list.

    Classes are names, which labels number in order, or the labels themselves: whole numbers from 0 on without gaps. A
    first line `path,label` is a heading. Without splits, each class is split with the seed.

    Raises:
        UserError: a list that cannot be read or is empty, a line of another form (by number), a path that is not there.
    """
    path = Path(path)
    # a path and a number a line, by split: ImageNet's list has 1.3 million lines
    paths: dict[str, list[str]] = {}
    classes: dict[str, array[int]] = {}
    number_of: dict[str, int] = {}
    first_line: dict[str, int] = {}
    for line in _lines(path):
        first_line.setdefault(line.split, line.number)
        paths.setdefault(line.split, []).append(line.path)
        classes.setdefault(line.split, array("l")).append(number_of.setdefault(line.name, len(number_of)))
    if not paths:
        raise UserError(f"list {path}: has no images; give lines of path and class")
    names = _class_names(path, list(number_of))
    label_of = {number_of[name]: label for label, name in enumerate(names)}
    examples = {
        split: FileExamples(files, [label_of[number] for number in classes[split]]) for split, files in paths.items()
    }
    if set(examples) == {""}:
        of_class: list[list[str]] = [[] for _ in names]
        for file, label in zip(examples[""].paths, examples[""].labels, strict=True):
            of_class[label].append(file)
        return split_by_class([sorted(files) for files in of_class], names, val_fraction, seed, f"list {path}")
    if "" in examples:
        raise UserError(f"list {path}, line {first_line['']}: has no split, other lines have; give all or none")
    for split in ("train", "val"):
        if split not in examples:
            raise UserError(f"list {path}: no line is of split {split}; leave the splits out or give both")
    if missing := sorted(set(examples["val"].labels) - set(examples["train"].labels)):
        raise UserError(f"list {path}: class {names[missing[0]]!r} has validation images but none for training")
    return Source(names, examples["train"], examples["val"])


def _lines(path: Path) -> Iterator[Line]:
    number = 0
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file, delimiter="," if path.suffix.lower() == ".csv" else "\t")
            for row in rows:
                number = rows.line_num
                cells = [cell.strip() for cell in row]
                if any(cells) and not (number == 1 and cells[0].lower() in HEADINGS):
                    yield _line(path, number, cells)
    except OSError as error:
        raise UserError(f"list {path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"list {path}, after line {number}: is no text in UTF-8 ({error})") from None


def _line(path: Path, number: int, cells: list[str]) -> Line:
    where = f"list {path}, line {number}"
    if len(cells) not in (2, 3) or not all(cells):
        comma = "comma" if path.suffix.lower() == ".csv" else "tab"
        raise UserError(f"{where}: {len(cells)} cells; give path and class, perhaps a split, with a {comma} between")
    split = cells[2].lower() if len(cells) == 3 else ""
    if split and split not in SPLITS:
        raise UserError(f"{where}: split {cells[2]!r} is not known; give train or val, leave out other lines")
    file = os.path.join(path.parent, cells[0])  # noqa: PTH118 (a million Path objects take a gigabyte and a minute)
    if not os.path.isfile(file):  # noqa: PTH113
        raise UserError(f"{where}: image {file} does not exist")
    return Line(number, file, cells[1], SPLITS[split] if split else "")


def _class_names(path: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Names in order, or numbers 0 to N - 1: with a gap, numbers would not be the labels that they look like."""
    if not all(name.isdecimal() for name in names):
        return tuple(sorted(names))
    numbers = sorted(names, key=int)
    for label, name in enumerate(numbers):
        if int(name) != label:
            raise UserError(
                f"list {path}: classes are numbers, and number {label} has no image (next is {name}); number them "
                "from 0 without gaps, or give names"
            )
    return tuple(numbers)
