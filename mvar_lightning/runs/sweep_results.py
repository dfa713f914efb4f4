"""What the runs of a sweep have come to: values by variant and seed, as a table and as pictures."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import accumulate
from operator import sub
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from mvar_lightning.errors import UserError
from mvar_lightning.runs.run import DAMAGED, Run
from mvar_lightning.runs.sweep_file import REDUCTIONS, Column, Sweep
from mvar_lightning.tools.console import print_table, table_of
from mvar_lightning.tools.files import read_json, write_json

LEAST_RANGE = 0.02
"""An axis of the plot spans at least this share of its values: smaller differences are not blown up."""


@dataclass(frozen=True)
class SweepRun:
    """One finished run: its ``metrics.json`` and its logged curves."""

    variant: str
    seed: int
    report: Mapping[str, Any]
    curves: Mapping[str, Curve]

    def value(self, column: Column) -> float:
        """NaN where the run has no such number."""
        values = self._last(column) if column.measure == "last" else self._falls(column)
        return REDUCTIONS[column.reduce](values) / column.divide if values else math.nan

    def _last(self, column: Column) -> list[float]:
        numbers = {name: value for name, value in self.report.items() if isinstance(value, int | float)}
        numbers |= self.report["metrics"]
        return [value for name, value in numbers.items() if fnmatchcase(name, column.metric)]

    def _falls(self, column: Column) -> list[float]:
        """How far each curve lay below its highest value so far, at worst; a fall that was made good counts too."""
        matching = [curve for name, curve in self.curves.items() if fnmatchcase(name, column.metric)]
        return [max(map(sub, accumulate(curve.values, max), curve.values)) for curve in matching]


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
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 for a single one."""
        return stdev(self.known) if len(self.known) > 1 else 0.0

    def content(self) -> dict[str, Any]:
        """Plain values, for JSON; the spread of fewer than two seeds is None, not 0."""
        spread = self.spread if len(self.known) > 1 else None
        return {"mean": _plain(self.mean), "spread": _plain(spread), "seeds": len(self.known)}

    def write(self, column: Column) -> str:
        if not self.known:
            return "-"
        missing = f" ({len(self.known)} of {len(self.values)})" if len(self.known) < len(self.values) else ""
        spread = f" ± {column.write(self.spread)}" if len(set(self.known)) > 1 else ""
        return f"{column.write(self.mean)}{spread}{missing}"


