"""`mvar import`: turns published files into a checkpoint folder of the suite."""

from __future__ import annotations

import argparse
from typing import Any

from mvar_lightning.commands.sampling_options import add_untold, untold_of


def add_parser(subparsers: Any) -> None:
    """Add `import` to the parser of `mvar`."""
    parser = subparsers.add_parser("import", help="turn published weights into a checkpoint folder")
    parser.add_argument("--architecture", required=True, choices=("var", "mvar", "markov_var"), help="of the file")
    parser.add_argument("--model", required=True, metavar="FILE", help="the transformer, e.g. var_d16.pth")
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="the tokenizer, vae_ch160v4096z32.pth")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new or empty folder for the checkpoint")
    add_untold(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Import, save and describe."""
    from mvar_lightning.checkpoints import import_official, save
    from mvar_lightning.commands.info import describe

    model, tokenizer = import_official(
        args.model,
        args.tokenizer,
        args.architecture,
        **untold_of(args),
    )
    save(args.out, model, tokenizer)
    print(describe(args.out))
    return 0
