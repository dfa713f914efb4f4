"""Pictures that are not RGB, and crops that are no squares: what shards keep, what batches hold, what is refused."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from mvar_lightning import MultiScaleTokenizer, ShardsDataModule
from mvar_lightning.data.check import check
from mvar_lightning.data.images import ImageError, PixelForm, decode, of_form
from mvar_lightning.data.index import read_index
from mvar_lightning.data.making.shards import ShardsRequest, make_shards
from mvar_lightning.data.transforms import (
    adm_center_crop,
    build_transform,
    checked_size,
    exact_window,
    fast_window,
    shorter_to,
)
from mvar_lightning.errors import UserError
from mvar_lightning.tools.drawing import as_rgb, normalize, to_image

FORMS = [PixelForm(1), PixelForm(1, 16), PixelForm(4)]
SIZES: dict[str, Any] = {"channels": 8, "channel_multipliers": (1, 1), "num_res_blocks": 1, "norm_groups": 4}
LABELS = np.arange(12) % 3


def pixels_of(form: PixelForm, count: int = 12, height: int = 6, width: int = 9) -> NDArray[Any]:
    values = np.random.default_rng(0).integers(0, 2**form.bits, (count, height, width, form.channels))
    return values.astype(np.uint16 if form.bits == 16 else np.uint8)


def write_shards(folder: Path, form: PixelForm, **asked: Any) -> Path:
    """Of arrays, each pixel its own number."""
    pixels = pixels_of(form)
    np.savez(folder / "arrays.npz", images=pixels, labels=LABELS)
    wanted = {"channels": form.channels, "bits": form.bits, **asked}
    make_shards(ShardsRequest(folder / "arrays.npz", folder / "shards", val_fraction=0.25, **wanted))
    return folder / "shards"


def module(folder: Path, **changes: Any) -> ShardsDataModule:
    given = {"image_size": [6, 9], "batch_size": 9, "num_workers": 0, "resize_ratio": 1.0, **changes}
    return ShardsDataModule(str(folder), **given)


def all_images(data: ShardsDataModule) -> torch.Tensor:
    return torch.cat([batch["image"] for split in ("train", "val") for batch in data.ordered_dataloader(split)])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_pixels_come_back_as_they_went_in(form: PixelForm, tmp_path: Path) -> None:
    folder = write_shards(tmp_path, form)
    assert read_index(folder).form == form and check(folder, decode=True) == []
    data = module(folder)
    image_BCHW = all_images(data)
    assert image_BCHW.dtype == (torch.uint16 if form.bits == 16 else torch.uint8) and data.channels == form.channels
    rows = {row.tobytes() for row in pixels_of(form).transpose(0, 3, 1, 2)}
    assert {row.tobytes() for row in image_BCHW.numpy()} == rows and len(rows) == 12
    white = 2**form.bits - 1
    expected = torch.from_numpy(image_BCHW.numpy().astype(np.float32)) / white * 2 - 1
    assert torch.equal(normalize(image_BCHW), expected) and expected.min() < -0.9 and expected.max() > 0.9
    if form.bits == 8:  # as a picture file again
        again = to_image(normalize(image_BCHW)[0].add(1).div(2))
        assert again.mode == form.mode and np.array_equal(
            np.asarray(again).reshape(6, 9, -1), image_BCHW[0].permute(1, 2, 0)
        )


def test_rgb_is_what_it_was(tmp_path: Path) -> None:
    """Nothing new in the index; and shards of any form can be read as RGB, as those of gray pictures always were."""
    folder = write_shards(tmp_path, PixelForm(1), channels=3)
    assert "channels" not in json.loads((folder / "index.json").read_text()) and module(folder).channels == 3
    image_B3HW = all_images(module(folder))
    assert torch.equal(image_B3HW, image_B3HW[:, :1].expand(-1, 3, -1, -1))
    (tmp_path / "deep").mkdir()
    deep = all_images(module(write_shards(tmp_path / "deep", PixelForm(1, 16)), channels=3))
    assert deep.dtype == torch.uint8 and deep.shape == (12, 3, 6, 9)


def test_scans_of_16_bits_from_a_folder(tmp_path: Path) -> None:
    pixels_NHW = pixels_of(PixelForm(1, 16), count=4)[..., 0]
    for number, pixels_HW in enumerate(pixels_NHW):
        place = tmp_path / "scans" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels_HW).save(place / f"{number}.{'png' if number < 2 else 'tif'}")
    request = ShardsRequest(tmp_path / "scans", tmp_path / "shards", channels=1, bits=16, val_fraction=0.5)
    make_shards(request)
    found = {row.tobytes() for row in all_images(module(tmp_path / "shards")).numpy()[:, 0]}
    assert found == {row.tobytes() for row in pixels_NHW}


@pytest.mark.parametrize(
    ("mode", "form", "words"),
    [
        ("RGB", PixelForm(1), "it is RGB of 8 bits, not gray of 8 bits"),
        ("L", PixelForm(1, 16), "it is gray of 8 bits, not gray of 16 bits"),
        ("I;16", PixelForm(1), "it is gray of 16 bits"),
        ("LA", PixelForm(1), "it is RGBA"),
        ("RGB", PixelForm(4), "not RGBA of 8 bits"),
    ],
)
def test_mixed_pictures_are_refused(mode: str, form: PixelForm, words: str, tmp_path: Path) -> None:
    """The odd one is named, and nothing is left."""
    fitting = pixels_of(form, count=3)
    for number, pixels in enumerate(fitting):
        (tmp_path / "images" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[..., 0] if form.channels == 1 else pixels).save(
            tmp_path / "images" / "a" / f"{number}.png"
        )
    odd = tmp_path / "images" / "a" / "odd.png"
    Image.new(mode, (9, 6)).save(odd)
    with pytest.raises(ImageError, match=words):
        decode(odd.read_bytes(), form)
    request = ShardsRequest(tmp_path / "images", tmp_path / "shards", channels=form.channels, bits=form.bits)
    with pytest.raises(UserError, match=words) as caught:
        make_shards(request)
    assert "odd.png" in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_what_contradicts_the_data_is_refused_before_work(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, PixelForm(1))
    with pytest.raises(UserError, match=r"data.channels 4: .* was made with 1 channels"):
        _ = module(folder, channels=4).channels
    with pytest.raises(UserError, match="of 8 bits, or 1 of 16"):
        module(folder, channels=2)
    tokenizer = MultiScaleTokenizer([1, [3, 4]], vocab_size=8, code_dim=4, **SIZES)
    with pytest.raises(UserError, match="1 channels, the tokenizer takes 3"):
        module(folder, image_size=[6, 8]).check_model(tokenizer)
    for size, words in (([6, 9], "9 is no multiple of 2"), (8, "make images of 6x8 pixels, but data.image_size is 8")):
        with pytest.raises(UserError, match=words):
            module(folder, image_size=size, channels=3).check_model(tokenizer)
    module(folder, image_size=[6, 8], channels=3).check_model(tokenizer)
    for wrong in ([6], [6, 8, 2], "wide", [6.5, 8], [0, 8]):
        with pytest.raises(UserError, match="image_size"):
            module(folder, image_size=wrong)
    with pytest.raises(UserError, match="16 bits are kept of one"):
        np.savez(tmp_path / "deep.npz", images=np.zeros((4, 6, 6, 3), np.uint16), labels=LABELS[:4])
        make_shards(ShardsRequest(tmp_path / "deep.npz", tmp_path / "more"))


def test_a_png_stays_the_file_it_was_and_a_tiff_becomes_one() -> None:
    gray = Image.fromarray(pixels_of(PixelForm(1))[0, ..., 0])
    files = {kind: io.BytesIO() for kind in ("PNG", "TIFF")}
    for kind, file in files.items():
        gray.save(file, kind)
    assert of_form(files["PNG"].getvalue(), PixelForm(1)) == files["PNG"].getvalue()
    made = of_form(files["TIFF"].getvalue(), PixelForm(1))
    assert made[1:4] == b"PNG" and np.array_equal(np.asarray(decode(made, PixelForm(1))), np.asarray(gray))


@pytest.mark.parametrize(("least", "most"), [(-1000, 40), (0, 70_000)])
def test_scans_that_16_bits_do_not_hold_are_refused(least: int, most: int) -> None:
    """They would wrap around."""
    file = io.BytesIO()
    Image.fromarray(np.array([[least, most]], np.int32)).save(file, "TIFF")
    for read in (decode, of_form):
        with pytest.raises(ImageError, match=rf"^values from {least} to {most}; 16 bits hold 0 to 65535$"):
            read(file.getvalue(), PixelForm(1, 16))
    fitting = io.BytesIO()
    Image.fromarray(np.array([[0, 65535]], np.int32)).save(fitting, "TIFF")
    assert np.asarray(decode(fitting.getvalue(), PixelForm(1, 16))).tolist() == [[0, 65535]]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_scan_of_floats_is_called_so(form: PixelForm) -> None:
    file = io.BytesIO()
    Image.fromarray(np.ones((2, 2), np.float32)).save(file, "TIFF")
    with pytest.raises(ImageError, match=f"it is 32-bit floats, not {form}"):
        of_form(file.getvalue(), form)


def test_a_size_is_one_or_more_and_no_yes() -> None:
    for wrong in (True, 0, [0, 5], [True, 8], -3):
        with pytest.raises(UserError, match="1 or more"):
            checked_size(wrong)


# crops that are no squares


@given(size=st.tuples(st.integers(4, 60), st.integers(4, 60)), target=st.tuples(st.integers(1, 24), st.integers(1, 24)))
def test_a_picture_just_covers_the_window(size: tuple[int, int], target: tuple[int, int]) -> None:
    width, height = shorter_to(size, target)
    assert width >= target[0] and height >= target[1] and (width == target[0] or height == target[1])
    if target[0] == target[1]:
        assert (width, height) == shorter_to(size, target[0])


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "I;16"])
def test_a_wide_window_is_part_of_the_resized_picture(mode: str) -> None:
    form = next(form for form in (PixelForm(), *FORMS) if form.mode == mode)
    pixels = pixels_of(form, count=1, height=41, width=53)[0]
    picture = Image.fromarray(pixels[..., 0] if form.channels == 1 else pixels)
    rows = picture.resize((31, 41), Image.Resampling.LANCZOS)  # rows first, as Pillow did it up to version 12
    expected = np.asarray(rows.resize((31, 24), Image.Resampling.LANCZOS).crop((3, 5, 25, 16)))
    assert np.array_equal(np.asarray(exact_window(picture, (31, 24), (3, 5), (22, 11))), expected)
    fast = np.asarray(fast_window(picture, (31, 24), (3, 5), (22, 11)))
    assert fast.shape == expected.shape and np.abs(fast.astype(int) - expected).mean() < 2**form.bits / 128


def test_crops_of_every_kind_have_the_size() -> None:
    picture = Image.fromarray(pixels_of(PixelForm(), count=1, height=70, width=50)[0])
    for crop in ("random", "center", "adm"):
        made = build_transform(crop, (12, 24), flip=True)(picture, random.Random(0))
        assert made.size == (24, 12)
    assert adm_center_crop(picture, (50, 10)).tobytes() == picture.crop((0, 30, 50, 40)).tobytes()


# what looks at RGB alone


def test_rgb_of_gray_and_of_transparent_images() -> None:
    gray = torch.rand(2, 1, 3, 4)
    assert torch.equal(as_rgb(gray), gray.repeat(1, 3, 1, 1))
    color, alpha = torch.rand(2, 3, 3, 4), torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 3, 4)
    seen = as_rgb(torch.cat([color, alpha], dim=1))
    assert torch.equal(seen[0], torch.ones(3, 3, 4)) and torch.equal(seen[1], color[1])
    half = as_rgb(torch.cat([-torch.ones(1, 3, 2, 2), torch.zeros(1, 1, 2, 2)], dim=1), black=-1)
    assert torch.equal(half, torch.zeros(1, 3, 2, 2))  # black, half transparent, on white
    for channels in (2, 5):
        with pytest.raises(UserError, match=f"{channels} channels"):
            as_rgb(torch.zeros(1, channels, 2, 2))
        with pytest.raises(UserError, match=r"1 \(gray\), 3 \(RGB\) or 4"):
            to_image(torch.zeros(channels, 2, 2))
