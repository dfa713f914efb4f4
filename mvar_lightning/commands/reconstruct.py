"""`mvar reconstruct`: images through a tokenizer, after each scale, or through several side by side, as one picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mvar_lightning.commands import options
from mvar_lightning.errors import UserError


def add_parser(subparsers: Any) -> None:
    """Add `reconstruct` to the parser of `mvar`."""
    parser = subparsers.add_parser(
        "reconstruct",
        help="show images after each scale of a tokenizer, or those of several tokenizers side by side",
        description="One row an image: after each scale of a tokenizer, or, where --checkpoint is given several times, "
        "the image and each tokenizer's reconstruction, with the PSNR below.",
    )
    options.add_tokenizer(parser, several=True)
    parser.add_argument("files", nargs="*", metavar="IMAGE", help="JPEG, PNG or WebP; a row of the picture each")
    parser.add_argument("--data", metavar="SHARDS", help="take validation images of a shard folder instead")
    parser.add_argument("--images", type=int, metavar="N", help="the first N of --data (8)")
    parser.add_argument("--out", default="strip.png", metavar="FILE", help="a PNG (strip.png)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the picture and say where it is."""
    from mvar_lightning.evaluation.strips import ReconstructRequest, reconstruct_images
    from mvar_lightning.pyramid import short
    from mvar_lightning.runs.run import settle_cutting

    names = options.chosen(args, "files data images out image_size patch_nums device")
    checkpoints = named_checkpoints(args.checkpoint)
    ReconstructRequest(checkpoints, **names)  # its mistakes come before what runs say of their images
    cutting = settle_cutting(list(checkpoints.values()), args.resize_ratio, args.crop)
    made = reconstruct_images(ReconstructRequest(checkpoints, **names, **cutting._asdict()))
    print(f"{args.out}: {made.images} images {made.shown}")
    if made.enlarged:
        print(f"Images of less than {short(made.side)} pixels were enlarged: the figures are of blurred images.")
    return 0


def named_checkpoints(texts: list[str]) -> dict[str, str]:
    """Paths by name. Raises `UserError` where two have the same one."""
    named = [named_path(text) for text in texts]
    names = [name for name, _ in named]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--checkpoint: two are called {twice[0]}; give each a name of its own, as NAME=PATH")
    return dict(named)


def named_path(text: str) -> tuple[str, str]:
    """Name and path of ``NAME=PATH``; of a bare path its last part is the name."""
    name, sign, path = text.partition("=")
    if sign and name and path and "/" not in name and not Path(text).exists():
        return name, path
    return Path(text).name or text, text
