"""`mvar sweep FILE`: one recipe in several variants and seeds, trained or continued, and their table."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvar_lightning.errors import UserError

if TYPE_CHECKING:
    from mvar_lightning.analysis.sweep_results import SweepResults
    from mvar_lightning.analysis.sweeps import Sweep
    from mvar_lightning.commands.runs import Run


STOPPED = (130, -signal.SIGINT, -signal.SIGTERM)
"""Exit statuses of a run that was told to stop."""


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
    from mvar_lightning.analysis.sweeps import read_sweep
    from mvar_lightning.commands.runs import RUNS

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


def _runs(sweep: Sweep, out: Path, overrides: list[str]) -> Iterator[tuple[str, int, Run]]:
    from mvar_lightning.commands.runs import run_of

    for variant in sweep.variants:
        for seed in sweep.seeds:
            folder = out / variant / f"seed{seed}"
            yield variant, seed, run_of(sweep.recipe, [*sweep.arguments(variant, seed), *overrides], folder)


def _is_finished(run: Run) -> bool:
    """Whether a run that is not asked for lies in the folder, of the same recipe and overrides."""
    from mvar_lightning.commands.runs import read_json

    stamp = run.folder / "run.json"
    return run.metrics_file.is_file() and stamp.is_file() and read_json(stamp) == run.identity()


def _check(runs: list[tuple[str, int, Run]]) -> None:
    """A mistake is told before the first run. Seeds differ in a number alone: one run of a variant stands for all."""
    from mvar_lightning.commands.lightning_cli import RecipeCheck

    seen = set()
    for variant, _, run in runs:
        if variant not in seen:
            seen.add(variant)
            try:
                RecipeCheck(["--config", str(run.recipe), *run.overrides], run.folder)
            except UserError as error:
                raise UserError(f"variant {variant}: {error}") from error


def _train_in_its_own_process(arguments: argparse.Namespace, run: Run) -> bool:
    """Whether the run came to its end. One process a run, so that its peak memory is its own.

    Raises KeyboardInterrupt where the run was told to stop: that is meant for the sweep.
    """
    imports = [word for module in arguments.modules for word in ("--import", module)]
    program = [sys.executable, "-m", "mvar_lightning.cli", *imports]
    command = [*program, "train", str(run.recipe), "--run-folder", str(run.folder)]
    fresh = ["--fresh"] if arguments.fresh else []
    status = subprocess.run([*command, *fresh, *run.overrides], check=False).returncode
    if status in STOPPED:
        raise KeyboardInterrupt(f"sweep: stopped in {run.folder}; the same command goes on")
    if status:
        print(f"sweep: the run {run.folder} failed (see above)", file=sys.stderr)
    return status == 0


def _results(sweep: Sweep, runs: list[tuple[str, int, Run]]) -> SweepResults:
    from mvar_lightning.analysis.curves import read_curves
    from mvar_lightning.analysis.sweep_results import SweepResults, SweepRun

    return SweepResults(
        sweep,
        [SweepRun(variant, seed, _report(run), read_curves(run.folder / "tensorboard")) for variant, seed, run in runs],
    )


def _report(run: Run) -> dict[str, Any]:
    from mvar_lightning.commands.runs import read_json

    report = read_json(run.metrics_file)
    if not isinstance(report, dict) or not isinstance(report.get("metrics"), dict) or "steps" not in report:
        raise UserError(f"{run.metrics_file}: is no report of a run; remove it and sweep again")
    return report


def _write(results: SweepResults, out: Path) -> None:
    """The table on screen, and ``sweep.json``, ``sweep.md``, ``sweep.png`` and ``curves.png`` in the folder."""
    from rich.console import Console
    from rich.table import Table

    from mvar_lightning.commands.runs import write_json

    head, *body = results.rows()
    table = Table()
    for number, heading in enumerate(head):
        table.add_column(heading, justify="right" if number else "left")
    for row in body:
        table.add_row(*row)
    Console(width=160).print(table)
    print(results.footnote())
    for line in results.gaps():
        print(f"sweep: {line}", file=sys.stderr)
    write_json(out / "sweep.json", results.content())
    (out / "sweep.md").write_text(results.markdown(), encoding="utf-8")
    written = ["sweep.json", "sweep.md"]
    if results.plotted:
        results.plot(out / "sweep.png")
        written.append("sweep.png")
    if results.logged_curves:
        results.plot_curves(out / "curves.png")
        written.append("curves.png")
    for name in written:
        print(f"  {out / name}")
