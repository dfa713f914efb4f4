"""Real data that ships inside a dependency, so that everything runs without a download.

It is written as shards by the same writer and read by the same stream as any other data set.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mvar_lightning.data.index import INDEX_NAME, ShardIndex, read_index
from mvar_lightning.data.photos import photos
from mvar_lightning.data.sources import Example, Source, scan_folder
from mvar_lightning.errors import UserError

DIGITS_SIDE = 16
DIGITS_VAL_SAMPLES = 360


def digits() -> Source:
    """The 1,797 handwritten digits of scikit-learn (8x8 scans, 16 grays, 10 classes), enlarged to 16x16 PNG.

    1,437 train and 360 validation samples, each class in proportion, always the same ones.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans = load_digits()
    numbers = range(len(scans.target))
    train, val = train_test_split(
        numbers, test_size=DIGITS_VAL_SAMPLES, stratify=scans.target, random_state=0, shuffle=True
    )

    def examples(chosen: list[int]) -> tuple[Example, ...]:
        return tuple(
            Example(f"digit {number}", int(scans.target[number]), partial(_png, scans.images[number]))
            for number in chosen
        )

    return Source(tuple(str(digit) for digit in range(10)), examples(train), examples(val))


def _png(scan: Any) -> bytes:
    """8x8 grays of 0 to 16 -> bytes of a 16x16 grayscale PNG."""
    from PIL import Image

    image = Image.fromarray((scan * (255 / 16)).round().astype("uint8"))
    buffer = io.BytesIO()
    image.resize((DIGITS_SIDE, DIGITS_SIDE), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


EMBEDDED: dict[str, Callable[[], Source]] = {"digits": digits, "photos": photos}
"""Data sets by name: `mvar shards make NAME DST`, or just a missing folder `data/NAME`."""


def load_source(
    name_or_path: str | Path, val_fraction: float = 0.1, seed: int = 0, ground_truth: str | Path | None = None
) -> Source:
    """An embedded data set by its name (with its own fixed split), ImageNet's archives, a list, or a folder of images.

    A folder that has an embedded name is reached as `./digits`. Raises UserError where there is nothing to read.
    """
    from mvar_lightning.data import imagenet, listing

    if str(name_or_path) in EMBEDDED:
        return EMBEDDED[str(name_or_path)]()
    path = Path(name_or_path)
    if (folder := imagenet.archives_of(path)) is not None:
        return imagenet.read_imagenet(folder, ground_truth)
    if not path.is_dir() and path.suffix.lower() in listing.SUFFIXES:
        if ground_truth is not None:
            raise UserError(
                f"--ground-truth: is for ImageNet's validation images, and the list {path} tells the labels"
            )
        return listing.read_list(path, val_fraction, seed)
    if path.is_file():
        raise UserError(
            f"source {path}: is neither a list ({', '.join(listing.SUFFIXES)}) nor {imagenet.TRAIN}; "
            "give a folder with a subfolder for each class"
        )
    return scan_folder(path, val_fraction, seed, ground_truth)


def ensure(path: str | Path) -> ShardIndex:
    """Index of a shard folder; a missing folder named like an embedded data set (`data/digits`) is made first.

    Raises UserError for any other folder that is missing or empty. Several processes may call this at once.
    """
    folder = Path(path)
    if folder.name not in EMBEDDED or folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        return read_index(folder)
    from mvar_lightning.data.shards import write_shards

    try:
        return write_shards(EMBEDDED[folder.name](), folder)
    except UserError:
        if (folder / INDEX_NAME).is_file():  # another process was first; its folder is complete
            return read_index(folder)
        raise
