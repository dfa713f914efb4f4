"""`mvar sweep FILE`: one recipe in several variants and seeds, trained or continued, and their table."""

from __future__ import annotations

import argparse
from typing import Any

from mvar_lightning.commands import options


def add_parser(subparsers: Any) -> None:
    """Add `sweep` to the parser of `mvar`."""
    parser = subparsers.add_parser(
        "sweep",
        help="train the variants of a recipe and tabulate them",
        description="Finished runs are kept, broken ones continued; a run that fails does not keep the others from "
        "their place in the table. Other arguments override the recipe in every run.",
    )
    parser.add_argument("sweep", metavar="FILE", help="a YAML file under recipes/ablations/")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: runs/sweeps/ and the file's name)")
    words = "train these variants alone; the table keeps the finished runs of the others"
    parser.add_argument("--only", metavar="VARIANT", nargs="+", default=(), help=words)
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs of this sweep")
    words = "keep each finished run's numbers here, and train none that is here; the table is written there"
    parser.add_argument("--keep", metavar="DIR", help=words)
    words = "train nothing: draw the table and pictures of what is finished"
    parser.add_argument("--draw", action="store_true", help=words)
    parser.set_defaults(run=run, takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Train what is missing; prints the table and where it is."""
    from mvar_lightning.runs.sweep import SweepRequest, run_sweep

    run_sweep(SweepRequest(**options.chosen(args, "sweep out only fresh keep draw overrides modules")))
    return 0
