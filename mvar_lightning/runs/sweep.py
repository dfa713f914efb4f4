"""A sweep: a file that names a recipe, variants and seeds; each run is trained in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from mvar_lightning.errors import UserError
from mvar_lightning.runs.recipe_check import check_quickly
from mvar_lightning.runs.recipe_files import recipe_file
from mvar_lightning.runs.run import RUNS, Run, run_of
from mvar_lightning.runs.sweep_kept import KeptRuns
from mvar_lightning.runs.sweep_results import Column, Sweep, SweepResults, read_run, write_results

MISSING = "sweep {name}: cannot be read (No such file or directory); see recipes/ablations/"

STOPPED = (130, -signal.SIGINT, -signal.SIGTERM)
"""Exit statuses of a run that was told to stop."""

LARGEST_SEED = 2**32 - 1
"""Of Lightning's seed_everything, which refuses others, at the start of each run."""


@dataclass(frozen=True)
class SweepRequest:
    """Which sweep, and where it goes.

    Args:
        sweep: a YAML file, such as those under recipes/ablations/.
        out: where to write; ``runs/sweeps/`` and the file's name if not given.
        only: train these variants alone; the table keeps the finished runs of the others.
        fresh: forget earlier runs of this sweep.
        keep: a folder (to be committed) where each finished run's numbers are kept at once; those that are there are
            not trained, and table and pictures are written there.
        draw: train nothing: table and pictures of what is finished.
        overrides: settings of every run, as ``--model.depth=8``.
        modules: to be imported first, for classes of one's own.
    """

    sweep: str | Path
    out: str | Path | None = None
    only: Sequence[str] = ()
    fresh: bool = False
    keep: str | Path | None = None
    draw: bool = False
    overrides: Sequence[str] = ()
    modules: Sequence[str] = ()


class PlannedRun(NamedTuple):
    """One run of a sweep: which variant, which seed, where it lies."""

    variant: str
    seed: int
    run: Run

    def is_finished(self) -> bool:
        """Whether the folder holds a finished run of the same recipe and overrides."""
        try:
            return self.run.metrics_file.is_file() and self.run.is_known()
        except UserError:
            return False


def run_sweep(request: SweepRequest) -> SweepResults:
    """Train the variants that are not finished, and write the table and pictures of all of them.

    Finished runs are kept, broken ones continued; a run that fails does not keep the others from the table.

    Raises:
        UserError: a mistake in the sweep, told before the first run; or runs that failed, told after the table.
        KeyboardInterrupt: a run was told to stop, which is meant for the sweep.
    """
    file = recipe_file(request.sweep, missing=MISSING)
    sweep = read_sweep(file)
    recipe = recipe_file(sweep.recipe, beside=file)
    if unknown := set(request.only) - set(sweep.variants):
        raise UserError(f"``only`` {min(unknown)}: no such variant; this sweep has {', '.join(sweep.variants)}")
    out = Path(request.out or RUNS / "sweeps" / file.stem)
    planned = []
    for variant in sweep.variants:
        for seed in sweep.seeds:
            overrides = [*sweep.arguments(variant, seed), *request.overrides]
            run = run_of(recipe, overrides, out / variant / f"seed{seed}")
            planned.append(PlannedRun(variant, seed, run))
    keep = None if request.keep is None else KeptRuns(Path(request.keep), sweep)
    kept = {} if keep is None or request.fresh else {entry: keep.read(*entry) for entry in planned}
    done = {entry: finished for entry, finished in kept.items() if finished is not None}
    asked = [entry for entry in planned if not request.only or entry.variant in request.only]
    wanted = [] if request.draw else [entry for entry in asked if entry not in done]
    check_runs(wanted)
    failed = []
    for entry in wanted:
        if not _train(request, entry.run):
            failed.append(entry)
        elif keep is not None:
            keep.write(entry.run, read_run(*entry))
    if failed and len(failed) == len(wanted):
        raise UserError(f"sweep: none of the {len(wanted)} runs came to its end (see above); mend them and sweep again")
    done |= {e: read_run(*e) for e in planned if e not in done and e not in failed and (e in wanted or e.is_finished())}
    if not done:
        raise UserError(f"sweep {request.sweep}: no run is finished, there is nothing to draw")
    results = SweepResults(sweep, [done[entry] for entry in planned if entry in done])
    write_results(results, out if keep is None else keep.folder)
    if failed:
        names = ", ".join(str(entry.run.folder) for entry in failed)
        raise UserError(
            f"sweep: {len(failed)} of {len(wanted)} runs failed (see above): {names}; the table is of the others; "
            "mend them and sweep again"
        )
    return results


def check_runs(runs: Sequence[PlannedRun]) -> None:
    """A mistake is told before the first run. Seeds differ in a number alone: one run of a variant stands for all."""
    for variant, run in {entry.variant: entry.run for entry in runs}.items():
        try:
            check_quickly(run.recipe, run.overrides)
            from mvar_lightning.runs.recipe import RecipeCheck  # slow, and not needed for most mistakes

            RecipeCheck(run.arguments, run.folder)
        except UserError as error:
            raise UserError(f"variant {variant}: {error.marked}") from error


