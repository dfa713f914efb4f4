"""Pictures in every mode, and crops equal to the published pipeline's formulas."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mvar_lightning.data import images
from mvar_lightning.data import transforms as resizing
from mvar_lightning.data.image_data import ShardsDataModule
from mvar_lightning.data.images import ImageError, decode_rgb, full_size, suffix_of
from mvar_lightning.data.transforms import (
    TOLERANCE,
    adm_center_crop,
    build_transform,
    exact_window,
    fast_window,
    has_fast_lanczos,
    random_corner,
    resize_shorter,
    shorter_to,
    to_batch,
)
from mvar_lightning.errors import UserError
from mvar_lightning.tools.drawing import normalize


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def first_pixel(data: bytes) -> tuple[int, ...]:
    image = decode_rgb(data)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def test_gray_palette_and_sixteen_bits():
    assert first_pixel(encoded(Image.new("L", (3, 3), 90))) == (90, 90, 90)
    assert first_pixel(encoded(Image.new("1", (3, 3), 1))) == (255, 255, 255)
    assert first_pixel(encoded(Image.new("RGB", (3, 3), (9, 8, 7)).quantize(2))) == (9, 8, 7)
    deep = Image.fromarray(np.full((3, 3), 90 * 257, dtype=np.uint16))
    assert deep.mode == "I;16"
    assert first_pixel(encoded(deep)) == (90, 90, 90)


def test_transparency_lies_on_white():
    assert first_pixel(encoded(Image.new("RGBA", (3, 3), (255, 0, 0, 0)))) == (255, 255, 255)
    assert first_pixel(encoded(Image.new("RGBA", (3, 3), (255, 0, 0, 255)))) == (255, 0, 0)
    assert first_pixel(encoded(Image.new("LA", (3, 3), (0, 51)))) == (204, 204, 204)
    assert first_pixel(encoded(Image.new("P", (3, 3), 0), transparency=0)) == (255, 255, 255)
    assert first_pixel(encoded(Image.new("RGB", (3, 3), (1, 2, 3)), transparency=(1, 2, 3))) == (255, 255, 255)


def test_cmyk_becomes_red():
    red = first_pixel(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert red[0] > 200
    assert max(red[1:]) < 60


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (16, 8))
    image.paste((255, 255, 255), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright = decode_rgb(encoded(image, "JPEG", exif=exif))
    assert upright.size == (8, 16)
    assert upright.getpixel((4, 2))[0] > 200
    assert upright.getpixel((4, 14))[0] < 60


def test_damaged_bytes_are_refused():
    good = encoded(noise(40, 40))
    for data in (b"", b"hello", good[: len(good) // 2], encoded(noise(40, 40), "JPEG")[:-600]):
        with pytest.raises(ImageError):
            decode_rgb(data)
    with pytest.raises(ImageError, match="not a readable"):
        suffix_of(encoded(noise(4, 4), "GIF"))


def test_bombs_are_refused_before_decoding(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    assert decode_rgb(encoded(Image.new("RGB", (9, 11)))).size == (9, 11)
    with pytest.raises(ImageError, match="10x10 pixels is over"):
        decode_rgb(encoded(Image.new("RGB", (10, 10))))


def test_long_thin_pictures_do_not_explode():
    thin = Image.new("RGB", (1, 200_000))
    with pytest.raises(ImageError, match="too long and thin"):
        resize_shorter(thin, 288)
    with pytest.raises(ImageError, match="too long and thin"):
        adm_center_crop(thin, 256)


@settings(max_examples=30, deadline=None)
@given(st.integers(5, 60), st.integers(5, 60), st.integers(4, 24))
def test_center_crop_equals_the_references_formula(width, height, side):
    """torchvision's Resize(round(1.125 S), LANCZOS) and CenterCrop(S), written out."""
    image = noise(width, height)
    middle = round(1.125 * side)
    size = (middle, int(middle * height / width)) if width <= height else (int(middle * width / height), middle)
    # rows first, as Pillow did until version 13
    rows = image.resize((size[0], height), Image.Resampling.LANCZOS)
    resized = rows.resize(size, Image.Resampling.LANCZOS)
    top, left = round((resized.height - side) / 2.0), round((resized.width - side) / 2.0)
    expected = np.asarray(resized)[top : top + side, left : left + side]
    got = build_transform("center", side)(image, random.Random(0))
    np.testing.assert_array_equal(np.asarray(got), expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["random", "center", "adm"]))
