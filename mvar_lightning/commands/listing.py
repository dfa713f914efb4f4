"""`mvar runs`: which run is which; `mvar recipe new`: recipes for one's own data."""

from __future__ import annotations

import argparse
from typing import Any

from mvar_lightning.commands.options import image_size

HEAD = ["run", "overrides", "step", "state", "figures", "age"]


def add_parser(subparsers: Any) -> None:
    """Add `runs` and `recipe` to the parser of `mvar`."""
    parser = subparsers.add_parser("runs", help="list runs: overrides, step, state, key figures, age")
    parser.add_argument("folder", nargs="?", default="runs", metavar="FOLDER", help="where they are (runs)")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    parser.set_defaults(run=run_list)
    recipe = subparsers.add_parser("recipe", help="write recipes for a data set: mvar recipe new")
    actions = recipe.add_subparsers(metavar="ACTION", required=True)
    new = actions.add_parser("new", help="a tokenizer's and a model's recipe that fit a shard folder")
    new.add_argument("--data", required=True, metavar="FOLDER", help="shards, as `mvar shards make` writes them")
    new.add_argument(
        "--size", required=True, type=image_size, metavar="N", help="side of the images in pixels, or 16x32"
    )
    new.add_argument("--model", default="mvar", metavar="var|mvar|markov_var", help="whose recipe (mvar)")
    new.add_argument("--out", metavar="FOLDER", help="where to write (recipes/ and the data set's name)")
    new.set_defaults(run=run_new)


def run_list(args: argparse.Namespace) -> int:
    """Print the table, or JSON."""
    import json

    from mvar_lightning.runs.listing import list_runs
    from mvar_lightning.tools.console import print_table

    runs = list_runs(args.folder)
    if args.json:
        print(json.dumps([run.plain() for run in runs], indent=2))
    elif runs:
        print_table([run.row() for run in runs], HEAD)
    else:
        print(f"{args.folder}: no runs")
    return 0


def run_new(args: argparse.Namespace) -> int:
    """Write both recipes and say how to go on."""
    from mvar_lightning.runs.new_recipe import write_recipes

    tokenizer, model = write_recipes(args.data, args.size, args.model, args.out)
    print(f"wrote {tokenizer} and {model}; what they take: mvar plan {model}; to train both: mvar train {model}")
    return 0
