"""`mvar reconstruct`: images through a tokenizer, after each scale, or through several side by side, as one picture.

N images, HW pixels.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvar_lightning.commands.options import add_tokenizer, check_counts, tokenizer_of
from mvar_lightning.errors import UserError
from mvar_lightning.evaluation.features import data_of
from mvar_lightning.runs.recipe import settle_cutting
from mvar_lightning.tools.files import check_folder

if TYPE_CHECKING:
    from torch import Tensor

    from mvar_lightning.data.transforms import Transform
    from mvar_lightning.tokenizer import MultiScaleTokenizer

NUM_IMAGES = 8
"""Of a shard folder, where nothing else is said."""


def add_parser(subparsers: Any) -> None:
    """Add `reconstruct` to the parser of `mvar`."""
    parser = subparsers.add_parser(
        "reconstruct",
        help="show images after each scale of a tokenizer, or those of several tokenizers side by side",
        description="One row an image: after each scale of a tokenizer, or, where --checkpoint is given several times, "
        "the image and each tokenizer's reconstruction, with the PSNR below.",
    )
    add_tokenizer(parser, several=True)
    parser.add_argument("files", nargs="*", metavar="IMAGE", help="JPEG, PNG or WebP; a row of the picture each")
    parser.add_argument("--data", metavar="SHARDS", help="take validation images of a shard folder instead")
    parser.add_argument("--images", type=int, metavar="N", help=f"the first N of --data ({NUM_IMAGES})")
    parser.add_argument("--out", default="strip.png", metavar="FILE", help="a PNG (strip.png)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the picture and say where it is."""
    from mvar_lightning.tools.compute import choose_device
    from mvar_lightning.tools.drawing import to_png

    _check(args)
    device = choose_device(args.device)
    tokenizers = {name: tokenizer_of(args, path).to(device) for name, path in args.checkpoint.items()}
    side = _common_side(tokenizers)
    _settle_cutting(args)
    image_N3HW, enlarged = _images(args, side)
    picture_3HW, told = _picture(tokenizers, image_N3HW)
    to_png(picture_3HW, Path(args.out))
    print(f"{args.out}: {len(image_N3HW)} images {told}")
    if enlarged:
        print(f"Images of less than {side} pixels were enlarged: the figures are of blurred images.")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Turns --checkpoint into names and paths, too."""
    out = Path(args.out)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: give a name that ends in .png")
    if out.is_dir():
        raise UserError(f"--out {args.out}: is a folder; give the name of a file")
    if bool(args.files) == (args.data is not None):
        raise UserError("reconstruct: give either files of images or --data SHARDS")
    if args.images is not None and args.data is None:
        raise UserError(f"--images {args.images}: counts images of --data; leave it out, or give --data SHARDS")
    check_counts(args, "images")
    check_folder(out.parent)
    named = [named_path(text) for text in args.checkpoint]
    args.checkpoint = dict(named)
    if len(args.checkpoint) < len(named):
        twice = next(name for name, _ in named if [other for other, _ in named].count(name) > 1)
        raise UserError(f"--checkpoint: two are called {twice}; give each a name of its own, as NAME=PATH")


def named_path(text: str) -> tuple[str, str]:
    """Name and path of ``NAME=PATH``; of a bare path its last part is the name."""
    name, sign, path = text.partition("=")
    if sign and name and path and "/" not in name and not Path(text).exists():
        return name, path
    return Path(text).name or text, text


def _common_side(tokenizers: dict[str, MultiScaleTokenizer]) -> int:
    sides = {name: tokenizer.image_size for name, tokenizer in tokenizers.items()}
    (first, side), *others = sides.items()
    for name, other in others:
        if other != side:
            raise UserError(
                f"--checkpoint {name}: takes images of {other} x {other}, {first} of {side} x {side}; "
                "compare tokenizers for one size"
            )
    return side


def _settle_cutting(args: argparse.Namespace) -> None:
    """One cutting for all: each image is cut once. Raises UserError where runs differ and no option decides."""
    cuts: dict[str, argparse.Namespace] = {}
    for path in args.checkpoint.values():
        cuts[path] = argparse.Namespace(resize_ratio=args.resize_ratio, crop=args.crop)
        settle_cutting(cuts[path], path, matters=len(cuts) == 1)
    (first, cut), *others = cuts.items()
    for path, other in others:
        if other != cut:
            raise UserError(
                f"--checkpoint {path}: cuts images with --resize-ratio {other.resize_ratio} --crop {other.crop}, "
                f"{first} with --resize-ratio {cut.resize_ratio} --crop {cut.crop}; give both options"
            )
    args.resize_ratio, args.crop = cut.resize_ratio, cut.crop


def _images(args: argparse.Namespace, side: int) -> tuple[Tensor, bool]:
    """Images in [0, 1], and whether one was smaller than that."""
    import torch

    from mvar_lightning.data.reading.loader import loading
    from mvar_lightning.data.transforms import build_transform
    from mvar_lightning.evaluation.image_sources import SizeWatch
    from mvar_lightning.tools.drawing import to_unit

    if args.data is None:
        watch = SizeWatch(build_transform(args.crop, side, args.resize_ratio), side)
        return torch.cat([read_image(path, watch) for path in args.files]), watch.enlarged
    wanted = args.batch_size = args.images or NUM_IMAGES
    data = data_of(args, side, "val")
    watch = data.val_transform = SizeWatch(data.val_transform, side)
    found: list[Tensor] = []
    with loading(data.ordered_dataloader("val")) as batches:
        for batch in batches:
            found.append(to_unit(batch["image"]))
            if sum(map(len, found)) >= wanted:
                break
    return torch.cat(found)[:wanted], watch.enlarged


def _picture(tokenizers: dict[str, MultiScaleTokenizer], image_N3HW: Tensor) -> tuple[Tensor, str]:
    """The picture (3, H, W) in [0, 1], and what it shows of the images, in words."""
    import torch

    from mvar_lightning.evaluation.strips import comparison_picture, progressive_picture, reconstruct_after_each_scale

    after = {
        name: torch.cat([reconstruct_after_each_scale(tokenizer, one).cpu() for one in image_N3HW.split(1)])
        for name, tokenizer in tokenizers.items()
    }
    if len(after) > 1:
        last = {name: after_NK3HW[:, -1] for name, after_NK3HW in after.items()}
        return comparison_picture(image_N3HW, last), f"beside those of {', '.join(after)}"
    ((name, after_NK3HW),) = after.items()
    pyramid = tokenizers[name].pyramid
    return progressive_picture(image_N3HW, after_NK3HW, pyramid.sides), f"after each of {pyramid.num_scales} scales"


def read_image(path: str, transform: Transform) -> Tensor:
    """One picture, cut as validation does: (1, 3, S, S) in [0, 1]. Raises UserError where it is none."""
    import random

    from mvar_lightning.data.images import ImageError, decode_rgb
    from mvar_lightning.data.transforms import to_batch

    try:
        picture = transform(decode_rgb(Path(path).read_bytes()), random.Random(0))
    except OSError as error:
        raise UserError(f"image {path}: cannot be read ({error.strerror})") from error
    except ImageError as error:
        raise UserError(f"image {path}: {error}") from error
    return (to_batch([picture]) + 1) / 2
