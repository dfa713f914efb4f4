"""A sweep: one recipe in several variants and seeds, each trained in a process of its own, and their table."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mvar_lightning.errors import UserError
from mvar_lightning.runs.recipe_check import check_recipe
from mvar_lightning.runs.run import DAMAGED, RUNS, Run, run_of
from mvar_lightning.runs.sweep_file import Sweep, read_sweep
from mvar_lightning.runs.sweep_results import SweepResults, read_run, write_results
from mvar_lightning.tools.files import read_json

STOPPED = (130, -signal.SIGINT, -signal.SIGTERM)
"""Exit statuses of a run that was told to stop."""


@dataclass(frozen=True)
class SweepRequest:
    """Which sweep, and where it goes.

    Args:
        sweep: a YAML file, such as those under recipes/ablations/.
        out: where to write; ``runs/sweeps/`` and the file's name if not given.
        only: train these variants alone; the table keeps the finished runs of the others.
        fresh: forget earlier runs of this sweep.
        overrides: settings of every run, as ``--model.depth=8``.
        modules: to be imported first, for classes of one's own.
    """

    sweep: str | Path
    out: str | Path | None = None
    only: Sequence[str] = ()
    fresh: bool = False
    overrides: Sequence[str] = ()
    modules: Sequence[str] = ()


class PlannedRun(NamedTuple):
    """One run of a sweep: which variant, which seed, where it lies."""

    variant: str
    seed: int
    run: Run

    def is_finished(self) -> bool:
        """Whether the folder holds a finished run of the same recipe and overrides."""
        stamp = self.run.stamp
        return self.run.metrics_file.is_file() and stamp.is_file() and read_json(stamp, DAMAGED) == self.run.identity()


def run_sweep(request: SweepRequest) -> SweepResults:
    """Train the variants that are not finished, and write the table and pictures of all of them.

    Finished runs are kept, broken ones continued; a run that fails does not keep the others from the table.

    Raises:
        UserError: a mistake in the sweep, told before the first run; or runs that failed, told after the table.
        KeyboardInterrupt: a run was told to stop, which is meant for the sweep.
    """
    sweep = read_sweep(request.sweep)
    if unknown := set(request.only) - set(sweep.variants):
        raise UserError(f"``only`` {min(unknown)}: no such variant; this sweep has {', '.join(sweep.variants)}")
    out = Path(request.out or RUNS / "sweeps" / Path(request.sweep).stem)
    planned = list(planned_runs(sweep, out, request.overrides))
    wanted = [entry for entry in planned if not request.only or entry.variant in request.only]
    check_runs(wanted)
    failed = [entry for entry in wanted if not _train(request, entry.run)]
    if len(failed) == len(wanted):
        raise UserError(f"sweep: none of the {len(wanted)} runs came to its end (see above); mend them and sweep again")
    done = [entry for entry in planned if (entry not in failed if entry in wanted else entry.is_finished())]
    results = SweepResults(sweep, [read_run(entry.variant, entry.seed, entry.run) for entry in done])
    write_results(results, out)
    if failed:
        names = ", ".join(str(entry.run.folder) for entry in failed)
        raise UserError(
            f"sweep: {len(failed)} of {len(wanted)} runs failed (see above): {names}; the table is of the others; "
            "mend them and sweep again"
        )
    return results


def planned_runs(sweep: Sweep, out: Path, overrides: Sequence[str] = ()) -> Iterator[PlannedRun]:
    """Every variant with every seed, in the order of the file."""
    for variant in sweep.variants:
        for seed in sweep.seeds:
            folder = out / variant / f"seed{seed}"
            run = run_of(sweep.recipe, [*sweep.arguments(variant, seed), *overrides], folder)
            yield PlannedRun(variant, seed, run)


def check_runs(runs: Sequence[PlannedRun]) -> None:
    """A mistake is told before the first run. Seeds differ in a number alone: one run of a variant stands for all."""
    for variant, run in {entry.variant: entry.run for entry in runs}.items():
        try:
            check_recipe(run)
        except UserError as error:
            raise UserError(f"variant {variant}: {error}") from error


def _train(request: SweepRequest, run: Run) -> bool:
    """Whether the run came to its end. One process a run, so that its peak memory is its own."""
    imports = [word for module in request.modules for word in ("--import", module)]
    program = [sys.executable, "-m", "mvar_lightning.cli", *imports]
    command = [*program, "train", str(run.recipe), "--run-folder", str(run.folder)]
    fresh = ["--fresh"] if request.fresh else []
    status = subprocess.run([*command, *fresh, *run.overrides], check=False).returncode
    if status in STOPPED:
        raise KeyboardInterrupt(f"sweep: stopped in {run.folder}; the same command goes on")
    if status:
        print(f"sweep: the run {run.folder} failed (see above)", file=sys.stderr)
    return status == 0
