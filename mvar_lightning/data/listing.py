"""Images named by a list: a CSV, TSV or text file with a path, a class and perhaps a split in each line."""

from __future__ import annotations

import csv
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mvar_lightning.data.sources import FileExamples, Source, check_fraction, split_by_class
from mvar_lightning.errors import UserError

SUFFIXES = (".csv", ".tsv", ".txt", ".lst")
"""A file with one of these is a list; commas in .csv, tabs in the others."""

HEADINGS = ("path", "file", "filename", "image")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}


class Line(NamedTuple):
    number: int
    path: str
    name: str
    split: str
    """train, val, or nothing where the list has no third column."""


class Columns:
    """Lines as columns: a path, and a number for class and split each. ImageNet's list has 1.3 million lines."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self.paths: list[str] = []
        self.class_of: dict[str, int] = {}
        self.first_line: dict[str, int] = {}
        """Of each split."""
        self.classes, self.splits = array("l"), bytearray()
        for line in lines:
            self.paths.append(line.path)
            self.classes.append(self.class_of.setdefault(line.name, len(self.class_of)))
            self.splits.append(("", "train", "val").index(line.split))
            self.first_line.setdefault(line.split, line.number)

    def of_split(self, number: int) -> Iterator[tuple[str, int]]:
        rows = zip(self.paths, self.classes, self.splits, strict=True)
        return ((path, place) for path, place, split in rows if split == number)


def read_list(path: str | Path, val_fraction: float = 0.1, seed: int = 0) -> Source:
    """Lines of `path, class` or `path, class, split`; paths are relative to the list.

    Classes are names, which labels number in order, or the labels themselves: whole numbers from 0 on without gaps. A
    first line `path,label` is a heading. Without splits, each class is split with the seed.

    Raises:
        UserError: a list that cannot be read or is empty, a line of another form (by number), a path that is not there.
    """
    path = Path(path)
    columns = Columns(_lines(path))
    if not columns.paths:
        raise UserError(f"list {path}: has no images; give lines of path and class")
    names = _class_names(path, list(columns.class_of))
    label_of = {columns.class_of[name]: label for label, name in enumerate(names)}
    first = columns.first_line
    if set(first) == {""}:
        return _split(path, columns, label_of, names, val_fraction, seed)
    if "" in first:
        raise UserError(f"list {path}, line {first['']}: has no split, other lines have; give all or none")
    parts = {}
    for number, split in enumerate(("train", "val"), start=1):
        if split not in first:
            raise UserError(f"list {path}: no line is of split {split}; leave the splits out or give both")
        rows = list(columns.of_split(number))
        parts[split] = FileExamples([row[0] for row in rows], [label_of[row[1]] for row in rows])
    if missing := sorted(set(parts["val"].labels) - set(parts["train"].labels)):
        raise UserError(f"list {path}: class {names[missing[0]]!r} has validation images but none for training")
    return Source(names, parts["train"], parts["val"])


def _split(
    path: Path, columns: Columns, label_of: dict[int, int], names: tuple[str, ...], val_fraction: float, seed: int
) -> Source:
    check_fraction(val_fraction)
    of_class: list[list[str]] = [[] for _ in names]
    for file, place in columns.of_split(0):
        of_class[label_of[place]].append(file)
    train, val = split_by_class([sorted(paths) for paths in of_class], names, val_fraction, seed)
    if not val:
        raise UserError(f"list {path}: each class has one image, so none is left for validation; add images")
    return Source(names, train, val)


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
