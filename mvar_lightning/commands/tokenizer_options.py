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


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    """Arguments that say which tokenizer, for which images, on which device."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="a run's folder, a saved folder, a Lightning checkpoint, or a released vae_ch160v4096z32.pth",
    )
    parser.add_argument("--image-size", type=int, metavar="N", help="side of the images (default: the tokenizer's)")
    parser.add_argument("--patch-nums", type=side_lengths, metavar="1,2,3", help="scales of a released file")
    add_cutting(parser)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: cuda where there is")


def tokenizer_of(args: argparse.Namespace) -> MultiScaleTokenizer:
    """The tokenizer that the arguments name.

    Raises:
        UserError: no such file, one of another kind, or a tokenizer for images of another size than ``--image-size``.
    """
    tokenizer = open_tokenizer(args.checkpoint, args.patch_nums, args.image_size)
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
    from mvar_lightning.checkpoints.folder import load_tokenizer

    path = Path(path)
    if path.suffix in (".pth", ".safetensors") and not path.is_dir():
        return _released(path, patch_nums, image_size)
    if patch_nums is not None:
        raise UserError("--patch-nums: only released files (.pth, .safetensors) need it; this checkpoint tells its own")
    run = path / "model"
    return load_tokenizer(run if (run / "config.json").is_file() else path)


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
