"""Real data that ships inside a dependency, so that everything runs without a download; and any source by its name.

It is written as shards by the same writer and read by the same stream as any other data set.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mvar_lightning.data.making.arrays import ARRAY_SUFFIXES, fashion, find_idx, read_arrays, read_idx
from mvar_lightning.data.making.emoji import emoji
from mvar_lightning.data.making.imagenet import TRAIN, archives_of, read_imagenet, scan_folder
from mvar_lightning.data.making.sources import LIST_SUFFIXES, Example, Source, read_list
from mvar_lightning.errors import UserError

# Ten color photographs that ship inside scikit-learn and scikit-image, cut into crops. These are all there are, but for
# the right eye's view of the motorcycle, which shows what is held out of the left one's. The third quarter of every
# photograph, a band of its full height, is held out for validation; training crops come from the rest and never touch
# it. Which crops are cut is a function of the photograph's name and the crop's number alone.

CROP_SIDE = 96
"""Side of a stored crop in pixels."""

TRAIN_CROPS, VAL_CROPS = 300, 100
"""Crops of each photograph."""

LARGEST_WINDOW = 192
"""Windows are this wide at most, or a third of the photograph where that is more."""

JPEG_QUALITY = 88


class Photo(NamedTuple):
    package: str
    file: str

    def path(self) -> Path:
        """Raises UserError where the package or the file is missing."""
        spec = find_spec(self.package)  # found, not imported: scikit-image alone takes a second
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            if (path := Path(folder) / self.file).is_file():
                return path
        name = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[self.package]
        raise UserError(
            f"data set photos: {self.file} of {name} is not there; run pip install --force-reinstall {name}"
        )


PHOTOS: dict[str, Photo] = {
    "astronaut": Photo("skimage", "data/astronaut.png"),
    "cat": Photo("skimage", "data/chelsea.png"),
    "coffee": Photo("skimage", "data/coffee.png"),
    "flower": Photo("sklearn", "datasets/images/flower.jpg"),
    "galaxies": Photo("skimage", "data/hubble_deep_field.jpg"),
    "motorcycle": Photo("skimage", "data/motorcycle_left.png"),
    "pagoda": Photo("sklearn", "datasets/images/china.jpg"),
    "retina": Photo("skimage", "data/retina.jpg"),
    "rocket": Photo("skimage", "data/rocket.jpg"),
    "tissue": Photo("skimage", "data/ihc.png"),
}
"""Class name to photograph, in the order of the labels."""


Window = tuple[int, int, int]
"""Left, top and side of a square of a photograph, in pixels."""


def photos() -> Source:
    """Crops of 96 x 96 pixels as JPEG, 10 classes of one photograph each: 3,000 for training, 1,000 for validation."""
    train, val = [], []
    for label, (name, photo) in enumerate(PHOTOS.items()):
        path = photo.path()
        with Image.open(path) as image:
            width, height = image.size
        for number in range(TRAIN_CROPS):
            window = train_window(width, height, random.Random(f"{name}/train/{number}"))
            train.append(Example(f"{name}, training crop {number}", label, partial(_crop, path, window)))
        for number in range(VAL_CROPS):
            window = val_window(width, height, random.Random(f"{name}/val/{number}"))
            val.append(Example(f"{name}, validation crop {number}", label, partial(_crop, path, window)))
    return Source(tuple(PHOTOS), tuple(train), tuple(val))


def train_window(width: int, height: int, rng: random.Random) -> Window:
    """A window in the left half or in the right quarter, either as often as it is wide."""
    left_end, right_first = held_out(width)
    if rng.random() < left_end / (left_end + width - right_first):
        return _window((0, left_end), width, height, rng)
    return _window((right_first, width), width, height, rng)


def val_window(width: int, height: int, rng: random.Random) -> Window:
    """A window inside the held-out band."""
    return _window(held_out(width), width, height, rng)


def held_out(width: int) -> tuple[int, int]:
    """First column of the validation band, and the first one after it."""
    return width // 2, width * 3 // 4


def _window(columns: tuple[int, int], width: int, height: int, rng: random.Random) -> Window:
    """Any square between two columns, of CROP_SIDE to LARGEST_WINDOW pixels or a third of the photograph."""
    first, end = columns
    largest = max(LARGEST_WINDOW, min(width, height) // 3)
    side = rng.randint(CROP_SIDE, min(largest, end - first, height))
    return rng.randint(first, end - side), rng.randint(0, height - side), side


def _crop(path: Path, window: Window) -> bytes:
    """Bytes of a JPEG: the window, reduced to CROP_SIDE with Lanczos."""
    left, top, side = window
    # cut first: a resize of a box would read a little of what lies around it, across the border of the held-out band
    cut = _photo(path).crop((left, top, left + side, top + side))
    buffer = io.BytesIO()
    cut.resize((CROP_SIDE, CROP_SIDE), Image.Resampling.LANCZOS).save(
        buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0
    )
    return buffer.getvalue()


@lru_cache(maxsize=len(PHOTOS))  # crops are written in a shuffled order; all together take 16 MB
def _photo(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


DIGITS_SIDE = 16
DIGITS_VAL_SAMPLES = 360


def digits() -> Source:
    """The 1,797 handwritten digits of scikit-learn (8x8 scans, 16 grays, 10 classes), enlarged to 16x16 PNG.

    1,437 train and 360 validation samples, each class in proportion, always the same ones.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans = load_digits()
    examples = [
        Example(f"digit {number}", int(label), partial(_png, scans.images[number]))
        for number, label in enumerate(scans.target)
    ]
    train, val = train_test_split(
        examples, test_size=DIGITS_VAL_SAMPLES, stratify=scans.target, random_state=0, shuffle=True
    )
    return Source(tuple(str(digit) for digit in range(10)), tuple(train), tuple(val))


