"""What the runs of a sweep have come to: values by variant and seed, as a table and as pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from mvar_lightning.analysis.curves import Curve
from mvar_lightning.analysis.sweeps import REDUCTIONS, Column, Sweep


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
        matching = [curve for name, curve in self.curves.items() if fnmatchcase(name, column.metric)]
        return [max(curve.values) - curve.values[-1] for curve in matching]


@dataclass(frozen=True)
class Cell:
    """One column of one variant over all seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 for a single one."""
        return stdev(self.values) if len(self.values) > 1 else 0.0

    def write(self, column: Column) -> str:
        if math.isnan(self.mean):
            return "-"
        if len(self.values) == 1:
            return column.write(self.mean)
        return f"{column.write(self.mean)} ± {column.write(self.spread)}"


class SweepResults:
    """All runs of a sweep, in the order of its file."""

    def __init__(self, sweep: Sweep, runs: Sequence[SweepRun]) -> None:
        self.sweep = sweep
        self.runs = list(runs)

    def cell(self, variant: str, column: Column) -> Cell:
        return Cell(tuple(run.value(column) for run in self.runs if run.variant == variant))

    def rows(self) -> list[list[str]]:
        """The table: headings, then one row for each variant."""
        columns = self.sweep.columns
        body = [[name, *(self.cell(name, column).write(column) for column in columns)] for name in self.sweep.variants]
        return [["variant", *(column.heading for column in columns)], *body]

    def markdown(self) -> str:
        head, *body = self.rows()
        lines = [head, ["---"] * len(head), *body]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"{table}\n\n{self.footnote()}\n"

    def footnote(self) -> str:
        """Steps, seeds, and how to read the cells; the counts behind a FID, where there is one."""
        steps = sorted({int(run.report["steps"]) for run in self.runs})
        told = [f"{self.sweep.recipe}, {' to '.join(f'{step:,}' for step in sorted({steps[0], steps[-1]}))} steps"]
        if len(self.sweep.seeds) > 1:
            told.append(f"mean ± standard deviation over seeds {', '.join(map(str, self.sweep.seeds))}")
        else:
            told.append(f"one run each (seed {self.sweep.seeds[0]}): small differences mean nothing")
        metrics = self.runs[0].report["metrics"]
        for name, value in metrics.items():
            if name.endswith(("fid_images", "fid_reference_images", "_floor")):
                told.append(f"{name.removeprefix('val/')} {value:.4g}")
        return "; ".join(told) + "."

    def content(self) -> dict[str, Any]:
        """Everything, for JSON."""
        runs = [
            {
                "variant": run.variant,
                "seed": run.seed,
                "values": {column.heading: run.value(column) for column in self.sweep.columns},
                "report": dict(run.report),
            }
            for run in self.runs
        ]
        return {"recipe": self.sweep.recipe, "overrides": self.sweep.overrides, "runs": runs}

    def plot(self, path: Path) -> None:
        """Each plotted column as a row of bars, a dot for every seed."""
        from mvar_lightning.analysis.style import COLORS, figure_of

        columns, names = self.sweep.plotted, list(self.sweep.variants)
        with figure_of(path, 1, len(columns), width=2.4 * len(columns) + 1.2, height=0.34 * len(names) + 1.0) as axes:
            for axis, column in zip(axes, columns, strict=True):
                cells = [self.cell(name, column) for name in names]
                axis.barh(names, [cell.mean for cell in cells], color=COLORS[0], alpha=0.55)
                for place, cell in enumerate(cells):
                    axis.plot(cell.values, [place] * len(cell.values), ".", color="black", markersize=4)
                    axis.annotate(cell.write(column), (max(cell.values), place), (4, 0), textcoords="offset points",
                                  va="center", fontsize=7)  # fmt: skip
                axis.margins(x=0.35)
                axis.set_title(column.heading)
                axis.invert_yaxis()
                if axis is not axes[0]:
                    axis.set_yticklabels([])

    def plot_curves(self, path: Path) -> None:
        """Each curve in its panel, a line for every variant (the first seed's)."""
        from mvar_lightning.analysis.style import COLORS, LINES, figure_of

        tags = self.sweep.curves
        columns = min(3, len(tags))
        rows = math.ceil(len(tags) / columns)
        first = [run for run in self.runs if run.seed == self.sweep.seeds[0]]
        with figure_of(path, rows, columns, width=3.1 * columns, height=2.3 * rows + 0.5) as axes:
            for axis, tag in zip(axes, tags, strict=False):
                for number, run in enumerate(first):
                    if (curve := run.curves.get(tag)) is not None:
                        style = {"color": COLORS[number % len(COLORS)], "linestyle": LINES[number // len(COLORS)]}
                        axis.plot(curve.steps, curve.values, label=run.variant, **style)
                axis.set_title(tag)
                axis.set_xlabel("step")
            for axis in axes[len(tags) :]:
                axis.set_visible(False)
            handles, labels = axes[0].get_legend_handles_labels()
            axes[0].figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
