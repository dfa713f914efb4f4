"""How close a reconstruction is to its image: one number an image.

All of it takes images in [0, 1] and looks at them as a PNG would keep them (256 levels).

B batch, HW pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from mvar_lightning.metrics.frechet import as_saved

IDENTICAL_DB = 100.0
"""The PSNR of an image without any error, which is infinite; a mean over images must stay a number."""

SMALLEST_SSIM_SIDE = 6
"""The 11 x 11 window of SSIM reaches 5 pixels beyond the border by reflection: smaller images have none."""


def psnr(image_B3HW: Tensor, again_B3HW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in decibel: (B,), at most `IDENTICAL_DB`."""
    values_B = peak_signal_noise_ratio(
        as_saved(again_B3HW), as_saved(image_B3HW), data_range=1.0, reduction="none", dim=(1, 2, 3)
    )
    return values_B.clamp(max=IDENTICAL_DB)


def ssim(image_B3HW: Tensor, again_B3HW: Tensor) -> Tensor:
    """Structural similarity of each image (11 x 11 Gaussian window): (B,); NaN for images too small for it."""
    if min(image_B3HW.shape[-2:]) < SMALLEST_SSIM_SIDE:
        return image_B3HW.new_full((len(image_B3HW),), torch.nan)
    values_B = structural_similarity_index_measure(
        as_saved(again_B3HW), as_saved(image_B3HW), data_range=1.0, reduction="none"
    )
    assert isinstance(values_B, Tensor)
    return values_B.reshape(len(image_B3HW))
