"""Scaling laws: test loss and token error rate against parameters, fitted by a power law (VAR, section 4.2).

    y = (beta N)^alpha,   so   log y = alpha log N + alpha log beta

fitted by least squares in logarithms. For depths 6 to 30 on ImageNet VAR reports alpha -0.20 (loss), -0.23 (loss of the
last scale) and -0.016 (error rate of the last scale), correlations of about -0.998.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvar_lightning.errors import UserError
from mvar_lightning.tools.console import table_of
from mvar_lightning.tools.plots import COLORS, figure_of

MEASURES = {
    "loss": ("val/loss", False),
    "loss, last scale": ("val/loss_last", False),
    "error rate": ("val/accuracy", True),
    "error rate, last scale": ("val/accuracy_last", True),
}
"""Heading -> logged metric, and whether the measure is 1 minus it."""


@dataclass(frozen=True)
class PowerLaw:
    """A fit with its 95% confidence interval of the exponent (Student's t).

    Kept as the line log y = alpha log N + intercept: where the measure hardly changes, beta leaves the floats.
    ``r_squared`` is NaN where it does not change at all: there is nothing to explain.
    """

    alpha: float
    low: float
    high: float
    intercept: float
    r_squared: float

    @property
    def beta(self) -> float:
        """NaN where it is no float."""
        try:
            beta = math.exp(self.intercept / self.alpha)
        except (ZeroDivisionError, OverflowError):
            return math.nan
        return beta or math.nan

    def at(self, parameters: float) -> float:
        return math.exp(self.alpha * math.log(parameters) + self.intercept)


@dataclass(frozen=True)
class Scaling:
    """Points and fit of one measure, and the planned runs that it is without."""

    name: str
    points: tuple[tuple[float, float], ...]
    law: PowerLaw
    missing: tuple[str, ...] = ()

    def band(self, parameters: float) -> tuple[float, float]:
        """Lowest and highest value of the law at this size, with 95% confidence (Student's t).

        Around the mean size the spread of the runs decides, far from it the interval of alpha.
        """
        logs = [math.log(size) for size, _ in self.points]
        center = sum(logs) / len(logs)
        variance = sum((log - center) ** 2 for log in logs) / len(logs)
        reach = (self.law.high - self.law.alpha) * math.hypot(math.sqrt(variance), math.log(parameters) - center)
        middle = self.law.at(parameters)
        return middle * math.exp(-reach), middle * math.exp(reach)


def fit_power_law(points: Sequence[tuple[float, float]]) -> PowerLaw:
    """Fit y = (beta N)^alpha to points (N, y).

    Raises:
        UserError: fewer than three points, fewer than two sizes, or a value that is not positive.
    """
    from scipy.stats import linregress, t

    if len(points) < 3 or len({size for size, _ in points}) < 2:
        raise UserError(f"scaling: {len(points)} runs; a power law needs three or more, of at least two sizes")
    if bad := [point for point in points if not all(math.isfinite(number) and number > 0 for number in point)]:
        raise UserError(f"scaling: a run of {bad[0][0]:,.0f} parameters has the value {bad[0][1]}; both must be "
                        "positive numbers")  # fmt: skip
    if len({value for _, value in points}) == 1:  # SciPy's correlation is 0 / 0, and the interval with it
        return PowerLaw(0.0, 0.0, 0.0, math.log(points[0][1]), math.nan)
    found = linregress([math.log(size) for size, _ in points], [math.log(value) for _, value in points])
    reach = float(t.ppf(0.975, len(points) - 2)) * float(found.stderr)
    alpha = float(found.slope)
    return PowerLaw(alpha, alpha - reach, alpha + reach, float(found.intercept), float(found.rvalue) ** 2)


def scaling_of(runs: Sequence[Mapping[str, Any]]) -> list[Scaling]:
    """The four measures over the runs of a sweep (``sweep.json``), each run a point.

    A run with the report null was planned and is not finished; the fit is without it.

    Raises:
        UserError: runs that are no next-scale models', or too few of them.
    """
    for run in runs:
        if not isinstance(run, Mapping) or not isinstance(run.get("report", {}), Mapping | None):
            raise UserError(f"scaling: {str(run)[:60]} is no run; make sweep.json anew with mvar sweep")
    finished = [run for run in runs if run.get("report", {}) is not None]
    missing = tuple(_name(run) for run in runs if run.get("report", {}) is None)
    found = []
    for name, (metric, inverted) in MEASURES.items():
        values = [_number(run, metric) for run in finished]
        sizes = [_number(run, "parameters") for run in finished]
        points = [(size, 1 - value if inverted else value) for size, value in zip(sizes, values, strict=True)]
        try:
            law = fit_power_law(points)
        except UserError as error:
            raise UserError(f"{error}; not finished: {'; '.join(missing)}" if missing else str(error)) from error
        found.append(Scaling(name, tuple(sorted(points)), law, missing))
    return found


def _number(run: Mapping[str, Any], name: str) -> float:
    """The parameters of a run, or one of its metrics."""
    report = run.get("report", {})
    metrics = report.get("metrics", {})
    value = report.get(name) if name == "parameters" else metrics.get(name) if isinstance(metrics, Mapping) else None
    if value is None:
        raise UserError(
            f"scaling: run {_name(run)} has no {name}; give a sweep of next-scale models that all came to their end"
        )
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"scaling: run {_name(run)} has {name} {value!r}, no number; train that run again")
    return float(value)


def _name(run: Mapping[str, Any]) -> str:
    return f"{run.get('variant')}" + (f", seed {run['seed']}" if "seed" in run else "")


def scaling_content(found: Sequence[Scaling]) -> dict[str, Any]:
    """Plain values, for JSON, which has no NaN: None stands for it."""
    return {
        scaling.name: {
            "points": [list(point) for point in scaling.points],
            "alpha": scaling.law.alpha,
            "alpha_95": [scaling.law.low, scaling.law.high],
            "intercept": scaling.law.intercept,
            "beta": _plain(scaling.law.beta),
            "r_squared": _plain(scaling.law.r_squared),
            "missing": list(scaling.missing),
        }
        for scaling in found
    }


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _share(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"


def scaling_markdown(found: Sequence[Scaling]) -> str:
    """One row a measure."""
    rows = [
        [
            scaling.name,
            f"{scaling.law.alpha:z.3f}",
            f"{scaling.law.low:z.3f} to {scaling.law.high:z.3f}",
            _share(scaling.law.r_squared),
            f"{scaling.points[0][1]:.4g} to {scaling.points[-1][1]:.4g}",
        ]
        for scaling in found
    ]
    sizes = [size for size, _ in found[0].points]
    line = f"{len(sizes)} runs of {sizes[0]:,.0f} to {sizes[-1]:,.0f} parameters; y = (beta N)^alpha:"
    if found[0].missing:
        line = f"Not finished, so not in the fits: {'; '.join(found[0].missing)}.\n\n{line}"
    return f"{line}\n\n{table_of(['measure', 'alpha', '95% interval', 'R2', 'smallest to largest'], rows)}"


def draw_scaling(found: Sequence[Scaling], path: Path) -> None:
    """Each measure in its panel, both axes logarithmic; the fit with its 95% band."""

    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    with figure_of(path, -(-len(found) // 2), 2, width=5.6, height=4.4) as axes:
        for axis, scaling in zip(axes, found, strict=False):
            sizes = [size for size, _ in scaling.points]
            axis.plot(sizes, [value for _, value in scaling.points], "o", color=COLORS[0], markersize=4)
            axis.plot(sizes, [scaling.law.at(size) for size in sizes], "--", color=COLORS[1])
            steps = [sizes[0] * (sizes[-1] / sizes[0]) ** (part / 40) for part in range(41)]
            axis.fill_between(steps, *zip(*map(scaling.band, steps), strict=True), color=COLORS[1], alpha=0.18,
                              linewidth=0)  # fmt: skip
            axis.set(title=scaling.name, xlabel="parameters", xscale="log", yscale="log")
            axis.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))  # labels of all nine would lie over one another
            axis.yaxis.set_major_locator(MaxNLocator(4))  # powers of ten alone would leave most axes without a tick
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:.4g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
            law = scaling.law
            axis.annotate(
                f"alpha {law.alpha:z.3f} ({law.low:z.3f} to {law.high:z.3f})\nR2 {_share(law.r_squared)}",
                (0.98, 0.98), xycoords="axes fraction", ha="right", va="top", fontsize=7,
            )  # fmt: skip
            axis.margins(y=0.25)
