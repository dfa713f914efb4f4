"""Reconstructions as one picture: an image after each scale, or by each of several tokenizers, with the PSNR below.

N images, K scales, HW pixels; picture_3HW is one RGB picture in [0, 1].
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mvar_lightning.checkpoints.source import open_tokenizer
from mvar_lightning.data.images import ImageError, decode, form_of
from mvar_lightning.data.reading.loader import loading
from mvar_lightning.data.transforms import Transform, build_transform, to_batch
from mvar_lightning.errors import UserError, check_counts
from mvar_lightning.evaluation.image_sources import SizeWatch, open_data
from mvar_lightning.metrics.quality import psnr
from mvar_lightning.pyramid import Scales, Size, times
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.tools.compute import choose_device, evaluating
from mvar_lightning.tools.drawing import labeled_rows, to_png, to_unit
from mvar_lightning.tools.files import check_folder


def progressive_picture(original_N3HW: Tensor, after_NK3HW: Tensor, sides: Sequence[Size]) -> Tensor:
    """One row an image: after each scale, coarse on the left, and the original at the right end.

    Args:
        original_N3HW: the images, in [0, 1].
        after_NK3HW: the same decoded from the first 1, 2, ... K scales, in [0, 1].
        sides: of the K token maps, the labels of the columns.
    """
    rows_RN3HW = torch.cat([after_NK3HW, original_N3HW[:, None]], dim=1)
    labels = [*map(times, sides), "original"]
    captions = [[*row, ""] for row in _decibel(original_N3HW, after_NK3HW)]
    return labeled_rows(rows_RN3HW, labels, captions)


def comparison_picture(original_N3HW: Tensor, again_N3HW: Mapping[str, Tensor]) -> Tensor:
    """One row an image: the original, and what each of several tokenizers makes of it.

    Args:
        original_N3HW: the images, in [0, 1].
        again_N3HW: the same reconstructed, in [0, 1], by the name above the column.
    """
    again_NR3HW = torch.stack([*again_N3HW.values()], dim=1)
    rows_NR3HW = torch.cat([original_N3HW[:, None], again_NR3HW], dim=1)
    captions = [["", *row] for row in _decibel(original_N3HW, again_NR3HW)]
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


# The whole of it, from paths to a picture.

NUM_IMAGES = 8
"""Of a shard folder, where nothing else is said."""


@dataclass(frozen=True)
class ReconstructRequest:
    """Which images through which tokenizers, and where the picture goes.

    Args:
        checkpoints: path of each tokenizer by the name above its column; of a single one each scale has a column.
        files: of pictures; or
        data: shard folder, the first ``images`` validation images of which are taken.
        images: how many; 8 if not given.
        out: a PNG.
        image_size, patch_nums: what a released file does not tell (see `open_tokenizer`).
        resize_ratio, crop: how images are cut (`runs.run.settle_cutting` tells how a run's were).
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UserError: both or none of files and data, no PNG, or a folder that cannot be written.
    """

    checkpoints: Mapping[str, str]
    files: Sequence[str] = ()
    data: str | None = None
    images: int | None = None
    out: str | Path = "strip.png"
    image_size: Size | None = None
    patch_nums: Scales | None = None
    resize_ratio: float = 1.125
    crop: str = "center"
    device: str = "auto"

    def __post_init__(self) -> None:
        out = Path(self.out)
        if out.suffix.lower() != ".png":
            raise UserError(f"``out`` {self.out}: give a name that ends in .png")
        if out.is_dir():
            raise UserError(f"``out`` {self.out}: is a folder; give the name of a file")
        if bool(self.files) == (self.data is not None):
            raise UserError("reconstruct: give either files of images or ``data`` SHARDS")
        if self.images is not None and self.data is None:
            raise UserError(
                f"``images`` {self.images}: counts images of ``data``; leave it out, or give ``data`` SHARDS"
            )
        if out.resolve() in [Path(file).resolve() for file in self.files]:
            raise UserError(f"``out`` {self.out}: is one of the images; give another name")
        check_counts(images=self.images)
        check_folder(out.parent, "``out``")


class Reconstructed(NamedTuple):
    """What the picture shows: how many images, of what in words, and whether some had to be enlarged to this size."""

    images: int
    shown: str
    side: Size
    enlarged: bool


def reconstruct_images(request: ReconstructRequest) -> Reconstructed:
    """Write one picture, a row for each image: after each scale of a tokenizer, or by each of several.

    Raises:
        UserError: a file that is no image, or tokenizers for images of different sizes.
    """
    device = choose_device(request.device)
    tokenizers = {
        name: open_tokenizer(path, request.patch_nums, request.image_size).to(device)
        for name, path in request.checkpoints.items()
    }
    (first, side), *others = ((name, tokenizer.image_size) for name, tokenizer in tokenizers.items())
    for name, other in others:
        if other != side:
            raise UserError(
                f"``checkpoint`` {name}: takes images of {times(other)}, {first} of {times(side)}; "
                "compare tokenizers for one size"
            )
    channels = {tokenizer.image_channels for tokenizer in tokenizers.values()}
    if len(channels) > 1:
        raise UserError(
            f"``checkpoint``: images of {' and '.join(map(str, sorted(channels)))} channels; compare tokenizers for "
            "one kind of images"
        )
    image_N3HW, enlarged = _images(request, side, channels.pop())
    after = {
        name: torch.cat([reconstruct_after_each_scale(tokenizer, one).cpu() for one in image_N3HW.split(1)])
        for name, tokenizer in tokenizers.items()
    }
    if len(after) > 1:
        last = {name: after_NK3HW[:, -1] for name, after_NK3HW in after.items()}
        picture_3HW, shown = comparison_picture(image_N3HW, last), f"beside those of {', '.join(after)}"
    else:
        ((name, after_NK3HW),) = after.items()
        pyramid = tokenizers[name].pyramid
        picture_3HW = progressive_picture(image_N3HW, after_NK3HW, pyramid.sides)
        shown = f"after each of {pyramid.num_scales} scales"
    to_png(picture_3HW, Path(request.out))
    return Reconstructed(len(image_N3HW), shown, side, enlarged)


def _images(request: ReconstructRequest, side: Size, channels: int) -> tuple[Tensor, bool]:
    """Images in [0, 1], and whether one was smaller than that."""
    if request.data is None:
        watch = SizeWatch(build_transform(request.crop, side, request.resize_ratio), side)
        return torch.cat([_read_image(path, watch, channels) for path in request.files]), watch.enlarged
    wanted = request.images or NUM_IMAGES
    data = open_data(request.data, side, "val", wanted, request.resize_ratio, request.crop, channels=channels)
    watch = data.val_transform = SizeWatch(data.val_transform, side)
    found: list[Tensor] = []
    with loading(data.ordered_dataloader("val")) as batches:
        for batch in batches:
            found.append(to_unit(batch["image"]))
            if sum(map(len, found)) >= wanted:
                break
    return torch.cat(found)[:wanted], watch.enlarged


def _read_image(path: str, transform: Transform, channels: int) -> Tensor:
    """One picture, cut as validation does: (1, 3, S, S) in [0, 1]. Raises UserError where it is none."""
    try:
        data = Path(path).read_bytes()
        picture = transform(decode(data, form_of(data, channels)), random.Random(0))
    except OSError as error:
        raise UserError(f"image {path}: cannot be read ({error.strerror})") from error
    except ImageError as error:
        raise UserError(f"image {path}: {error}") from error
    return to_unit(to_batch([picture]))
