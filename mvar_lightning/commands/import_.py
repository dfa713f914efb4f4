"""`mvar import`: turns published files into a checkpoint folder of the suite."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add `import` to the parser of `mvar`."""
    parser = subparsers.add_parser("import", help="turn published weights into a checkpoint folder")
    parser.add_argument("--architecture", required=True, choices=("var", "mvar", "markov_var"), help="of the file")
    parser.add_argument("--model", required=True, metavar="FILE", help="the transformer, e.g. var_d16.pth")
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="the tokenizer, vae_ch160v4096z32.pth")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new or empty folder for the checkpoint")
    parser.add_argument(
        "--patch-nums", type=side_lengths, metavar="1,2,3", help="scales (known for 680, 2240 and 9451 tokens)"
    )
    parser.add_argument("--kernel-size", type=int, default=7, help="MVAR's neighborhood (7)")
    parser.add_argument(
        "--first-neighborhood-scale",
        type=int,
        metavar="N",
        help="MVAR's first scale with a neighborhood, counted from 0 (default: the last but one)",
    )
    parser.set_defaults(run=run)


def side_lengths(text: str) -> tuple[int, ...]:
    """Side lengths from a list like 1,2,3."""
    try:
        return tuple(int(part) for part in text.replace(" ", "").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers with commas between them, like 1,2,3") from None


def run(args: argparse.Namespace) -> int:
    """Import, save and describe."""
    from mvar_lightning.checkpoints import import_official, save
    from mvar_lightning.commands.info import describe

    model, tokenizer = import_official(
        args.model,
        args.tokenizer,
        args.architecture,
        patch_nums=args.patch_nums,
        kernel_size=args.kernel_size,
        first_neighborhood_scale=args.first_neighborhood_scale,
    )
    save(args.out, model, tokenizer)
    print(describe(args.out))
    return 0
