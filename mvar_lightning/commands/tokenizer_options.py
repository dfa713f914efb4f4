"""What `mvar evaluate tokenizer` and `mvar reconstruct` share: which tokenizer, and how images are cut."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mvar_lightning.commands.evaluation_options import add_cutting
from mvar_lightning.commands.sampling_options import side_lengths
from mvar_lightning.errors import UserError

if TYPE_CHECKING:
    from mvar_lightning.tokenizer import MultiScaleTokenizer


def add_tokenizer(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Arguments that say which tokenizer, or which ones, for which images, on which device."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        action="append" if several else "store",
        metavar="[NAME=]PATH" if several else "PATH",
        help="a run's folder, a saved folder, a Lightning checkpoint, or a released vae_ch160v4096z32.pth"
        + ("; given several times, these are compared, each under its name" if several else ""),
    )
    parser.add_argument("--image-size", type=int, metavar="N", help="side of the images (default: the tokenizer's)")
    parser.add_argument("--patch-nums", type=side_lengths, metavar="1,2,3", help="scales of a released file")
    add_cutting(parser)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: cuda where there is")


def tokenizer_of(args: argparse.Namespace, path: str) -> MultiScaleTokenizer:
    """The tokenizer of one of the checkpoints that the arguments name.

    Raises:
        UserError: no such file, one of another kind, or a tokenizer for images of another size than ``--image-size``.
    """
    tokenizer = open_tokenizer(path, args.patch_nums, args.image_size)
    size = tokenizer.image_size
    if args.image_size is not None and args.image_size != size:
        raise UserError(
            f"--image-size {args.image_size}: this tokenizer takes images of {size} x {size}; leave the option out"
        )
    return tokenizer


def open_tokenizer(
    path: str | Path, patch_nums: Sequence[int] | None = None, image_size: int | None = None
) -> MultiScaleTokenizer:
    """A tokenizer from a run's folder, any checkpoint of the suite, or a released file.

    Args:
        path: of the folder or file. Of a next-scale model's checkpoint the tokenizer in it is taken.
        patch_nums: scales of a released file, which does not tell them.
        image_size: where they are not given either, the published ones for this size (256 if not given).

    Raises:
        UserError: no such file, or one that holds no tokenizer.
    """
    from mvar_lightning.checkpoints.folder import is_released, load_tokenizer

    path = Path(path)
    if is_released(path):
        return _released(path, patch_nums, image_size)
    if patch_nums is not None:
        raise UserError("--patch-nums: only released files (.pth) need it; this checkpoint tells its own")
    return load_tokenizer(path)


def _released(path: Path, patch_nums: Sequence[int] | None, image_size: int | None) -> MultiScaleTokenizer:
    from mvar_lightning.checkpoints.official import import_tokenizer
    from mvar_lightning.pyramid import PUBLISHED_SIDES, ScalePyramid

    size = 256 if image_size is None else image_size
    if patch_nums is None and size not in PUBLISHED_SIDES:
        raise UserError(
            f"--image-size {size}: published scales are known for {', '.join(map(str, PUBLISHED_SIDES))}; "
            "give --patch-nums"
        )
    return import_tokenizer(path, ScalePyramid(patch_nums or PUBLISHED_SIDES[size]))
