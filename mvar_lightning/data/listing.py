"""Images named by a list: a CSV, TSV or text file with a path, a class and perhaps a split in each line."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mvar_lightning.data.sources import FileExamples, Source, split_by_class
from mvar_lightning.errors import UserError

SUFFIXES = (".csv", ".tsv", ".txt", ".lst")
"""A file with one of these is a list; commas in .csv, tabs in the others."""

TRAIN, VAL = ("train", "training"), ("val", "valid", "validation", "test")


class Line(NamedTuple):
    number: int
    path: str
    name: str
    split: str
    """train, val, or nothing where the list has no third column."""


def read_list(path: str | Path, val_fraction: float = 0.1, seed: int = 0) -> Source:
    """Lines of `path, class` or `path, class, split`; paths are relative to the list.

    Classes are names or whole numbers; labels number them in order (numbers by value). A first line `path,label` is a
    heading. Without splits, each class is split with the seed.

    Raises:
        UserError: a list that cannot be read or is empty, a line of another form (by number), a path that is not there.
    """
    path = Path(path)
    lines = list(_lines(path))
    if not lines:
        raise UserError(f"list {path}: has no images; give lines of path and class")
    names = _class_names({line.name for line in lines})
    given = {line.split for line in lines}
    if given == {""}:
        return _split(path, lines, names, val_fraction, seed)
    if "" in given:
        first = next(line for line in lines if not line.split)
        raise UserError(f"list {path}, line {first.number}: has no split, other lines have; give all or none")
    label_of = {name: label for label, name in enumerate(names)}
    parts = {}
    for split in ("train", "val"):
        chosen = [line for line in lines if line.split == split]
        if not chosen:
            raise UserError(f"list {path}: no line is of split {split}; leave the splits out or give both")
        parts[split] = FileExamples([line.path for line in chosen], [label_of[line.name] for line in chosen])
    return Source(names, parts["train"], parts["val"])


def _split(path: Path, lines: list[Line], names: tuple[str, ...], val_fraction: float, seed: int) -> Source:
    if not 0 < val_fraction < 1:
        raise UserError(f"validation fraction {val_fraction}: must lie between 0 and 1, for instance 0.1")
    of_class: dict[str, list[str]] = {name: [] for name in names}
    for line in lines:
        of_class[line.name].append(line.path)
    train, val = split_by_class([sorted(paths) for paths in of_class.values()], names, val_fraction, seed)
    if not val:
        raise UserError(f"list {path}: each class has one image, so none is left for validation; add images")
    return Source(names, train, val)


def _lines(path: Path) -> Iterator[Line]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.reader(file, delimiter="," if path.suffix.lower() == ".csv" else "\t")
            for number, row in enumerate(rows, start=1):
                if row and not (number == 1 and row[0].strip().lower() in ("path", "file", "filename", "image")):
                    yield _line(path, number, [cell.strip() for cell in row])
    except OSError as error:
        raise UserError(f"list {path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"list {path}: is no text in UTF-8 ({error})") from None


def _line(path: Path, number: int, cells: list[str]) -> Line:
    where = f"list {path}, line {number}"
    if len(cells) not in (2, 3) or not all(cells):
        comma = "comma" if path.suffix.lower() == ".csv" else "tab"
        raise UserError(f"{where}: {len(cells)} cells; give path and class, perhaps a split, with a {comma} between")
    split = cells[2].lower() if len(cells) == 3 else ""
    if split and split not in (*TRAIN, *VAL):
        raise UserError(f"{where}: split {cells[2]!r} is not known; give train or val")
    file = path.parent / cells[0]
    if not file.is_file():
        raise UserError(f"{where}: image {file} does not exist")
    return Line(number, str(file), cells[1], "" if not split else "train" if split in TRAIN else "val")


def _class_names(names: set[str]) -> tuple[str, ...]:
    if all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))