def test_every_crop_is_square_and_repeats_with_its_seed(seed, crop):
    rng = random.Random(seed)
    image = noise(rng.randint(1, 70), rng.randint(1, 70), seed)
    transform = build_transform(crop, 13, flip=True)
    one, two = (np.asarray(transform(image, random.Random(seed))) for _ in range(2))
    assert one.shape == (13, 13, 3)
    np.testing.assert_array_equal(one, two)


def test_random_crop_reaches_every_offset_and_flip_mirrors():
    image = noise(9, 9)
    pixels = np.asarray(image)
    windows = {pixels[y : y + 8, x : x + 8].tobytes() for y in range(2) for x in range(2)}
    rng = random.Random(0)
    plain = build_transform("random", 8)
    assert {np.asarray(plain(image, rng)).tobytes() for _ in range(60)} == windows
    mirror = build_transform("random", 8, flip=True)
    mirrored = {np.asarray(mirror(image, rng))[:, ::-1].tobytes() for _ in range(60)}
    assert mirrored & windows
    assert mirrored - windows


def test_ratio_one_leaves_a_fitting_picture_unaltered():
    image = noise(16, 16)
    for crop in ("random", "center"):
        got = build_transform(crop, 16, ratio=1.0)(image, random.Random(0))
        np.testing.assert_array_equal(np.asarray(got), np.asarray(image))


def test_adm_crop_halves_by_box_then_bicubic():
    image = noise(50, 40)
    halved = image.resize((25, 20), Image.Resampling.BOX)
    resized = halved.resize((round(25 * 15 / 20), 15), Image.Resampling.BICUBIC)
    left = (resized.width - 15) // 2
    expected = np.asarray(resized)[:, left : left + 15]
    np.testing.assert_array_equal(np.asarray(adm_center_crop(image, 15)), expected)


def test_batch_is_normalized_as_the_reference_does():
    pixels = np.arange(256, dtype=np.uint8).reshape(8, 32)
    picture = np.stack([pixels] * 3, axis=-1)
    batch = to_batch([Image.fromarray(picture)] * 2)
    expected = torch.arange(256).float().div(255).mul(2).sub(1).reshape(8, 32)
    assert batch.shape == (2, 3, 8, 32)
    assert batch.is_contiguous()
    assert torch.equal(batch[1, 2], expected)
    assert (batch.min(), batch.max()) == (-1, 1)
    assert normalize(batch) is batch, "floats are normalized already"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "middle", "image_size": 8}, "crop 'middle'"),
        ({"crop": "center", "image_size": 0}, "image_size 0"),
        ({"crop": "center", "image_size": 8, "ratio": 0.9}, r"resize_ratio 0\.9"),
        ({"crop": "center", "image_size": 8, "ratio": float("nan")}, "resize_ratio nan: not a finite number"),
        ({"crop": "random", "image_size": 8, "ratio": float("inf")}, "resize_ratio inf: not a finite number"),
        ({"crop": "adm", "image_size": 8, "ratio": float("nan")}, "resize_ratio nan: not a finite number"),
        ({"crop": "center", "image_size": 8, "ratio": 1e308}, r"resize_ratio 1e\+308: with image_size 8.*smaller one"),
        (
            {"crop": "random", "image_size": 8, "ratio": 1251.0},
            r"resize_ratio 1251\.0: .* more than 100,000,000 pixels",
        ),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        build_transform(**options)


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth and sharp at once: what resizing differs on."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    grain = rng.normal(0, 6, smooth.shape)
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


def resized_and_cropped(image: Image.Image, size: tuple[int, int], corner: tuple[int, int], side: int) -> np.ndarray:
    """All of the picture, rows first, then the crop."""
    rows = image.resize((size[0], image.height), Image.Resampling.LANCZOS)
    resized = np.asarray(rows.resize(size, Image.Resampling.LANCZOS))
    return resized[corner[1] : corner[1] + side, corner[0] : corner[0] + side]


