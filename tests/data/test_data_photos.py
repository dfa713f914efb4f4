"""The photographs: held-out regions stay held out, and the crops are the same on every machine."""

from __future__ import annotations

import io
import random
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mvar_lightning.data import photos as room
from mvar_lightning.data.photos import CROP_SIDE, PHOTOS, Photo, held_out, photos, train_window, val_window
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
