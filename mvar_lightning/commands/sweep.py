"""`mvar sweep FILE`: one recipe in several variants and seeds, trained or continued, and their table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvar_lightning.errors import UserError
from mvar_lightning.runs.sweep import _check, _is_finished, _runs, _train_in_its_own_process
from mvar_lightning.runs.sweep_results import _results, _write

if TYPE_CHECKING:
    pass


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "sweep",
        help="train the variants of a recipe and tabulate them",
        description="Finished runs are kept, broken ones continued; a run that fails does not keep the others from "
        "their place in the table. Other arguments override the recipe in every run.",
    )
    parser.add_argument("sweep", metavar="FILE", help="a YAML file under recipes/ablations/")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: runs/sweeps/ and the file's name)")
    parser.add_argument(
        "--only",
        metavar="VARIANT",
        nargs="+",
        help="train these variants alone; the table keeps the finished runs of the others",
    )
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs of this sweep")
    parser.set_defaults(run=run_sweep, takes_overrides=True)


def run_sweep(arguments: argparse.Namespace) -> int:
    from mvar_lightning.runs.run import RUNS
    from mvar_lightning.runs.sweep import read_sweep

    sweep = read_sweep(arguments.sweep)
    if unknown := set(arguments.only or ()) - set(sweep.variants):
        raise UserError(f"--only {min(unknown)}: no such variant; this sweep has {', '.join(sweep.variants)}")
    out = Path(arguments.out or RUNS / "sweeps" / Path(arguments.sweep).stem)
    planned = list(_runs(sweep, out, arguments.overrides))
    runs = [entry for entry in planned if not arguments.only or entry[0] in arguments.only]
    _check(runs)
    failed = [run for _, _, run in runs if not _train_in_its_own_process(arguments, run)]
    if len(failed) == len(runs):
        raise UserError(f"sweep: none of the {len(runs)} runs came to its end (see above); mend them and sweep again")
    kept = [entry for entry in planned if (entry[2] not in failed if entry in runs else _is_finished(entry[2]))]
    _write(_results(sweep, kept), out)
    if failed:
        names = ", ".join(str(run.folder) for run in failed)
        raise UserError(
            f"sweep: {len(failed)} of {len(runs)} runs failed (see above): {names}; the table is of the others; "
            "mend them and sweep again"
        )
    return 0
