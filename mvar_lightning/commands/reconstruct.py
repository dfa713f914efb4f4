"""`mvar reconstruct`: images of one's own through a tokenizer, after each scale, as one picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvar_lightning.commands.tokenizer_options import add_tokenizer, tokenizer_of
from mvar_lightning.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from mvar_lightning.data.transforms import Transform


def add_parser(subparsers: Any) -> None:
    """Add `reconstruct` to the parser of `mvar`."""
    parser = subparsers.add_parser("reconstruct", help="show images of your own after each scale of a tokenizer")
    add_tokenizer(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="JPEG, PNG or WebP; a row of the picture each")
    parser.add_argument("--out", default="strip.png", metavar="FILE", help="a PNG (strip.png)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the picture and say where it is."""
    import torch

    from mvar_lightning.analysis.size_watch import SizeWatch
    from mvar_lightning.analysis.strips import progressive_picture, reconstruct_after_each_scale
    from mvar_lightning.callbacks.pictures import to_png
    from mvar_lightning.commands.sampling_options import choose_device
    from mvar_lightning.data.transforms import build_transform

    if Path(args.out).suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: give a name that ends in .png")
    device = choose_device(args.device)
    tokenizer = tokenizer_of(args).to(device)
    transform = SizeWatch(build_transform(args.crop, tokenizer.image_size, args.resize_ratio), tokenizer.image_size)
    image_N3HW = torch.cat([read_image(path, transform) for path in args.images])
    after_NK3HW = torch.cat(
        [reconstruct_after_each_scale(tokenizer, one.to(device)).cpu() for one in image_N3HW.split(1)]
    )
    to_png(progressive_picture(image_N3HW, after_NK3HW, tokenizer.pyramid.sides), Path(args.out))
    print(f"{args.out}: {len(image_N3HW)} images after each of {tokenizer.pyramid.num_scales} scales")
    if transform.enlarged:
        print(f"Images of less than {tokenizer.image_size} pixels were enlarged: the figures are of blurred images.")
    return 0


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
