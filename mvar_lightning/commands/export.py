"""`mvar export`: writes a checkpoint under the names of the published models."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add `export` to the parser of `mvar`."""
    parser = subparsers.add_parser("export", help="write a checkpoint under the names of the published models")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's folder, a saved folder, or a Lightning .ckpt")
    parser.add_argument(
        "--model", required=True, metavar="FILE", help="where the transformer goes (.pth, .safetensors)"
    )
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="where the tokenizer goes")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export both files."""
    from mvar_lightning.checkpoints import export_official, load
    from mvar_lightning.errors import UserError

    model, tokenizer = load(args.checkpoint)
    if model is None:
        raise UserError(f"{args.checkpoint}: a checkpoint of a tokenizer alone; there is no transformer to export")
    export_official(model, tokenizer, args.model, args.tokenizer)
    print(f"wrote {args.model} and {args.tokenizer}")
    return 0
