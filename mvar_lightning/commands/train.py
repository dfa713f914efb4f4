"""`mvar train RECIPE`: from data to report, reusing what exists; `mvar fit`, `validate`, `test`: one stage alone."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from mvar_lightning.errors import UserError

STAGES = {
    "fit": "train a recipe (--config FILE, overrides such as --model.depth=8)",
    "validate": "validate a checkpoint under a recipe, with its metrics and pictures",
    "test": "the same on the test stage",
}


def add_parser(subparsers: Any) -> None:
    """Add `train` and the stages to the parser of `mvar`."""
    parser = subparsers.add_parser(
        "train",
        help="run a recipe from data to report (what `make train` calls)",
        description="Prepare data and tokenizer, train, validate, report. Other arguments override the recipe.",
    )
    parser.add_argument("recipe", help="a YAML file under recipes/")
    parser.add_argument("--data", metavar="DIR", help="shard folder to train on instead of the recipe's")
    parser.add_argument("--run-folder", metavar="DIR", help="where to write (default: runs/ and the recipe's name)")
    parser.add_argument("--fresh", action="store_true", help="forget an earlier run in the same folder")
    words = "two steps of everything in a folder that is removed: says peak memory, seconds, and what a whole run takes"
    parser.add_argument("--rehearse", action="store_true", help=words)
    parser.set_defaults(run=run_train, takes_overrides=True)
    for stage, help_text in STAGES.items():
        parser = subparsers.add_parser(stage, help=help_text, description=help_text)
        words = "recipe (YAML); given again, a file whose settings replace the recipe's"
        parser.add_argument("-c", "--config", metavar="FILE", action="append", default=[], help=words)
        words = "Lightning checkpoint to resume from or to evaluate"
        parser.add_argument("--ckpt-path", "--ckpt_path", metavar="FILE", help=words)
        parser.add_argument("--run-folder", metavar="DIR", help="where to write (default: runs/ and the recipe's name)")
        parser.add_argument("--options", action="store_true", help="list everything a recipe can set")
        parser.set_defaults(run=partial(run_stage, stage), takes_overrides=True)


def run_train(args: argparse.Namespace) -> int:
    """Train what is missing; prints the report."""
    from mvar_lightning.runs.train import print_report, train
    from mvar_lightning.tools.processes import is_main

    data = [] if args.data is None else [f"--data.path={args.data}"]
    if args.rehearse:
        from mvar_lightning.runs.rehearse import rehearse
        from mvar_lightning.tools.console import print_table

        rows = rehearse(args.recipe, [*args.overrides, *data], args.run_folder)
        if is_main():
            print_table(rows, title=f"rehearsal of {args.recipe}")
        return 0
    run = train(args.recipe, [*args.overrides, *data], args.run_folder, args.fresh)
    if is_main():
        print_report(run)
    return 0


def run_stage(stage: str, args: argparse.Namespace) -> int:
    """One stage of one recipe, as Lightning runs it."""
    from mvar_lightning.runs import train

    if args.options:
        train.list_options(args.config[0] if args.config else None)
    elif not args.config:
        raise UserError(f"mvar {stage}: --config is missing; name a recipe, for example recipes/var/digits.yaml")
    else:
        recipe, *others = args.config
        overrides = [*(f"--config={other}" for other in others), *args.overrides]
        train.run_stage(stage, recipe, overrides, args.ckpt_path, args.run_folder)
    return 0
