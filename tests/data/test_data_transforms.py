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
from mvar_lightning.data.images import ImageError, decode_rgb, suffix_of
from mvar_lightning.data.transforms import adm_center_crop, build_transform, resize_shorter, to_batch
from mvar_lightning.errors import UserError


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
    if width <= height:
        resized = image.resize((middle, int(middle * height / width)), Image.Resampling.LANCZOS)
    else:
        resized = image.resize((int(middle * width / height), middle), Image.Resampling.LANCZOS)
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
    batch = to_batch([picture, picture])
    expected = torch.arange(256).float().div(255).mul(2).sub(1).reshape(8, 32)
    assert batch.shape == (2, 3, 8, 32)
    assert batch.is_contiguous()
    assert torch.equal(batch[1, 2], expected)
    assert (batch.min(), batch.max()) == (-1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "middle", "image_size": 8}, "crop 'middle'"),
        ({"crop": "center", "image_size": 0}, "image_size 0"),
        ({"crop": "center", "image_size": 8, "ratio": 0.9}, r"resize_ratio 0\.9"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        build_transform(**options)