class SweepResults:
    """The finished runs of a sweep, at least one, in the order of its file."""

    def __init__(self, sweep: Sweep, runs: Sequence[SweepRun]) -> None:
        self.sweep = sweep
        self.runs = list(runs)
        self._by_name = {(run.variant, run.seed): run for run in self.runs}

    def cell(self, variant: str, column: Column) -> Cell:
        found = [self._by_name.get((variant, seed)) for seed in self.sweep.seeds]
        return Cell(tuple(math.nan if run is None else run.value(column) for run in found))

    @property
    def plotted(self) -> list[Column]:
        """Columns to draw: those that some run has a number for."""
        return [column for column in self.sweep.plotted if self._has(column)]

    @property
    def logged_curves(self) -> list[str]:
        return [tag for tag in self.sweep.curves if any(tag in run.curves for run in self.runs)]

    def _has(self, column: Column) -> bool:
        return any(self.cell(name, column).known for name in self.sweep.variants)

    def gaps(self) -> list[str]:
        """One line for each column or curve that no run has, with the names that come close."""
        metrics = sorted({name for run in self.runs for name in run.report["metrics"]})
        logged = sorted({name for run in self.runs for name in run.curves})
        lines = [_gap("column", c.metric, metrics) for c in self.sweep.columns if not self._has(c)]
        return lines + [_gap("curve", c, logged) for c in self.sweep.curves if c not in self.logged_curves]

    def rows(self) -> list[list[str]]:
        """The table: headings, then one row for each variant."""
        columns = self.sweep.columns
        body = [[name, *(self.cell(name, column).write(column) for column in columns)] for name in self.sweep.variants]
        return [["variant", *(column.heading for column in columns)], *body]

    def markdown(self) -> str:
        head, *body = self.rows()
        return f"{table_of(head, body)}\n{self.footnote()}\n"

    def footnote(self) -> str:
        """Steps, seeds, and how to read the cells; the counts behind a FID, where there is one."""
        missing = [f"{name}, seed {seed}" for name, seed in self._planned() if (name, seed) not in self._by_name]
        steps = sorted({int(run.report["steps"]) for run in self.runs})
        parts = [f"{self.sweep.recipe}, {' to '.join(f'{step:,}' for step in sorted({steps[0], steps[-1]}))} steps"]
        if len(self.sweep.seeds) > 1:
            parts.append(f"mean ± standard deviation over seeds {', '.join(map(str, self.sweep.seeds))}")
        else:
            parts.append(f"one run each (seed {self.sweep.seeds[0]}): small differences mean nothing")
        if missing:
            parts.append(f"not run or failed: {' and '.join(missing)}")
        metrics = self.runs[0].report["metrics"]
        for name, value in metrics.items():
            if name.endswith(("fid_images", "fid_reference_images", "_floor")):
                parts.append(f"{name.removeprefix('val/')} {value:.4g}")
        return "; ".join(parts) + "."

    def content(self) -> dict[str, Any]:
        """Everything, for JSON, which has no NaN: None stands for it.

        ``variants`` and ``seeds`` are the plan, ``runs`` all of it: the report of a run that is not finished is None.
        ``table`` has mean and spread of each column over a variant's seeds, and how many of them have a number.
        """
        sweep = self.sweep
        return {
            "recipe": sweep.recipe,
            "overrides": sweep.overrides,
            "variants": sweep.variants,
            "seeds": list(sweep.seeds),
            "table": {
                name: {column.heading: self.cell(name, column).content() for column in sweep.columns}
                for name in sweep.variants
            },
            "runs": [self._run_content(name, seed) for name, seed in self._planned()],
        }

    def _planned(self) -> list[tuple[str, int]]:
        return [(name, seed) for name in self.sweep.variants for seed in self.sweep.seeds]

    def _run_content(self, variant: str, seed: int) -> dict[str, Any]:
        run = self._by_name.get((variant, seed))
        values = {column.heading: None if run is None else _plain(run.value(column)) for column in self.sweep.columns}
        report = None
        if run is not None:
            report = {**run.report, "metrics": {k: _plain(v) for k, v in run.report["metrics"].items()}}
        return {"variant": variant, "seed": seed, "values": values, "report": report}

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
        kinds = [_kind(tag) for tag in tags]
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


def _kind(tag: str) -> str:
    """What a logged curve measures, whichever split or scale it is of: `loss` of `val/loss_last`."""
    return re.sub(r"_(last|scale_\d+)$", "", tag.rpartition("/")[2]).replace("_", " ")


def _gap(kind: str, name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, n=3)
    return f"{kind} {name!r}: no run has it; " + (f"close to it: {', '.join(close)}" if close else "see metrics.json")


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Logged curves of a run, read back from its TensorBoard files.


class Curve(NamedTuple):
    steps: tuple[int, ...]
    values: tuple[float, ...]


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
    report = read_json(run.metrics_file, DAMAGED)
    if not isinstance(report, dict) or not isinstance(report.get("metrics"), dict) or "steps" not in report:
        raise UserError(f"{run.metrics_file}: is no report of a run; remove it and sweep again")
    return SweepRun(variant, seed, report, read_curves(run.folder / "tensorboard"))


def write_results(results: SweepResults, out: Path) -> None:
    """The table on screen, and ``sweep.json``, ``sweep.md``, ``sweep.png`` and ``curves.png`` in the folder."""
    head, *body = results.rows()
    print_table(body, head)
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
