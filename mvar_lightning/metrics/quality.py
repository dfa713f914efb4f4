"""How good a tokenizer is: PSNR and SSIM of its reconstructions, one number an image, and the use of its codebook.

Images are in [0, 1] and looked at as a PNG would keep them (256 levels).

B batch, L all tokens, l tokens of one scale, K scales, V vocabulary, HW pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from mvar_lightning.metrics.frechet import as_saved
from mvar_lightning.pyramid import ScalePyramid

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


class CodebookUsage(Metric):
    """Usage and perplexity of the codebook per scale, over every token seen since the last reset, on all processes.

    Usage is the share of codes seen among those that could have been, min(V, tokens seen): a scale of one token cannot
    show more codes than there were images. Perplexity is exp(entropy) of the code frequencies, from 1 to V. ``alone``
    is of this process only.
    """

    full_state_update = False
    higher_is_better = True
    counts_KV: Tensor

    def __init__(self, pyramid: ScalePyramid, vocab_size: int, alone: bool = False) -> None:
        super().__init__(sync_on_compute=not alone)
        self.pyramid = pyramid
        counts = torch.zeros(pyramid.num_scales, vocab_size, dtype=torch.int64)
        self.add_state("counts_KV", default=counts, dist_reduce_fx="sum")

    def update(self, idx_BL: Tensor) -> None:
        """Count the tokens (B, L) of a batch."""
        for scale, idx_Bl in enumerate(self.pyramid.split(idx_BL)):
            self.counts_KV[scale] += torch.bincount(idx_Bl.flatten(), minlength=self.counts_KV.shape[1])

    def compute(self) -> dict[str, Tensor]:
        """``usage_K`` in [0, 1] and ``perplexity_K``; both are 0 before the first token."""
        tokens_K = self.counts_KV.sum(dim=1)
        could_K = tokens_K.clamp(max=self.counts_KV.shape[1])
        usage_K = (self.counts_KV > 0).sum(dim=1) / could_K.clamp(min=1)
        share_KV = self.counts_KV / tokens_K.clamp(min=1).unsqueeze(1)
        perplexity_K = torch.special.entr(share_KV).sum(dim=1).exp() * (tokens_K > 0)
        return {"usage_K": usage_K, "perplexity_K": perplexity_K}