@settings(max_examples=60)
@given(st.integers(3, 200), st.integers(3, 200), st.integers(1, 90), st.integers(0, 2**31))
def test_a_window_is_the_crop_of_the_whole_resized_picture(width, height, side, seed):
    rng = random.Random(seed)
    image = noise(width, height, seed)
    size = shorter_to(image.size, round(1.125 * side))
    corner = random_corner(size, side, rng)
    want = resized_and_cropped(image, size, corner, side)
    np.testing.assert_array_equal(np.asarray(exact_window(image, size, corner, side)), want)
    if has_fast_lanczos():
        apart = np.abs(np.asarray(fast_window(image, size, corner, side)).astype(int) - want)
        assert apart.max() <= TOLERANCE[0]


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (500, 333), (431, 287), (1300, 900), (200, 150)])
def test_windows_of_usual_pictures(size):
    image = photograph(*size)
    new = shorter_to(image.size, 288)
    corner = random_corner(new, 256, random.Random(1))
    want = resized_and_cropped(image, new, corner, 256)
    np.testing.assert_array_equal(np.asarray(exact_window(image, new, corner, 256)), want)
    if has_fast_lanczos():
        apart = np.abs(np.asarray(fast_window(image, new, corner, 256)).astype(int) - want)
        assert (apart.max() <= TOLERANCE[0], apart.mean() <= TOLERANCE[1]) == (True, True)


def test_fast_decoding_is_refused_where_torch_cannot(monkeypatch):
    monkeypatch.setattr(resizing, "has_fast_lanczos", lambda: False)
    with pytest.raises(UserError, match=r"decoding 'fast': torch .* take 2\.13, or exact"):
        build_transform("random", 8, decoding="fast")
    with pytest.raises(UserError, match="decoding 'quick'"):
        build_transform("random", 8, decoding="quick")


needs_fast = pytest.mark.skipif(not has_fast_lanczos(), reason="this torch has no Lanczos resize")


@needs_fast
def test_fast_decoding_crops_where_exact_decoding_does():
    """A JPEG of odd sides, decoded at a fourth: size and place follow from the stored size, so pictures agree."""
    data = encoded(photograph(1021, 769), "JPEG", quality=95)
    module = ShardsDataModule("unread", 64, decoding="fast")
    assert module.draft_side == 2 * 72
    drafted = decode_rgb(data, module.draft_side)
    assert drafted.size == (256, 193)
    assert full_size(drafted) == (1021, 769)
    whole = decode_rgb(data)
    assert full_size(whole) == whole.size
    for seed in range(5):
        fast = np.asarray(module.train_transform(drafted, random.Random(seed))).astype(int)
        exact = np.asarray(build_transform("random", 64)(whole, random.Random(seed))).astype(int)
        assert np.abs(fast - exact).mean() < 1
        assert np.abs(np.roll(fast, 1, axis=1) - exact).mean() > 2 * np.abs(fast - exact).mean()


def test_drafts_keep_sides_long_enough_and_validation_exact():
    data = encoded(noise(300, 290), "JPEG")
    assert decode_rgb(data, 146).size == (300, 290)  # the half, 145, would be too short
    assert decode_rgb(data, 145).size == (150, 145)
    assert decode_rgb(encoded(noise(300, 290)), 100).size == (300, 290)  # only JPEG has drafts
    module = ShardsDataModule("unread", 64, crop="adm", val_crop="center")
    assert module.draft_side is None


def test_drafts_are_turned_converted_and_refused_as_whole_pictures():
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.new("RGB", (160, 80))
    upright.paste((255, 255, 255), (0, 0, 80, 80))
    turned = decode_rgb(encoded(upright, "JPEG", exif=exif), 20)
    assert (turned.size, full_size(turned)) == ((20, 40), (80, 160))
    assert turned.getpixel((10, 5))[0] > 200
    assert turned.getpixel((10, 35))[0] < 60
    gray = decode_rgb(encoded(Image.new("L", (80, 80), 90), "JPEG"), 20)
    assert (gray.mode, gray.size, gray.getpixel((3, 3))) == ("RGB", (20, 20), (90, 90, 90))
    red = decode_rgb(encoded(Image.new("CMYK", (80, 80), (0, 255, 255, 0)), "JPEG"), 20)
    assert red.mode == "RGB"
    assert red.getpixel((3, 3))[0] > 200
    whole = encoded(noise(80, 80), "JPEG")
    with pytest.raises(ImageError):
        decode_rgb(whole[: len(whole) // 2], 20)


def test_bombs_are_refused_before_a_draft(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    with pytest.raises(ImageError, match="10x10 pixels is over"):
        decode_rgb(encoded(Image.new("RGB", (10, 10)), "JPEG"), 1)


@pytest.mark.gpu
def test_a_device_normalizes_as_the_cpu_does():
    pixels_B3SS = torch.arange(256, dtype=torch.uint8).expand(2, 3, 8, 256)
    assert torch.equal(normalize(pixels_B3SS.cuda()).cpu(), normalize(pixels_B3SS))
