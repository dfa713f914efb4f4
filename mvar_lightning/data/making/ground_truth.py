"""What ImageNet's validation images show: the files that say so all number or name the images, each in its own way.

Labels follow the sorted WordNet ids, so everything becomes WordNet ids first. Bare numbers are never guessed at: the
development kit counts classes from 1 in an order of its own, Caffe's `val.txt` from 0 in sorted order.
"""

from __future__ import annotations

import csv
import io
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from mvar_lightning.errors import UserError

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
KAGGLE = "LOC_val_solution.csv"

FOUND = (DEVKIT, "ILSVRC2012_devkit_t12", KAGGLE, TRUTH)
"""Found by themselves beside the images, in this order."""

WAYS = f"give --ground-truth with {DEVKIT}, Kaggle's {KAGGLE}, or a text file with one WordNet id a line"

WNID = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"_(\d{8})\.")


@dataclass(frozen=True)
class GroundTruth:
    """WordNet ids by the image's number (from 1), or by its file name without the suffix."""

    path: Path
    wnids: Mapping[int | str, str]

    def wnid(self, name: str) -> str:
        """What `ILSVRC2012_val_00000001.JPEG` shows. Raises UserError where there is no line for it."""
        number = _NUMBER.search(name)
        wnid = self.wnids.get(Path(name).stem) or (self.wnids.get(int(number[1])) if number else None)
        if wnid is None:
            raise UserError(f"ground truth {self.path}: has no line for {name}; {WAYS}")
        return wnid

    def labels(self, images: list[str], class_names: tuple[str, ...], where: str | Path) -> list[int]:
        """A label for each image. Raises UserError where images, ground truth and classes do not belong together."""
        label_of = {name: label for label, name in enumerate(class_names)}
        labels = []
        for name in images:
            wnid = self.wnid(name)
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
    else:
        path = Path(given)
        if not path.exists():
            raise UserError(f"ground truth {path}: does not exist; {WAYS}")
    return GroundTruth(path, _read(path))


def _read(path: Path) -> dict[int | str, str]:
    if path.is_dir():
        return _from_devkit_folder(path)
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


def _from_kaggle(path: Path, text: str) -> dict[int | str, str]:
    """Lines `ILSVRC2012_val_00048981,n03995372 85 1 499 272 ...` (the id of the first box)."""
    found: dict[int | str, str] = {}
    for number, row in enumerate(csv.reader(text.splitlines()), start=1):
        if number == 1 and row[:1] == ["ImageId"]:
            continue
        if len(row) != 2 or not WNID.fullmatch(row[1].split(" ")[0]):
            raise UserError(f"ground truth {path}, line {number}: is not an image and its WordNet ids; {WAYS}")
        found[Path(row[0]).stem] = row[1].split(" ")[0]
    return found


def _from_lines(path: Path, rows: list[list[str]]) -> dict[int | str, str]:
    """One WordNet id a line, or an image and its WordNet id."""
    if not rows:
        raise UserError(f"ground truth {path}: is empty; {WAYS}")
    if all(row[-1].isdecimal() for row in rows):
        meta = path.parent / META
        if meta.is_file() and all(len(row) == 1 for row in rows):
            return _wnids(path, [row[0] for row in rows], meta.read_bytes())
        raise UserError(
            f"ground truth {path}: has numbers, and lists number the classes differently (the development kit in an "
            f"order of its own); give --ground-truth {DEVKIT}, which says what they mean, or put its {META} beside"
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


def _from_devkit_folder(folder: Path) -> dict[int | str, str]:
    for data in (folder, folder / "data"):
        if (data / TRUTH).is_file() and (data / META).is_file():
            words = (data / TRUTH).read_text(encoding="utf-8").split()
            return _wnids(folder, words, (data / META).read_bytes())
    raise UserError(f"ground truth {folder}: lacks data/{TRUTH} or data/{META}; give the development kit as it was")


def _from_devkit(path: Path) -> dict[int | str, str]:
    try:
        with tarfile.open(path) as tar:
            files = {Path(member.name).name: member for member in tar if member.isfile()}
            if lacking := [name for name in (META, TRUTH) if name not in files]:
                raise UserError(f"ground truth {path}: lacks {lacking[0]}; give the development kit as distributed")
            meta, truth = (cast(IO[bytes], tar.extractfile(files[name])).read() for name in (META, TRUTH))
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"ground truth {path}: is damaged ({error}); copy it again") from None
    return _wnids(path, truth.decode("ascii", "replace").split(), meta)


def _wnids(path: Path, words: list[str], meta: bytes) -> dict[int | str, str]:
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
