"""Image bytes to pictures of one form, RGB unless said otherwise: every rotation, and no surprises."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mvar_lightning.errors import UserError

FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats that are read and that shards hold, and the suffix of each inside a shard."""

_CONTAINERS = {"MPO": "JPEG"}
"""A JPEG with further ones behind it (portrait mode, drones): Pillow calls it by another name. The first one counts."""

SUFFIXES = ("jpg", "jpeg", "png", "webp")
"""Suffixes that are read back."""

TIFF = ("tif", "tiff")
"""Of scans: read where a form is asked for that is not RGB, and kept as PNG."""

ORIENTATION = 0x0112
"""EXIF tag; from 5 on width and height change places."""

_FULL_SIZE = (-1, -1)
"""Key in a picture's `info`; what comes from files has text as keys, or sizes."""

MAX_PIXELS = 100_000_000
"""Pictures with more pixels than this are refused before they are decoded (a decompression bomb fits in a few kB)."""


@dataclass(frozen=True)
class PixelForm:
    """What the pixels of a data set are: 3 channels (RGB), 1 (gray) or 4 (RGBA) of 8 bits, or 1 of 16.

    Raises:
        UserError: another form, which no picture file has.
    """

    channels: int = 3
    bits: int = 8

    def __post_init__(self) -> None:
        if (self.channels, self.bits) not in _MODES:
            raise UserError(
                f"channels {self.channels}, bits {self.bits}: pictures have 1 (gray), 3 (RGB) or 4 channels "
                "(RGBA) of 8 bits, or 1 of 16"
            )

    @property
    def mode(self) -> str:
        """Pillow's name."""
        return _MODES[self.channels, self.bits]

    def __str__(self) -> str:
        return f"{_NAMES[self.channels]} of {self.bits} bits"


_MODES = {(3, 8): "RGB", (1, 8): "L", (4, 8): "RGBA", (1, 16): "I;16"}
_NAMES = {1: "gray", 3: "RGB", 4: "RGBA"}
RGB = PixelForm()


def check_channels(channels: int, wanted: int, of: str) -> None:
    """Raise UserError unless images have as many channels as the tokenizer's."""
    if channels != wanted:
        raise UserError(
            f"{of}: gives images of {channels} channels, the tokenizer takes {wanted}; give data of as many "
            "(mvar shards make --channels), or a tokenizer trained on such"
        )


def is_image(name: str, others: tuple[str, ...] = ()) -> bool:
    """Whether a file's name says so; ``others`` are suffixes that count, too."""
    return name.rpartition(".")[2].lower() in (*SUFFIXES, *others)


class SampleError(Exception):
    """This sample cannot be used; the message says why. Callers add which one it was."""


class ImageError(SampleError):
    """These bytes are not a picture that can be used."""


def open_image(data: bytes, others: tuple[str, ...] = ()) -> Image.Image:
    """Read the header only. Raises ImageError for other formats and for more than MAX_PIXELS pixels."""
    try:
        image = Image.open(io.BytesIO(data), formats=(*FORMATS, *others))
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


def of_form(data: bytes, form: PixelForm) -> bytes:
    """The picture as shards of that form hold it: the bytes that came, or of a TIFF a PNG of the same pixels.

    Raises:
        ImageError: it is of another form.
    """
    with open_image(data, ("TIFF",)) as image:
        _check_form(image, form)
        if image.format != "TIFF":
            return data
        buffer = io.BytesIO()
        decode(data, form).save(buffer, "PNG")
        return buffer.getvalue()


def decode_rgb(data: bytes, draft_side: int | None = None) -> Image.Image:
    """`decode` to RGB."""
    return decode(data, RGB, draft_side)


def decode(
    data: bytes, form: PixelForm = RGB, draft_side: int | None = None, reduced_side: int | None = None
) -> Image.Image:
    """The whole picture upright, EXIF rotation applied. To RGB every kind is converted: transparency laid on white,
    CMYK, palette and grayscale (8 or 16 bits). Of other forms a picture must be already.

    A JPEG whose sides are both at least 2 x `draft_side` is decoded at 1/2, 1/4 or 1/8 of its size, so that both are
    still at least `draft_side`; `full_size` then tells the size before. With `reduced_side`, what is transparent is
    reduced by a whole factor before it is laid on anything, likewise, which takes a third of the memory.

    Raises:
        ImageError: damaged or truncated bytes, and what `open_image` refuses.
    """
    image = open_image(data, () if form == RGB else ("TIFF",))
    _check_form(image, form)
    try:
        full = image.size
        if draft_side is not None:
            image.draft(None, (draft_side, draft_side))  # other formats than JPEG do nothing
        image.load()
        drafted, orientation = image.size != full, _orientation(image)
        if orientation > 1:
            ImageOps.exif_transpose(image, in_place=True)  # the other way copies
        if reduced_side and image.has_transparency_data:
            image = _reduced(image, reduced_side)
        picture = to_rgb(image) if form == RGB else _converted(image, form)
        if drafted:
            picture.info[_FULL_SIZE] = full[::-1] if orientation >= 5 else full
        return picture
    except ImageError:
        raise
    except Exception as error:  # see open_image
        raise ImageError(f"damaged picture ({_reason(error)})") from error


def _reduced(image: Image.Image, side: int) -> Image.Image:
    factor = min(image.size) // side
    rgba = image if image.mode == "RGBA" or factor < 2 else image.convert("RGBA")
    return image if factor < 2 else rgba.reduce(factor)


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1, upright, where EXIF says nothing that can be read: the picture may be sound nevertheless."""
    try:
        found = image.getexif().get(ORIENTATION)
    except Exception:  # see open_image
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def full_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of the picture as it was stored, though upright."""
    return image.info.get(_FULL_SIZE, image.size)


def form_of(data: bytes, channels: int) -> PixelForm:
    """The form in which a picture gives so many channels: 16 bits where they are there. Raises ImageError."""
    with open_image(data, () if channels == RGB.channels else ("TIFF",)) as image:
        return PixelForm(channels, 16 if channels == 1 and image.mode.startswith("I") else 8)


def _check_form(image: Image.Image, form: PixelForm) -> None:
    """Raises ImageError unless a picture is of that form, by its header. Nothing is converted into another, which
    would make of mixed data what it is not; but all can be RGB."""
    if form == RGB:
        return
    transparent, mode = image.has_transparency_data, image.mode
    found = PixelForm(4) if transparent else PixelForm(1) if mode in ("1", "L") else RGB
    if mode.startswith("I") and not transparent:
        found = PixelForm(1, 16)
    if mode == "F" or found != form:
        raise ImageError(f"it is {'32-bit floats' if mode == 'F' else found}, not {form}")


def _converted(image: Image.Image, form: PixelForm) -> Image.Image:
    """A picture that has the form's channels, in its mode. Raises ImageError for values that the form cannot hold."""
    if form.bits == 16 and image.mode != form.mode:  # other orders of bytes, and what Pillow widens to 32 bits
        pixels_HW = np.asarray(image)  # signed scans and those of 32 bits come so, too
        least, most = int(pixels_HW.min()), int(pixels_HW.max())
        if least < 0 or most > 65535:
            raise ImageError(f"values from {least} to {most}; 16 bits hold 0 to 65535")
        return Image.fromarray(pixels_HW.astype(np.uint16))
    return image if image.mode == form.mode else image.convert(form.mode)


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
