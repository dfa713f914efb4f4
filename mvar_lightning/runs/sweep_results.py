"""A sweep's plan and what its runs have come to: values by variant and seed, as a table and as pictures."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import accumulate
from operator import sub
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from mvar_lightning.errors import UserError
from mvar_lightning.runs.run import Run
from mvar_lightning.runs.told_apart import LEVEL, told_apart
from mvar_lightning.tools.console import print_table, table_of
from mvar_lightning.tools.files import write, write_json

MEASURES = ("last", "fall")
REDUCTIONS: dict[str, Callable[..., float]] = {"min": min, "max": max}

LEAST_RANGE = 0.02
"""An axis of the plot spans at least this share of its values: smaller differences are not blown up."""


@dataclass(frozen=True)
class Column:
    """One number of each run.

    Args:
        metric: name in the run's ``metrics.json``; with ``*`` or ``[1-9]`` it may stand for several.
        title: heading; the metric's name if not given.
        measure: `last`, the final value; or `fall`, how far it fell at worst below the largest value logged before.
        reduce: `min` or `max` of the metrics that the name stands for.
        format: Python's format of one value.
        divide: the value is divided by this first (1048576 makes MiB of bytes).
    """

    metric: str
    title: str = ""
    measure: str = "last"
    reduce: str = "min"
    format: str = ".3g"
    divide: float = 1.0

    def __post_init__(self) -> None:
        for name in ("metric", "title", "measure", "reduce", "format"):
            if not isinstance(value := getattr(self, name), str) or (name == "metric" and not value):
                raise UserError(f"column {self.metric!r}: {name} {value!r} must be text")
        number = isinstance(self.divide, int | float) and not isinstance(self.divide, bool)
        if not number or not math.isfinite(self.divide) or not self.divide:
            raise UserError(f"column {self.metric!r}: divide {self.divide!r} must be a number other than 0")
        if self.measure not in MEASURES or self.reduce not in REDUCTIONS:
            raise UserError(
                f"column {self.metric!r}: measure {self.measure!r}, reduce {self.reduce!r}; "
                f"they can be {', '.join(MEASURES)} and {', '.join(REDUCTIONS)}"
            )
        try:
            format(0.5, self.format)
        except ValueError:
            raise UserError(f"column {self.metric!r}: {self.format!r} formats no number; try .3f or .1%") from None

    @property
    def heading(self) -> str:
        return self.title or self.metric

    def write(self, value: float) -> str:
        return format(value, self.format)


@dataclass(frozen=True)
class Sweep:
    """A recipe trained in several variants, each with every seed.

    Args:
        recipe: the YAML file that the variants change.
        variants: name of each -> settings that replace the recipe's (`model.depth: 4`).
        columns: what the table shows.
        overrides: settings of every variant.
        seeds: values of ``seed_everything``.
        plot: metrics of the columns that are drawn as bars; all columns if not given.
        curves: logged metrics drawn over the steps of the run.
        against: the variant that the others are held against; the table marks what can be told apart (`told_apart`).
    """

    recipe: str
    variants: dict[str, dict[str, Any]]
    columns: tuple[Column, ...]
    overrides: dict[str, Any]
    seeds: tuple[int, ...] = (0,)
    plot: tuple[str, ...] = ()
    curves: tuple[str, ...] = ()
    against: str = ""

    def arguments(self, variant: str, seed: int) -> list[str]:
        """Command-line overrides of one run."""
        settings = {**self.overrides, **self.variants[variant], "seed_everything": seed}
        return [f"--{name}={v if isinstance(v, str) else json.dumps(v)}" for name, v in settings.items()]


class Curve(NamedTuple):
    """A logged number over the steps of its run."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class SweepRun:
    """One finished run: its ``metrics.json`` and its logged curves."""

    variant: str
    seed: int
    report: Mapping[str, Any]
    curves: Mapping[str, Curve]

    def value(self, column: Column) -> float:
        """NaN where the run has no such number."""
        if column.measure == "last":
            numbers = {name: value for name, value in self.report.items() if isinstance(value, int | float)}
            numbers |= self.report["metrics"]
        else:  # how far below its highest value so far, at worst; a fall that was made good counts too
            numbers = {n: max(map(sub, accumulate(c.values, max), c.values)) for n, c in self.curves.items()}
        values = [value for name, value in numbers.items() if fnmatchcase(name, column.metric)]
        return REDUCTIONS[column.reduce](values) / column.divide if values else math.nan


