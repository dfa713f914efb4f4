"""Image bytes to RGB pictures: every mode, every rotation, and no surprises."""

from __future__ import annotations

import io

from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats that are read and that shards hold, and the suffix of each inside a shard."""

_CONTAINERS = {"MPO": "JPEG"}
"""A JPEG with further ones behind it (portrait mode, drones): Pillow calls it by another name. The first one counts."""

SUFFIXES = ("jpg", "jpeg", "png", "webp")
"""Suffixes that are read back."""

ORIENTATION = 0x0112
"""EXIF tag; from 5 on width and height change places."""

_FULL_SIZE = (-1, -1)
"""Key in a picture's `info`; what comes from files has text as keys, or sizes."""

MAX_PIXELS = 100_000_000
"""Pictures with more pixels than this are refused before they are decoded (a decompression bomb fits in a few kB)."""


def is_image(name: str) -> bool:
    """Whether a file's name says so."""
    return name.rpartition(".")[2].lower() in SUFFIXES


class SampleError(Exception):
    """This sample cannot be used; the message says why. Callers add which one it was."""


class ImageError(SampleError):
    """These bytes are not a picture that can be used."""


def open_image(data: bytes) -> Image.Image:
    """Read the header only. Raises ImageError for other formats and for more than MAX_PIXELS pixels."""
    try:
        image = Image.open(io.BytesIO(data), formats=tuple(FORMATS))
    except UnidentifiedImageError as error:  # its message names our buffer by address
        raise ImageError("not a readable JPEG, PNG or WebP") from error
    except Exception as error:  # Pillow's plugins raise many kinds on damaged bytes
        raise ImageError(f"not a readable JPEG, PNG or WebP ({_reason(error)})") from error
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"{image.width}x{image.height} pixels is over the limit of {MAX_PIXELS}")
    return image


def suffix_of(data: bytes) -> str:
    """jpg, png or webp by the content, since file names lie (ImageNet holds a PNG named .JPEG)."""
    with open_image(data) as image:
        return FORMATS[_CONTAINERS.get(str(image.format), str(image.format))]


def decode_rgb(data: bytes, draft_side: int | None = None) -> Image.Image:
    """The whole picture upright in RGB: EXIF rotation applied, transparency laid on white, CMYK, palette and
    grayscale (8 or 16 bits) converted.

    A JPEG whose sides are both at least 2 x `draft_side` is decoded at 1/2, 1/4 or 1/8 of its size, so that both are
    still at least `draft_side`; `full_size` then tells the size before.

    Raises:
        ImageError: damaged or truncated bytes, and what `open_image` refuses.
    """
    image = open_image(data)
    try:
        full = image.size
        if draft_side is not None:
            image.draft(None, (draft_side, draft_side))  # other formats than JPEG do nothing
        image.load()
        drafted, orientation = image.size != full, _orientation(image)
        if orientation > 1:
            ImageOps.exif_transpose(image, in_place=True)  # the other way copies
        picture = to_rgb(image)
        if drafted:
            picture.info[_FULL_SIZE] = full[::-1] if orientation >= 5 else full
        return picture
    except Exception as error:  # see open_image
        raise ImageError(f"damaged picture ({_reason(error)})") from error


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1, upright, where EXIF says nothing that can be read: the picture may be sound nevertheless."""
    try:
        found = image.getexif().get(ORIENTATION)
    except Exception:  # see open_image
        return 1
    return found if found in range(1, 9) else 1


def full_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of the picture as it was stored, though upright."""
    return image.info.get(_FULL_SIZE, image.size)


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    if image.mode.startswith("I"):
        # convert() would clip 16-bit gray at 255 instead of scaling it
        return image.convert("I").point(lambda value: value * (1 / 257)).convert("L").convert("RGB")
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
