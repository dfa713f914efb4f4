"""Reconstructions as one picture: an image after each scale, or by each of several tokenizers, with the PSNR below.

N images, K scales, HW pixels; picture_3HW is one RGB picture in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from PIL import ImageDraw, ImageFont
from torch import Tensor

from mvar_lightning.analysis.quality import psnr
from mvar_lightning.callbacks.access import to_unit
from mvar_lightning.callbacks.pictures import INK, enlarge, from_image, make_grid, to_image
from mvar_lightning.evaluating import evaluating
from mvar_lightning.tokenizer import MultiScaleTokenizer

GAP = 4


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


def labeled_rows(image_RN3HW: Tensor, labels: Sequence[str], captions: Sequence[Sequence[str]]) -> Tensor:
    """R rows of N images in [0, 1], enlarged if small; a label above each column, a caption below each image.

    Labels wider than a column take several lines.
    """
    rows, count = image_RN3HW.shape[:2]
    cells = enlarge(image_RN3HW.flatten(0, 1))
    height, width = cells.shape[-2:]
    font = ImageFont.load_default(size=min(max(width // 11, 11), 22))
    line = int(font.getbbox("Mg")[3]) + 6
    headings = [broken(label, font.getlength, width + GAP // 2) for label in labels]
    head = line * max(map(len, headings))
    bands = [torch.ones(3, head, count * (width + GAP) + GAP)]
    for row in cells.split(count):
        bands += [make_grid(row, columns=count, padding=GAP), torch.ones(3, line, bands[0].shape[2])]
    picture = to_image(torch.cat(bands, dim=1))
    draw = ImageDraw.Draw(picture)
    for column in range(count):
        middle = GAP + column * (width + GAP) + width / 2
        for above, text in enumerate(reversed(headings[column])):
            draw.text((middle, head - 1 - above * line), text, INK, font, anchor="md")
        for row in range(rows):
            below = head + (row + 1) * (height + 2 * GAP) + row * line
            draw.text((middle, below), captions[row][column], INK, font, anchor="ma")
    return from_image(picture)


def broken(label: str, length: Callable[[str], float], width: float) -> list[str]:
    """A label in lines no longer than ``width``: broken between words, and inside one only where it is too long."""
    lines = [""]
    for word in label.split():
        joined = f"{lines[-1]} {word}".strip()
        if length(joined) <= width:
            lines[-1] = joined
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            lines += [""] if lines[-1] and length(lines[-1] + letter) > width else []
            lines[-1] += letter
    return lines


def reconstruct_after_each_scale(tokenizer: MultiScaleTokenizer, image_N3HW: Tensor) -> Tensor:
    """Images in [0, 1] decoded from their first 1, 2, ... K scales: (N, K, 3, H, W), on the tokenizer's device."""
    device = next(tokenizer.parameters()).device
    with evaluating(tokenizer):
        idx_NL = tokenizer.encode(image_N3HW.to(device) * 2 - 1)
        return torch.stack([to_unit(after_N3HW) for after_N3HW in tokenizer.progressive(idx_NL)], dim=1)
