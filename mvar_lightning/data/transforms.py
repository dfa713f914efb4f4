"""Pictures to training crops, as published: shorter side to 1.125 x the resolution with Lanczos, then a crop.

Source: VAR, `utils/data.py` (sizes and offsets follow torchvision's integer formulas, so crops agree pixel for pixel).
Legend: B batch, S side of the crop. Pillow only; torch enters with the finished batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mvar_lightning.data.images import MAX_PIXELS, ImageError
from mvar_lightning.errors import UserError

Crop = Callable[[Image.Image, int, random.Random], Image.Image]
"""Takes an S x S square out of a picture with both sides at least S."""


def resize_shorter(image: Image.Image, side: int, filter: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """Shorter side to `side` pixels, the longer one in proportion, rounded down as torchvision does."""
    width, height = image.size
    if min(width, height) == side:
        return image
    size = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    if size[0] * size[1] > MAX_PIXELS:
        raise ImageError(f"{width}x{height} is too long and thin: resized it has {size[0]}x{size[1]} pixels")
    return image.resize(size, filter)


def random_crop(image: Image.Image, side: int, rng: random.Random) -> Image.Image:
    if image.size == (side, side):
        return image
    left = rng.randint(0, image.width - side)
    top = rng.randint(0, image.height - side)
    return image.crop((left, top, left + side, top + side))


def center_crop(image: Image.Image, side: int, rng: random.Random | None = None) -> Image.Image:
    """The middle square; odd remainders rounded half to even, as torchvision does. `rng` is not used."""
    if image.size == (side, side):
        return image
    left = round((image.width - side) / 2)
    top = round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def adm_center_crop(image: Image.Image, side: int) -> Image.Image:
    """ADM's crop, behind the reference statistics of published FIDs: halve by box filter while the shorter side is
    at least twice the target, bicubic to the target, middle square (rounded down)."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    if size[0] * size[1] > MAX_PIXELS:
        raise ImageError(f"{image.width}x{image.height} is too long and thin to be resized to {size[0]}x{size[1]}")
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


@dataclass(frozen=True)
class ResizeCrop:
    """Resize the shorter side to round(ratio * image_size), crop, and maybe mirror: RGB picture -> S x S picture.

    `ratio` 1.0 leaves a picture that already is S x S unaltered.
    """

    image_size: int
    ratio: float = 1.125
    crop: Crop = center_crop
    flip: bool = False

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise UserError(f"image_size {self.image_size}: give the side of the square images in pixels, 1 or more")
        if self.ratio < 1:
            raise UserError(f"resize_ratio {self.ratio}: below 1 no crop fits; give 1.0 or more (published: 1.125)")

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        cropped = self.crop(self.prepare(image), self.image_size, rng)
        return _maybe_mirrored(cropped, self.flip, rng)

    def prepare(self, image: Image.Image) -> Image.Image:
        return resize_shorter(image, round(self.ratio * self.image_size))


@dataclass(frozen=True)
class ADMCrop:
    """ADM's center crop at S x S, and maybe mirror."""

    image_size: int
    flip: bool = False

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        return _maybe_mirrored(adm_center_crop(image, self.image_size), self.flip, rng)


Transform = Callable[[Image.Image, random.Random], Image.Image]


def build_transform(crop: str, image_size: int, ratio: float = 1.125, flip: bool = False) -> Transform:
    """The transform a recipe names: `random`, `center` (both after the resize) or `adm`."""
    makers: dict[str, Callable[[], Transform]] = {
        "random": lambda: ResizeCrop(image_size, ratio, random_crop, flip),
        "center": lambda: ResizeCrop(image_size, ratio, center_crop, flip),
        "adm": lambda: ADMCrop(image_size, flip),
    }
    if crop not in makers:
        raise UserError(f"crop {crop!r}: not known; choose one of {', '.join(makers)}")
    return makers[crop]()


def to_batch(pictures: Sequence[Image.Image | np.ndarray]) -> Tensor:
    """S x S RGB pictures -> (B, 3, S, S) float32 in [-1, 1], by x / 255 * 2 - 1 as the reference computes it."""
    pixels_BHWC = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return pixels_BHWC.permute(0, 3, 1, 2).float().contiguous().div_(255).mul_(2).sub_(1)


def _maybe_mirrored(image: Image.Image, flip: bool, rng: random.Random) -> Image.Image:
    if flip and rng.random() < 0.5:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image