@dataclass(frozen=True)
class Cell:
    """One column of one variant over all seeds; NaN for a seed whose run failed or has no such number."""

    values: tuple[float, ...]

    @property
    def known(self) -> list[float]:
        return [value for value in self.values if not math.isnan(value)]

    @property
    def mean(self) -> float:
        """Over the seeds that have a number; NaN where none has."""
        return mean(self.known) if self.known else math.nan

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; of fewer than two None, not 0."""
        return stdev(self.known) if len(self.known) > 1 else None

    def write(self, column: Column) -> str:
        if not self.known:
            return "-"
        missing = f" ({len(self.known)} of {len(self.values)})" if len(self.known) < len(self.values) else ""
        spread = f" ± {column.write(self.spread)}" if self.spread is not None and len(set(self.known)) > 1 else ""
        return f"{column.write(self.mean)}{spread}{missing}"


class SweepResults:
    """The finished runs of a sweep, at least one, in the order of its file."""

    def __init__(self, sweep: Sweep, runs: Sequence[SweepRun]) -> None:
        self.sweep = sweep
        self.runs = list(runs)
        self._by_name = {(run.variant, run.seed): run for run in self.runs}
        self._planned = [(name, seed) for name in sweep.variants for seed in sweep.seeds]

    def cell(self, variant: str, column: Column) -> Cell:
        found = [self._by_name.get((variant, seed)) for seed in self.sweep.seeds]
        return Cell(tuple(math.nan if run is None else run.value(column) for run in found))

    @property
    def plotted(self) -> list[Column]:
        """Columns to draw: those that some run has a number for."""
        chosen = [column for column in self.sweep.columns if column.metric in self.sweep.plot] or self.sweep.columns
        return [column for column in chosen if self._has(column)]

    @property
    def logged_curves(self) -> list[str]:
        return [tag for tag in self.sweep.curves if any(tag in run.curves for run in self.runs)]

    def _has(self, column: Column) -> bool:
        return any(self.cell(name, column).known for name in self.sweep.variants)

    def gaps(self) -> list[str]:
        """One line for each column or curve that no run has, with the names that come close."""
        metrics = sorted({name for run in self.runs for name in run.report["metrics"]})
        logged = sorted({name for run in self.runs for name in run.curves})
        missing = [("column", c.metric, metrics) for c in self.sweep.columns if not self._has(c)]
        missing += [("curve", tag, logged) for tag in self.sweep.curves if tag not in self.logged_curves]
        lines = []
        for kind, name, known in missing:
            close = ", ".join(get_close_matches(name, known, n=3))
            lines.append(f"{kind} {name!r}: no run has it; {f'close to it: {close}' if close else 'see metrics.json'}")
        return lines

    def rows(self) -> list[list[str]]:
        """The table: headings, then one row for each variant."""
        columns = self.sweep.columns
        chances = [self.chances(column) for column in columns]
        body = [
            [name, *(self._told(name, column, found) for column, found in zip(columns, chances, strict=True))]
            for name in self.sweep.variants
        ]
        return [["variant", *(column.heading for column in columns)], *body]

    def chances(self, column: Column) -> dict[str, float]:
        """Adjusted p of each variant against the one the sweep names; empty where it names none."""
        values = {name: self.cell(name, column).values for name in self.sweep.variants}
        return told_apart(values, self.sweep.against) if self.sweep.against else {}

    def _told(self, name: str, column: Column, chances: Mapping[str, float]) -> str:
        return self.cell(name, column).write(column) + (" *" if chances.get(name, 1.0) < LEVEL else "")

    def markdown(self) -> str:
        head, *body = self.rows()
        return f"{table_of(head, body)}\n{self.footnote()}\n"

    def footnote(self) -> str:
        """Steps, seeds, and how to read the cells; the counts behind a FID, where there is one."""
        missing = []
        for name in self.sweep.variants:
            seeds = [seed for seed in self.sweep.seeds if (name, seed) not in self._by_name]
            whole = len(seeds) == len(self.sweep.seeds) > 1
            missing += [name] if whole else [f"{name}, seed {seed}" for seed in seeds]
        steps = sorted({int(run.report["steps"]) for run in self.runs})
        parts = [f"{self.sweep.recipe}, {' to '.join(f'{step:,}' for step in sorted({steps[0], steps[-1]}))} steps"]
        if len(self.sweep.seeds) > 1:
            parts.append(f"mean ± standard deviation over seeds {', '.join(map(str, self.sweep.seeds))}")
        else:
            parts.append(f"one run each (seed {self.sweep.seeds[0]}): small differences mean nothing")
        if self.sweep.against:
            parts.append(f"* told apart from {self.sweep.against} (Dunnett's test over the column, p < {LEVEL})")
        if missing:
            parts.append(f"not run or failed: {' and '.join(missing)}")
        for name, value in self.runs[0].report["metrics"].items():
            if name.endswith(("fid_images", "fid_reference_images", "_floor")):
                parts.append(f"{name.removeprefix('val/')} {value:.4g}")
        return "; ".join(parts) + "."

    def content(self) -> dict[str, Any]:
        """Everything, for JSON, which has no NaN: None stands for it.

        ``variants`` and ``seeds`` are the plan, ``runs`` all of it: the report of a run that is not finished is None.
        ``table`` has mean and spread of each column over a variant's seeds, and how many of them have a number.
        """
        sweep, runs, table = self.sweep, [], {}
        for name in sweep.variants:
            cells = {column.heading: self.cell(name, column) for column in sweep.columns}
            table[name] = {
                heading: {"mean": _plain(cell.mean), "spread": _plain(cell.spread), "seeds": len(cell.known)}
                for heading, cell in cells.items()
            }
        for name, seed in self._planned:
            run = self._by_name.get((name, seed))
            values = {column.heading: None if run is None else _plain(run.value(column)) for column in sweep.columns}
            report = None
            if run is not None:
                report = {**run.report, "metrics": {k: _plain(v) for k, v in run.report["metrics"].items()}}
            runs.append({"variant": name, "seed": seed, "values": values, "report": report})
        plan = {"recipe": sweep.recipe, "overrides": sweep.overrides, "variants": sweep.variants}
        if sweep.against:
            plan |= {"against": sweep.against, "p": {c.heading: self.chances(c) for c in sweep.columns}}
        return {**plan, "seeds": list(sweep.seeds), "table": table, "runs": runs}

    def plot(self, path: Path) -> None:
        """Each plotted column as a row of dots: a ring for every seed, a filled dot for their mean.

        Dots and not bars, so that an axis need not begin at zero: differences of a percent would not be seen.
        """
        from mvar_lightning.tools.plots import COLORS, figure_of, format_ticks

        columns, names = self.plotted, list(self.sweep.variants)
        with figure_of(path, 1, len(columns), width=2.3 * len(columns) + 0.9, height=0.26 * len(names) + 0.8) as axes:
            for axis, column in zip(axes, columns, strict=True):
                for index, cell in enumerate(self.cell(name, column) for name in names):
                    axis.axhline(index, color="0.85", linewidth=0.6, zorder=0)
                    if len(cell.known) > 1:
                        # wider than the mean's dot, which must not hide them
                        rings = {"color": COLORS[0], "markersize": 6.5, "mfc": "none", "mew": 0.9}
                        axis.plot(cell.known, [index] * len(cell.known), "o", **rings)
                    if cell.known:
                        axis.plot(cell.mean, index, "o", color=COLORS[0], markersize=3.5)
                    axis.annotate(cell.write(column), (1.02, index), xycoords=("axes fraction", "data"),
                                  va="center", fontsize=7)  # fmt: skip
                axis.set(title=column.heading, yticks=range(len(names)), yticklabels=names)
                axis.set_ylim(len(names) - 0.5, -0.5)
                axis.margins(x=0.12)
                low, high = axis.get_xlim()
                if (lacking := LEAST_RANGE * abs(low + high) / 2 - (high - low)) > 0:
                    axis.set_xlim(low - lacking / 2, high + lacking / 2)
                format_ticks(axis.xaxis, column.format)
                if axis is not axes[0]:
                    axis.set_yticklabels([])

    def plot_curves(self, path: Path) -> None:
        """Each curve in its panel, a line for every variant (its first seed's); one y axis for all of a kind.

        Titles and formats are those of the column of the same metric, where there is one.
        """
        from matplotlib.ticker import PercentFormatter

        from mvar_lightning.tools.plots import figure_of, line_style

        tags, names = self.logged_curves, list(self.sweep.variants)
        columns = min(3, len(tags))
        rows = math.ceil(len(tags) / columns)
        first = {run.variant: run for run in reversed(self.runs)}
        named = {column.metric: column for column in self.sweep.columns if column.measure == "last"}
        # what a curve measures, whichever split or scale it is of: `loss` of `val/loss_last`
        kinds = [re.sub(r"_(last|scale_\d+)$", "", tag.rpartition("/")[2]).replace("_", " ") for tag in tags]
        lines: dict[str, Any] = {}
        with figure_of(path, rows, columns, width=3.1 * columns, height=2.3 * rows + 0.5) as axes:
            for axis, tag, kind in zip(axes, tags, kinds, strict=False):
                column = named.get(tag, Column(tag))
                for number, name in enumerate(names):
                    if name in first and (curve := first[name].curves.get(tag)) is not None:
                        apart = max(1, len(curve.steps) // 6)
                        values = [value / column.divide for value in curve.values]
                        (lines[name],) = axis.plot(curve.steps, values, label=name, **line_style(number),
                                                   markevery=(number % apart, apart))  # fmt: skip
                axis.set(title=column.heading, xlabel="step")
                if (first_of_kind := axes[kinds.index(kind)]) is not axis:
                    axis.sharey(first_of_kind)
                if kind == "usage":
                    axis.set_ylim(0, 1)
                if kinds.count(kind) > 1 and kind not in column.heading.casefold():
                    axis.set_ylabel(kind)
                if column.format.endswith("%"):
                    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
            for axis in axes[len(tags) :]:
                axis.set_visible(False)
            axes[0].figure.legend(lines.values(), lines, loc="outside lower center", ncols=4, frameon=False)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_curves(folder: str | Path) -> dict[str, Curve]:
    """Every scalar of a TensorBoard folder by its name, in the order of steps; of a step logged twice the later value.

    A run that broke off and was continued logs the steps in between again. Empty where there are no logs.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not Path(folder).is_dir():
        return {}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        by_step = {event.step: event.value for event in sorted(events.Scalars(tag), key=lambda event: event.wall_time)}
        steps = tuple(sorted(by_step))
        curves[tag] = Curve(steps, tuple(by_step[step] for step in steps))
    return curves


def read_run(variant: str, seed: int, run: Run) -> SweepRun:
    """What a finished run reported and logged. Raises `UserError` where its ``metrics.json`` is no report."""
    return SweepRun(variant, seed, run.report(), read_curves(run.folder / "tensorboard"))


def write_results(results: SweepResults, out: Path) -> None:
    """The table on screen, and ``sweep.json``, ``sweep.md``, ``sweep.png`` and ``curves.png`` in the folder."""
    head, *body = results.rows()
    print_table(body, head)
    print(results.footnote())
    for line in results.gaps():
        print(f"sweep: {line}", file=sys.stderr)
    write_json(out / "sweep.json", results.content())
    write(out / "sweep.md", results.markdown())
    written = ["sweep.json", "sweep.md"]
    for name, shown, plot in (
        ("sweep.png", results.plotted, results.plot),
        ("curves.png", results.logged_curves, results.plot_curves),
    ):
        if shown:
            plot(out / name)
            written.append(name)
    for name in written:
        print(f"  {out / name}")
