"""Pictures to training crops, as published: shorter side to 1.125 x the resolution with Lanczos, then a crop. Where
crops are no squares, the picture is resized to just cover 1.125 x their height and width.

Source: VAR, `utils/data.py` (sizes and offsets follow torchvision's integer formulas, so crops agree pixel for pixel).
Legend: B batch, C channels, S side of the crop or window; SS is its height and width where it is no square.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mvar_lightning.data.images import MAX_PIXELS, ImageError, full_size
from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import Size as ImageSize
from mvar_lightning.pyramid import as_size, as_written, height_width
from mvar_lightning.tools.drawing import normalize

# A window of a resized picture, without computing the rest; exactly as the published pipeline, or faster. Sides and
# corners are in pixels of the resized picture, boxes in pixels of the given one.

LANCZOS = Image.Resampling.LANCZOS
LANCZOS_SUPPORT = 3

Size = tuple[int, int]
"""Width and height, or left and top."""

Side = int | Size
"""Of a window or crop: the side of a square, or width and height."""

Resizer = Callable[[Image.Image, Size, Size, Side], Image.Image]
"""(picture, size, corner, side) -> the window of that side at `corner` of the picture resized to `size` by Lanczos."""


def exact_window(image: Image.Image, size: Size, corner: Size, side: Side) -> Image.Image:
    """Equal, pixel for pixel, to resizing all of a picture and cropping, as Pillow does it up to version 12:
    rows first, rounded to 8 bits, then columns. (Version 13 turns the order for some sizes.)

    Pillow takes a box in single precision, which would turn some pixels by one level; so the window is widened until
    its edges in the given picture are exact in that precision, and cut afterwards.
    """
    if image.size == size:
        return _cut(image, corner, side)
    (left, right), (top, bottom) = (
        _widened(start, length, new, old)
        for start, length, new, old in zip(corner, _both(side), size, image.size, strict=True)
    )
    scale_x, scale_y = image.width / size[0], image.height / size[1]
    reach = math.ceil(LANCZOS_SUPPORT * max(scale_y, 1)) + 1
    first = max(math.floor(top * scale_y) - reach, 0)
    end = min(math.ceil(bottom * scale_y) + reach, image.height)
    rows = image if end - first == image.height else image.crop((0, first, image.width, end))
    # a call that changes one side makes one pass
    rows = rows.resize((right - left, rows.height), LANCZOS, box=(left * scale_x, 0, right * scale_x, rows.height))
    box = (0, top * scale_y - first, right - left, bottom * scale_y - first)
    window = rows.resize((right - left, bottom - top), LANCZOS, box=box)
    return _cut(window, (corner[0] - left, corner[1] - top), side)


def fast_window(image: Image.Image, size: Size, corner: Size, side: Side) -> Image.Image:
    """By torch's vectorized Lanczos for 8-bit pixels; see `TOLERANCE`. Pictures of other forms than RGB go the exact
    way: of 16 bits torch has none, and colors under transparency must be weighted by it."""
    if image.size == size:
        return _cut(image, corner, side)
    if image.mode != "RGB":
        return exact_window(image, size, corner, side)
    pixels_1CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0)
    resized_1CHW = F.interpolate(pixels_1CHW, **_target(image, size), mode="lanczos", antialias=True)
    (left, top), (width, height) = corner, _both(side)
    window_SS3 = resized_1CHW[0, :, top : top + height, left : left + width].permute(1, 2, 0)
    return Image.fromarray(window_SS3.contiguous().numpy())


def _both(side: Side) -> Size:
    return (side, side) if isinstance(side, int) else side


def _target(image: Image.Image, size: Size) -> dict[str, Any]:
    """What `F.interpolate` is to make. A picture decoded at 1/n whose sides n does not divide ends within its last
    pixels: it is scaled by what it covers, and of the result, a part of a pixel too long, whole pixels remain."""
    full = full_size(image)
    part = round(max(full) / max(image.size))
    if full == (image.width * part, image.height * part):
        return {"size": (size[1], size[0])}
    return {"scale_factor": (size[1] * part / full[1] + TINY, size[0] * part / full[0] + TINY)}


TINY = 1e-9
"""So that a side which is divided without a rest does not lose its last pixel to rounding."""

TOLERANCE = (3, 0.02)
"""Largest and mean difference of `fast_window` from `exact_window` on photographs, in levels of 255."""


def _cut(image: Image.Image, corner: Size, side: Side) -> Image.Image:
    (left, top), (width, height) = corner, _both(side)
    return image if image.size == (width, height) else image.crop((left, top, left + width, top + height))


def _widened(start: int, side: int, new: int, old: int) -> tuple[int, int]:
    """The smallest window around start..start + side whose edges times old / new are exact in single precision.

    old / new in lowest terms has the denominator 2^a * odd: multiples of `odd` are. 0 and `new` always are.
    """
    odd = new // math.gcd(old, new)
    while odd % 2 == 0:
        odd //= 2
    return start - start % odd, min(-(-(start + side) // odd) * odd, new)


@lru_cache
def has_fast_lanczos() -> bool:
    """Whether this torch resizes 8-bit pixels by Lanczos."""
    try:
        F.interpolate(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), size=(4, 4), mode="lanczos", antialias=True)
    except (NotImplementedError, ValueError, RuntimeError):
        return False
    return True


def choose_resizer(decoding: str) -> Resizer:
    """`exact` or `fast`. Raises UserError for other words, and for `fast` where torch cannot."""
    if decoding == "exact":
        return exact_window
    if decoding != "fast":
        raise UserError(f"decoding {decoding!r}: not known; choose exact or fast")
    if not has_fast_lanczos():
        raise UserError(f"decoding 'fast': torch {torch.__version__} has no Lanczos resize; take 2.13, or exact")
    return fast_window


Crop = Callable[[Size, Side, random.Random], Size]
"""(width and height, side, rng) -> left and top of a window of that side in a picture that is as large or larger."""


def resize_shorter(image: Image.Image, side: Side) -> Image.Image:
    """Shorter side to `side` pixels, the longer one in proportion, rounded down as torchvision does; or to the smallest
    size that covers width and height."""
    size = shorter_to(image.size, side)
    return image if size == image.size else image.resize(size, LANCZOS)


def shorter_to(size: Size, side: Side) -> Size:
    """Width and height after `resize_shorter`. Raises ImageError where that would be too many pixels."""
    (width, height), (to_width, to_height) = size, _both(side)
    narrow = width * to_height <= height * to_width  # the width decides
    if (width == to_width) if narrow else (height == to_height):
        return size
    resized = (to_width, int(to_width * height / width)) if narrow else (int(to_height * width / height), to_height)
    if resized[0] * resized[1] > MAX_PIXELS:
        raise ImageError(f"{width}x{height} is too long and thin: resized it has {resized[0]}x{resized[1]} pixels")
    return resized


def random_corner(size: Size, side: Side, rng: random.Random) -> Size:
    width, height = _both(side)
    if size == (width, height):
        return 0, 0
    left = rng.randint(0, size[0] - width)
    return left, rng.randint(0, size[1] - height)


def center_corner(size: Size, side: Side, rng: random.Random | None = None) -> Size:
    """Of the middle window; odd remainders rounded half to even, as torchvision does. `rng` is not used."""
    width, height = _both(side)
    return round((size[0] - width) / 2), round((size[1] - height) / 2)


def center_crop(image: Image.Image, side: Side) -> Image.Image:
    """The middle window, see `center_corner`."""
    return _cut(image, center_corner(image.size, side), side)


def adm_center_crop(image: Image.Image, side: Side) -> Image.Image:
    """ADM's crop, behind the reference statistics of published FIDs: halve by box filter while the shorter side is
    at least twice the target, bicubic to the target, middle square (rounded down). Of a target that is no square both
    sides must be twice as long, and it is covered."""
    width, height = _both(side)
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    size = (round(image.width * scale), round(image.height * scale))
    if size[0] * size[1] > MAX_PIXELS:
        raise ImageError(f"{image.width}x{image.height} is too long and thin to be resized to {size[0]}x{size[1]}")
    corner = (size[0] - width) // 2, (size[1] - height) // 2
    return _cut(image.resize(size, Image.Resampling.BICUBIC), corner, side)


def check_ratio(ratio: float) -> None:
    """Raise UserError for a ratio that no crop fits, or that is no number (a recipe's `.nan`)."""
    if not math.isfinite(ratio) or ratio < 1:
        why = "below 1 no crop fits" if math.isfinite(ratio) else "not a finite number"
        raise UserError(f"resize_ratio {ratio}: {why}; give 1.0 or more (published: 1.125)")


@dataclass(frozen=True)
class ResizeCrop:
    """Resize the shorter side to round(ratio * image_size), crop, and maybe mirror: picture -> S x S picture.

    Of an `image_size` (height, width) both are taken times `ratio` and rounded, and the picture just covers them.
    `ratio` 1.0 leaves a picture that already is S x S unaltered. Where to crop follows from the size of the picture as
    it was stored, also where it was decoded at a fraction of that.
    """

    image_size: ImageSize
    ratio: float = 1.125
    crop: Crop = center_corner
    flip: bool = False
    resizer: Resizer = exact_window

    def __post_init__(self) -> None:
        height, width = height_width(self.image_size)
        if min(height, width) < 1:
            raise UserError(
                f"image_size {as_written(self.image_size)}: give the side of the square images in pixels, 1 or more, "
                "or [height, width]"
            )
        check_ratio(self.ratio)
        if self.ratio * math.sqrt(height * width) > math.sqrt(MAX_PIXELS):  # else each would be skipped as damaged
            raise UserError(
                f"resize_ratio {self.ratio}: with image_size {as_written(self.image_size)} images would be enlarged to "
                f"more than {MAX_PIXELS:,} pixels; give a smaller one (published: 1.125)"
            )

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        side = window_of(self.image_size)
        size = shorter_to(full_size(image), (round(self.ratio * side[0]), round(self.ratio * side[1])))
        corner = self.crop(size, side, rng)
        return _maybe_mirrored(self.resizer(image, size, corner, side), self.flip, rng)


def checked_size(image_size: Any) -> ImageSize:
    """A size from a recipe or from Python. Raises UserError where it is none."""
    size = as_size(image_size)
    if size is None or min(height_width(size)) < 1:
        raise UserError(
            f"image_size {image_size!r}: give the side of square images in pixels, 1 or more, or [height, width]"
        )
    return size


def window_of(image_size: ImageSize) -> Size:
    """Width and height, as Pillow has them, of a size as the suite has it."""
    height, width = height_width(image_size)
    return width, height


@dataclass(frozen=True)
class ADMCrop:
    """ADM's center crop at S x S, and maybe mirror."""

    image_size: ImageSize
    flip: bool = False

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        return _maybe_mirrored(adm_center_crop(image, window_of(self.image_size)), self.flip, rng)


Transform = Callable[[Image.Image, random.Random], Image.Image]

DRAFT_MARGIN = 2
"""Fast decoding leaves a JPEG's shorter side at least so many times as long as what it is resized to."""


def build_transform(
    crop: str, image_size: ImageSize, ratio: float = 1.125, flip: bool = False, decoding: str = "exact"
) -> Transform:
    """The transform a recipe names: `random`, `center` (both after the resize) or `adm`, which is always exact."""
    image_size = checked_size(image_size)
    check_ratio(ratio)  # also for adm, which does not read it: a token cache with NaN would never equal itself
    resizer = choose_resizer(decoding)
    if crop == "adm":
        return ADMCrop(image_size, flip)
    corners: dict[str, Crop] = {"random": random_corner, "center": center_corner}
    if crop not in corners:
        raise UserError(f"crop {crop!r}: not known; choose one of {', '.join(corners)}, adm")
    return ResizeCrop(image_size, ratio, corners[crop], flip, resizer)


def planes(picture: Image.Image) -> np.ndarray:
    """S x S picture -> (C, S, S) uint8, or uint16 of a picture of 16 bits."""
    if picture.mode == "I;16":
        return np.asarray(picture)[None]
    # Pillow takes a band out faster than numpy turns the axes
    bands = [np.frombuffer(picture.tobytes("raw", band), np.uint8) for band in picture.getbands()]
    return np.stack(bands).reshape(len(bands), picture.height, picture.width)


def to_batch(pictures: Sequence[Image.Image]) -> Tensor:
    """S x S pictures of one form -> (B, C, S, S) float32 in [-1, 1]."""
    return normalize(torch.from_numpy(np.stack([planes(picture) for picture in pictures])))


def _maybe_mirrored(image: Image.Image, flip: bool, rng: random.Random) -> Image.Image:
    if flip and rng.random() < 0.5:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image
