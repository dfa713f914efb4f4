"""Reconstructions as one picture: an image after each scale, or by each of several tokenizers, with the PSNR below.

N images, K scales, HW pixels; picture_3HW is one RGB picture in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mvar_lightning.metrics.quality import psnr
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.tools.compute import evaluating
from mvar_lightning.tools.drawing import labeled_rows, to_unit


def progressive_picture(original_N3HW: Tensor, after_NK3HW: Tensor, sides: Sequence[int]) -> Tensor:
    """One row an image: after each scale, coarse on the left, and the original at the right end.

    Args:
        original_N3HW: the images, in [0, 1].
        after_NK3HW: the same decoded from the first 1, 2, ... K scales, in [0, 1].
        sides: of the K token maps, the labels of the columns.
    """
    rows_RN3HW = torch.cat([after_NK3HW, original_N3HW[:, None]], dim=1)
    labels = [*(f"{side} x {side}" for side in sides), "original"]
    captions = [[*told, ""] for told in _decibel(original_N3HW, after_NK3HW)]
    return labeled_rows(rows_RN3HW, labels, captions)


def comparison_picture(original_N3HW: Tensor, again_N3HW: Mapping[str, Tensor]) -> Tensor:
    """One row an image: the original, and what each of several tokenizers makes of it.

    Args:
        original_N3HW: the images, in [0, 1].
        again_N3HW: the same reconstructed, in [0, 1], by the name above the column.
    """
    again_NR3HW = torch.stack([*again_N3HW.values()], dim=1)
    rows_NR3HW = torch.cat([original_N3HW[:, None], again_NR3HW], dim=1)
    captions = [["", *told] for told in _decibel(original_N3HW, again_NR3HW)]
    return labeled_rows(rows_NR3HW, ["image", *again_N3HW], captions)


def _decibel(original_N3HW: Tensor, again_NR3HW: Tensor) -> list[list[str]]:
    """The PSNR of each of R reconstructions of N images, in words."""
    return [
        [f"{float(value):.1f} dB" for value in psnr(image_3HW.expand_as(again_R3HW), again_R3HW)]
        for image_3HW, again_R3HW in zip(original_N3HW, again_NR3HW, strict=True)
    ]


def reconstruct_after_each_scale(tokenizer: MultiScaleTokenizer, image_N3HW: Tensor) -> Tensor:
    """Images in [0, 1] decoded from their first 1, 2, ... K scales: (N, K, 3, H, W), on the tokenizer's device."""
    device = next(tokenizer.parameters()).device
    with evaluating(tokenizer):
        idx_NL = tokenizer.encode(image_N3HW.to(device) * 2 - 1)
        return torch.stack([to_unit(after_N3HW) for after_N3HW in tokenizer.progressive(idx_NL)], dim=1)