def _png(scan: Any) -> bytes:
    """8x8 grays of 0 to 16 -> bytes of a 16x16 grayscale PNG."""
    image = Image.fromarray((scan * (255 / 16)).round().astype("uint8"))
    buffer = io.BytesIO()
    image.resize((DIGITS_SIDE, DIGITS_SIDE), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


EMBEDDED: dict[str, Callable[[], Source]] = {"digits": digits, "photos": photos, "fashion": fashion, "emoji": emoji}
"""Data sets by name: `mvar shards make NAME DST`, or just a missing folder `data/NAME` (`shards.ensure`)."""


def load_source(
    name_or_path: str | Path,
    val_fraction: float = 0.1,
    seed: int = 0,
    ground_truth: str | Path | None = None,
    scans: tuple[str, ...] = (),
) -> Source:
    """An embedded data set by its name (with its own fixed split), ImageNet's archives, a list, arrays (npz, npy, or a
    folder of IDX files), or a folder of images.

    A folder that has an embedded name is reached as `./digits`; `scans` are suffixes of images in folders, too.
    Raises UserError where there is nothing to read.
    """
    if str(name_or_path) in EMBEDDED:
        return EMBEDDED[str(name_or_path)]()
    path = Path(name_or_path)
    if (folder := archives_of(path)) is not None:
        return read_imagenet(folder, ground_truth)
    if not path.is_dir() and path.suffix.lower() in LIST_SUFFIXES:
        if ground_truth is not None:
            raise UserError(
                f"``ground_truth``: is for ImageNet's validation images, and the list {path} tells the labels"
            )
        return read_list(path, val_fraction, seed)
    if path.suffix.lower() in ARRAY_SUFFIXES and not path.is_dir():
        return read_arrays(path, val_fraction, seed)
    for place in (path, path / "raw"):  # torchvision keeps them in MNIST/raw
        if find_idx(place):
            return read_idx(place)
    if path.is_file():
        if path in find_idx(path.parent):
            raise UserError(f"source {path}: is one of several IDX files that belong together; give their folder")
        raise UserError(
            f"source {path}: is neither a list ({', '.join(LIST_SUFFIXES)}), arrays ({', '.join(ARRAY_SUFFIXES)}) "
            f"nor {TRAIN}; "
            "give a folder with a subfolder for each class"
        )
    return scan_folder(path, val_fraction, seed, ground_truth, scans)