def _train(request: SweepRequest, run: Run) -> bool:
    """Whether the run came to its end. One process a run, so that its peak memory is its own."""
    imports = [word for module in request.modules for word in ("--import", module)]
    fresh = ["--fresh"] if request.fresh else []
    command = ["train", str(run.recipe), "--run-folder", str(run.folder), *fresh, *run.overrides]
    status = _wait([sys.executable, "-m", "mvar_lightning.cli", *imports, *command])
    if status in STOPPED:
        raise KeyboardInterrupt(f"sweep: stopped in {run.folder}; the same command goes on")
    if status:
        print(f"sweep: the run {run.folder} failed (see above)", file=sys.stderr)
    return status == 0


def _wait(command: Sequence[str]) -> int:
    """Exit status of a command. A stop that reaches the sweep alone (`kill`) is passed on, and the run's end awaited,
    for it keeps its place then; Ctrl-C has reached both, and a run that ends by it in two seconds is not told again.
    After a second stop the run is told at once."""
    told = False
    with _noted() as stops:
        child = subprocess.Popen(command)
        while (status := _ended(child)) is None:
            if not told and (len(stops) > 1 or (stops and time.monotonic() - stops[0][1] > 2)):
                child.terminate()
                told = True
    if stops and status not in STOPPED:  # of a run that came to its end
        signal.raise_signal(stops[0][0])
    return status


def _ended(child: subprocess.Popen[bytes]) -> int | None:
    with suppress(subprocess.TimeoutExpired):
        return child.wait(0.1)
    return None


@contextmanager
def _noted() -> Iterator[list[tuple[int, float]]]:
    """SIGINT and SIGTERM with their times, noted and no more: raised while the run is being started, they would leave
    it alone. Those that nobody handles stay as they are."""
    stops: list[tuple[int, float]] = []
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if main}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for number in handlers:
            signal.signal(number, lambda number, frame: stops.append((number, time.monotonic())))
        yield stops
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# What the file says.


def read_sweep(path: str | Path) -> Sweep:
    """A sweep file. Raises UserError where it is missing, not YAML, or says something else than a sweep."""
    import yaml

    try:
        return _sweep(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except UserError as error:
        mistake = str(error)
    except UnicodeDecodeError as error:
        mistake = f"not UTF-8 text (byte {error.start}); see recipes/ablations/"
    except OSError as error:
        mistake = f"cannot be read ({error.strerror}); see recipes/ablations/"
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-13-01
        mistake = f"not valid YAML ({' '.join(str(error).split())})"
    raise UserError(f"sweep {path}: {mistake}")


def _sweep(content: Any) -> Sweep:
    if not isinstance(content, Mapping):
        raise UserError("must be a mapping with recipe, variants and columns")
    known = [field.name for field in fields(Sweep)]
    if unknown := sorted(set(map(str, content)) - set(known)):
        raise UserError(f"{unknown[0]!r} is not known; it can have {', '.join(known)}")
    for needed in ("recipe", "variants", "columns"):
        if not content.get(needed):
            raise UserError(f"{needed} is missing or empty")
    if not isinstance(recipe := content["recipe"], str):
        raise UserError(f"recipe {recipe!r} must be the name of a YAML file")
    columns = content["columns"]
    if not isinstance(columns, list) or not all(isinstance(column, Mapping) for column in columns):
        raise UserError("columns must be a list of mappings with a metric")
    try:
        columns = tuple(Column(**column) for column in columns)
    except TypeError as error:
        raise UserError(f"columns: {str(error).split(') ')[-1]}") from None
    if not isinstance(against := content.get("against", ""), str) or against not in {"", *content["variants"]}:
        raise UserError(f"against {against!r} is no variant")
    plot = _metrics("plot", content.get("plot"))
    if unknown := [metric for metric in plot if metric not in {column.metric for column in columns}]:
        raise UserError(f"plot: {unknown[0]!r} is the metric of no column")
    variants = _variants(content["variants"])
    overrides = _settings("overrides", content.get("overrides"))
    seeds = content.get("seeds", [0])
    whole = isinstance(seeds, list) and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds)
    if not whole or not seeds or not all(0 <= seed <= LARGEST_SEED for seed in seeds):
        raise UserError(f"seeds {seeds!r} must be a list of whole numbers, 0 to {LARGEST_SEED}")
    seeds, curves = tuple(dict.fromkeys(seeds)), _metrics("curves", content.get("curves"))
    return Sweep(recipe, variants, columns, overrides, seeds, plot, curves, against)


def _variants(variants: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(variants, Mapping) or not all(isinstance(v, Mapping | None) for v in variants.values()):
        raise UserError("variants must map each name to its settings, such as {model.depth: 4}")
    for name in map(str, variants):
        if not name or name[0] == "." or "/" in name or "\0" in name:
            raise UserError(f"variant {name!r} is also a folder's name; use letters, digits and - alone")
    return {str(name): _settings(f"variant {name}", settings) for name, settings in variants.items()}


def _settings(where: str, settings: Any) -> dict[str, Any]:
    if not isinstance(settings, Mapping | None):
        raise UserError(f"{where} {settings!r} must be settings, such as {{model.depth: 4}}")
    for name, value in (settings or {}).items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):  # a date, a set, or a list within itself
            raise UserError(f"{where}: {name} {value!r} is no text, number, list or mapping; quote it") from None
    return dict(settings or {})


def _metrics(which: str, names: Any) -> tuple[str, ...]:
    """A list of metrics. One name alone is refused: its letters would be taken for names."""
    names = names or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{which} {names!r} must be a list of metrics, such as [val/loss]")
    return tuple(names)
