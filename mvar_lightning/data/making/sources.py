"""Where images come from before they are shards: what a source is, and the source that a list names.

`imagenet` reads folders with a subfolder for each class and archives as distributed, `embedded` has what needs no
download.
"""

from __future__ import annotations

import csv
import errno
import os
import random
import stat
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, overload

from mvar_lightning.errors import UserError


@dataclass(frozen=True)
class Example:
    """One image still outside a shard: `load` returns the encoded bytes, `name` is what errors call it.

    ``suffix`` is given by who encodes it; else the bytes tell it, and whether they are a picture at all.
    """

    name: str
    label: int
    load: Callable[[], bytes]
    suffix: str | None = None


@dataclass(frozen=True)
class Source:
    """Everything that a shard folder is made from. Splits may make examples on demand."""

    class_names: tuple[str, ...]
    train: Sequence[Example]
    val: Sequence[Example]
    notes: tuple[str, ...] = ()
    """What to tell the user: what was left out, and how classes are numbered."""

    def __post_init__(self) -> None:
        if broken := [name for name in self.class_names if "".join(name.splitlines()) != name]:
            raise UserError(f"class {broken[0]!r}: its name has a line break; rename it")

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
        return Example(self.paths[index], self.labels[index], partial(_read_bytes, self.paths[index]))


def split_by_class(
    paths: Sequence[Sequence[str]], names: tuple[str, ...], val_fraction: float, seed: int, where: str
) -> Source:
    """The paths of each class in turn as training and validation images; a class's split depends on its name and the
    seed. Raises UserError where nothing would be left on one side."""
    if not 0 < val_fraction < 1:
        raise UserError(f"validation fraction {val_fraction}: must lie between 0 and 1, for instance 0.1")
    train, val = [], []
    for name, of_class in zip(names, paths, strict=True):
        # at least one for validation where there are two
        held = min(max(1, round(val_fraction * len(of_class))), len(of_class) - 1)
        chosen = set(random.Random(f"{seed}/{name}").sample(range(len(of_class)), held))
        train.append([path for number, path in enumerate(of_class) if number not in chosen])
        val.append([path for number, path in enumerate(of_class) if number in chosen])
    if not any(val):
        raise UserError(f"{where}: each class has one image, so none is left for validation; add images")
    return Source(names, labeled(train), labeled(val))


def labeled(paths_of_classes: Sequence[Sequence[str]]) -> FileExamples:
    """Examples of the paths of class 0, class 1, ..."""
    paths = [path for paths in paths_of_classes for path in paths]
    return FileExamples(paths, [label for label, paths in enumerate(paths_of_classes) for _ in paths])


def _read_bytes(path: str) -> bytes:
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # a pipe would be waited for
            raise OSError(errno.EINVAL, "not a plain file")
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
    once = _Once(path)
    for line in filter(once.is_new, _lines(path)):
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
        source = split_by_class([sorted(files) for files in of_class], names, val_fraction, seed, f"list {path}")
        return replace(source, notes=once.notes)
    if "" in examples:
        raise UserError(f"list {path}, line {first_line['']}: has no split, other lines have; give all or none")
    for split in ("train", "val"):
        if split not in examples:
            raise UserError(f"list {path}: no line is of split {split}; leave the splits out or give both")
    if missing := sorted(set(examples["val"].labels) - set(examples["train"].labels)):
        raise UserError(f"list {path}: class {names[missing[0]]!r} has validation images but none for training")
    return Source(names, examples["train"], examples["val"], once.notes)


class _Once:
    """Tells the lines of images that a list has named before, which are left out: one could end in both splits."""

    def __init__(self, path: Path) -> None:
        self.path, self.again = path, 0
        self.named: dict[str, tuple[str, str]] = {}  # class and split of each image
        self.kinds: dict[tuple[str, str], tuple[str, str]] = {}

    def is_new(self, line: Line) -> bool:
        """Raises UserError where the image was named with another class or split."""
        kind = (line.name, line.split)
        kind = self.kinds.setdefault(kind, kind)  # one object for all lines: a list may have a million
        clean = os.path.normpath(line.path)
        path = line.path if clean == line.path else clean
        before = self.named.get(path)
        if before is None:
            self.named[path] = kind
            return True
        if before is not kind:
            was, now = (" ".join(part for part in each if part) for each in (before, kind))
            raise UserError(
                f"list {self.path}, line {line.number}: image {line.path} is {now}, a line above says {was}; leave one"
            )
        self.again += 1
        return False

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"list {self.path}: {self.again} lines name an image again, which is taken once",) if self.again else ()


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
    for name, following in pairwise(numbers):
        if int(name) == int(following):
            raise UserError(f"list {path}: classes {name} and {following} are one number; write it in one way")
    for label, name in enumerate(numbers):
        if int(name) != label:
            raise UserError(
                f"list {path}: classes are numbers, and number {label} has no image (next is {name}); number them "
                "from 0 without gaps, or give names"
            )
    return tuple(numbers)
