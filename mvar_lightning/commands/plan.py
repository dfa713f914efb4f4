"""`mvar plan RECIPE`: memory, steps, disk and files of a recipe before anything is trained."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add `plan` to the parser of `mvar`."""
    parser = subparsers.add_parser(
        "plan",
        help="what a recipe will take: memory by part, steps, disk, files; and whether it fits a card",
        description="Needs no data, no weights and no GPU. Other arguments override the recipe.",
    )
    parser.add_argument("recipe", help="a YAML file under recipes/")
    parser.add_argument("--card", metavar="80GB", help="memory of a device (default: what the recipe's header names)")
    parser.set_defaults(run=run_plan, takes_overrides=True)


def run_plan(args: argparse.Namespace) -> int:
    """Print the table; 2 where the recipe does not fit."""
    from mvar_lightning.runs.plan import plan
    from mvar_lightning.runs.recipe import RecipeCheck
    from mvar_lightning.tools.console import print_table

    found = plan(RecipeCheck.of(args.recipe, args.overrides), args.card)
    print_table(found.rows(), title=str(args.recipe))
    found.check()
    return 0
