"""Differentiable augmentation of what a discriminator sees (Zhao et al. 2020, arXiv 2006.10738).

Shapes: B batch, HW pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar_lightning.axis import AxisMember
from mvar_lightning.errors import UserError


class Augmentation(AxisMember):
    """What real and reconstructed images go through before the discriminator sees them."""

    def __call__(self, image_B3HW: Tensor) -> Tensor:
        """Images in the same range; gradients pass. Draws from torch's global generator, each process its own."""
        raise NotImplementedError


class DiffAugment(Augmentation):
    """Color, translation and cutout, drawn for each image.

    Args:
        color: brightness within 0.5, saturation up to double, contrast within 50%.
        translation: largest shift in each direction, as a share of the side; what comes in is 0 (gray).
        cutout: side of the square that is set to 0, as a share of the image's side.
    """

    def __init__(self, color: bool = True, translation: float = 0.125, cutout: float = 0.5) -> None:
        for name, value in (("translation", translation), ("cutout", cutout)):
            if not 0 <= value < 1:
                raise UserError(f"DiffAugment: {name} {value}: must be a share of the side in [0, 1)")
        self.color, self.translation, self.cutout = color, translation, cutout

    def __call__(self, image_B3HW: Tensor) -> Tensor:
        if self.color:
            image_B3HW = change_color(image_B3HW)
        if self.translation:
            image_B3HW = translate(image_B3HW, self.translation)
        return cut_out(image_B3HW, self.cutout) if self.cutout else image_B3HW


def change_color(image_B3HW: Tensor) -> Tensor:
    """Brightness, saturation, contrast."""
    brightness, saturation, contrast = torch.rand(3, len(image_B3HW), 1, 1, 1, device=image_B3HW.device)
    image_B3HW = image_B3HW + (brightness - 0.5)
    gray_B1HW = image_B3HW.mean(1, keepdim=True)
    image_B3HW = gray_B1HW + (image_B3HW - gray_B1HW) * (2 * saturation)
    mean_B111 = image_B3HW.mean((1, 2, 3), keepdim=True)
    return mean_B111 + (image_B3HW - mean_B111) * (contrast + 0.5)


def translate(image_B3HW: Tensor, share: float) -> Tensor:
    """Shift by whole pixels, up to ``share`` of the side."""
    batch, _, height, width = image_B3HW.shape
    device = image_B3HW.device
    most_y, most_x = round(height * share), round(width * share)
    shift_y = torch.randint(0, 2 * most_y + 1, (batch, 1), device=device)
    shift_x = torch.randint(0, 2 * most_x + 1, (batch, 1), device=device)
    padded = F.pad(image_B3HW, (most_x, most_x, most_y, most_y))
    rows_BH = torch.arange(height, device=device) + shift_y
    columns_BW = torch.arange(width, device=device) + shift_x
    images_B = torch.arange(batch, device=device).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[images_B, rows_BH.unsqueeze(2), columns_BW.unsqueeze(1)].permute(0, 3, 1, 2)


def cut_out(image_B3HW: Tensor, share: float) -> Tensor:
    """Set a square around a random pixel to 0; it may reach over the border."""
    outside_BH, outside_BW = (_outside(side, share, image_B3HW) for side in image_B3HW.shape[2:])
    keep_BHW = outside_BH.unsqueeze(2) | outside_BW.unsqueeze(1)
    return image_B3HW * keep_BHW.unsqueeze(1)


def _outside(side: int, share: float, image_B3HW: Tensor) -> Tensor:
    """(B, side): which pixels of a side are not in a stretch of ``share`` of it around a random place."""
    size, device = round(side * share), image_B3HW.device
    first_B1 = torch.randint(0, side + 1 - size % 2, (len(image_B3HW), 1), device=device) - size // 2
    position = torch.arange(side, device=device)
    return (position < first_B1) | (position >= first_B1 + size)
