"""Image bytes to RGB pictures: every mode, every rotation, and no surprises."""

from __future__ import annotations

import io

from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats that shards hold, and the suffix of each inside a shard."""

SUFFIXES = ("jpg", "jpeg", "png", "webp")
"""Suffixes that are read back."""

MAX_PIXELS = 100_000_000
"""Pictures with more pixels than this are refused before they are decoded (a decompression bomb fits in a few kB)."""


class ImageError(Exception):
    """These bytes are not a picture that can be used; the message says why. Callers add which one it was."""


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
        return FORMATS[str(image.format)]


def decode_rgb(data: bytes) -> Image.Image:
    """The whole picture upright in RGB: EXIF rotation applied, transparency laid on white, CMYK, palette and
    grayscale (8 or 16 bits) converted. Raises ImageError for damaged or truncated bytes."""
    image = open_image(data)
    try:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # see open_image
        raise ImageError(f"damaged picture ({_reason(error)})") from error


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
