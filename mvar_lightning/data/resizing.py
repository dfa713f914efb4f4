"""A window of a resized picture, without computing the rest; exactly as the published pipeline, or faster.

Legend: S side of the window; sides and corners in pixels of the resized picture, boxes in pixels of the given one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from mvar_lightning.data.images import full_size
from mvar_lightning.errors import UserError

LANCZOS = Image.Resampling.LANCZOS
LANCZOS_SUPPORT = 3

Size = tuple[int, int]
"""Width and height, or left and top."""

Resizer = Callable[[Image.Image, Size, Size, int], Image.Image]
"""(picture, size, corner, side) -> the side x side window at `corner` of the picture resized to `size` by Lanczos."""


def exact_window(image: Image.Image, size: Size, corner: Size, side: int) -> Image.Image:
    """Equal, pixel for pixel, to resizing all of an RGB picture and cropping, as Pillow does it up to version 12:
    rows first, rounded to 8 bits, then columns. (Version 13 turns the order for some sizes.)

    Pillow takes a box in single precision, which would turn some pixels by one level; so the window is widened until
    its edges in the given picture are exact in that precision, and cut afterwards.
    """
    if image.size == size:
        return _cut(image, corner, side)
    (left, right), (top, bottom) = (
        _widened(start, side, new, old) for start, new, old in zip(corner, size, image.size, strict=True)
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


def fast_window(image: Image.Image, size: Size, corner: Size, side: int) -> Image.Image:
    """By torch's vectorized Lanczos for 8-bit pixels; see `TOLERANCE`."""
    if image.size == size:
        return _cut(image, corner, side)
    pixels_1CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0)
    resized_1CHW = F.interpolate(pixels_1CHW, **_target(image, size), mode="lanczos", antialias=True)
    left, top = corner
    window_SS3 = resized_1CHW[0, :, top : top + side, left : left + side].permute(1, 2, 0)
    return Image.fromarray(window_SS3.contiguous().numpy())


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


def _cut(image: Image.Image, corner: Size, side: int) -> Image.Image:
    if image.size == (side, side):
        return image
    return image.crop((*corner, corner[0] + side, corner[1] + side))


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
