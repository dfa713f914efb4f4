"""The photographs: held-out regions stay held out, and the crops are the same on every machine."""

from __future__ import annotations

import io
import random
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mvar_lightning import ShardsDataModule, normalize
from mvar_lightning.data.making import embedded as room
from mvar_lightning.data.making.embedded import (
    CROP_SIDE,
    PHOTOS,
    Photo,
    held_out,
    photos,
    train_window,
    val_window,
)
from mvar_lightning.data.making.shards import ensure
from mvar_lightning.errors import UserError


@given(width=st.integers(4 * CROP_SIDE, 3000), height=st.integers(CROP_SIDE, 3000), seed=st.integers(0, 999))
def test_training_windows_never_touch_the_held_out_band(width: int, height: int, seed: int) -> None:
    first, end = held_out(width)
    left, top, side = train_window(width, height, random.Random(seed))
    assert left + side <= first or left >= end
    assert 0 <= left <= left + side <= width
    assert 0 <= top <= top + side <= height
    left, top, side = val_window(width, height, random.Random(seed))
    assert first <= left <= left + side <= end
    assert 0 <= top <= top + side <= height


def test_ten_classes_of_one_photograph_each() -> None:
    source = photos()
    assert len(source.class_names) == 10
    assert [sum(example.label == label for example in source.train) for label in range(10)] == [300] * 10
    assert [sum(example.label == label for example in source.val) for label in range(10)] == [100] * 10
    assert len({example.name for example in (*source.train, *source.val)}) == 4000


def test_crops_are_color_jpegs_that_repeat_byte_for_byte() -> None:
    first, again = photos().train[17].load(), photos().train[17].load()
    assert first == again
    with Image.open(io.BytesIO(first)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (CROP_SIDE, CROP_SIDE))
        assert len(image.getcolors(10_000) or []) > 100


@pytest.mark.parametrize(
    ("split", "number", "name", "color", "spread"),
    [
        ("train", 0, "astronaut, training crop 0", (201.39, 97.23, 76.84), 68.82),
        ("train", 1255, "galaxies, training crop 55", (13.28, 15.37, 14.45), 12.80),
        ("val", 120, "cat, validation crop 20", (153.58, 115.83, 83.87), 44.41),
        ("val", 999, "tissue, validation crop 99", (183.22, 171.58, 161.78), 47.08),
    ],
)
def test_crops_are_those_that_were_measured_on(
    split: str, number: int, name: str, color: tuple[float, ...], spread: float
) -> None:
    """Means and standard deviation of the pixels, not bytes: JPEG encoders differ between versions of Pillow."""
    example = getattr(photos(), split)[number]
    with Image.open(io.BytesIO(example.load())) as image:
        pixels = np.asarray(image, dtype=float)
    assert example.name == name
    assert pixels.mean(axis=(0, 1)) == pytest.approx(color, abs=0.5) and pixels.std() == pytest.approx(spread, abs=0.5)


def test_a_missing_folder_of_that_name_is_made_and_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "TRAIN_CROPS", 4)  # of 300, for speed
    monkeypatch.setattr(room, "VAL_CROPS", 2)
    data = ShardsDataModule(str(tmp_path / "data" / "photos"), image_size=64, batch_size=8, num_workers=0)
    data.prepare_data()
    data.setup("fit")
    assert data.class_names == tuple(PHOTOS) and (data.train_samples, data.val_samples) == (40, 20)
    assert ensure(tmp_path / "data" / "photos") == data.index
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (8, 3, 64, 64) and normalize(batch["image"]).std() > 0.1
    seen = [(normalize(batch["image"]), batch["label"]) for batch in data.val_dataloader()]
    images, labels = torch.cat([image for image, _ in seen]), torch.cat([label for _, label in seen])
    assert sorted(labels.tolist()) == sorted([*range(10)] * 2)
    red, blue = images[labels == [*PHOTOS].index("cat")].mean(dim=(0, 2, 3))[::2]
    assert red > blue + 0.1, "a cat under another label"


@pytest.mark.parametrize("split", ["train", "val"])
def test_no_pixel_of_the_other_split_reaches_a_crop(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the other split's part of every photograph inverted, the crops stay the same bytes."""
    photo, source = room._photo, photos()
    examples = getattr(source, split)[:: 7 if split == "train" else 5]
    before = [example.load() for example in examples]

    def other_part_inverted(path: Path) -> Image.Image:
        original = photo(path)
        first, end = held_out(original.width)
        spans = [(first, end)] if split == "train" else [(0, first), (end, original.width)]
        changed = original.copy()
        for left, right in spans:
            box = (left, 0, right, original.height)
            changed.paste(ImageOps.invert(original.crop(box)), box)
        return changed

    monkeypatch.setattr(room, "_photo", lru_cache(other_part_inverted))
    assert [example.load() for example in examples] == before


def test_a_missing_photograph_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PHOTOS, "cat", Photo("skimage", "data/gone.png"))
    with pytest.raises(UserError, match=r"data/gone\.png of scikit-image"):
        room.photos()
