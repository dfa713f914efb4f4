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

from mvar_lightning.analysis.analysis_files import Draw, table_of
from mvar_lightning.analysis.style import COLORS, figure_of
from mvar_lightning.errors import UserError

MEASURES = {
    "loss": ("val/loss", False),
    "loss, last scale": ("val/loss_last", False),
    "error rate": ("val/accuracy", True),
    "error rate, last scale": ("val/accuracy_last", True),
}
"""Heading -> logged metric, and whether the measure is 1 minus it."""


@dataclass(frozen=True)
class PowerLaw:
    """A fit with its 95% confidence interval of the exponent (Student's t)."""

    alpha: float
    low: float
    high: float
    beta: float
    r_squared: float

    def at(self, parameters: float) -> float:
        return (self.beta * parameters) ** self.alpha

    def __str__(self) -> str:
        return f"alpha {self.alpha:.3f} (95%: {self.low:.3f} to {self.high:.3f}), R2 {self.r_squared:.3f}"


@dataclass(frozen=True)
class Scaling:
    """Points and fit of one measure."""

    name: str
    points: tuple[tuple[float, float], ...]
    law: PowerLaw


def fit_power_law(points: Sequence[tuple[float, float]]) -> PowerLaw:
    """Fit y = (beta N)^alpha to points (N, y).

    Raises:
        UserError: fewer than three points, fewer than two sizes, or a value that is not positive.
    """
    from scipy.stats import linregress, t

    if len(points) < 3 or len({size for size, _ in points}) < 2:
        raise UserError(f"scaling: {len(points)} runs; a power law needs three or more, of at least two sizes")
    if bad := [point for point in points if not (point[0] > 0 and point[1] > 0 and math.isfinite(point[1]))]:
        raise UserError(f"scaling: a run of {bad[0][0]:,.0f} parameters has the value {bad[0][1]}; it must be positive")
    found = linregress([math.log(size) for size, _ in points], [math.log(value) for _, value in points])
    reach = float(t.ppf(0.975, len(points) - 2)) * float(found.stderr)
    alpha = float(found.slope)
    beta = math.exp(float(found.intercept) / alpha) if alpha else math.nan
    return PowerLaw(alpha, alpha - reach, alpha + reach, beta, float(found.rvalue) ** 2)


def scaling_of(runs: Sequence[Mapping[str, Any]]) -> list[Scaling]:
    """The four measures over the runs of a sweep (``sweep.json``), each run a point.

    Raises:
        UserError: runs that are no next-scale models', or too few of them.
    """
    found = []
    for name, (metric, inverted) in MEASURES.items():
        points = []
        for run in runs:
            report = run.get("report", {})
            value, size = report.get("metrics", {}).get(metric), report.get("parameters")
            if value is None or size is None:
                raise UserError(
                    f"scaling: run {run.get('variant')} has no {metric if value is None else 'parameters'}; "
                    "give a sweep of next-scale models that all came to their end"
                )
            points.append((float(size), 1 - float(value) if inverted else float(value)))
        found.append(Scaling(name, tuple(sorted(points)), fit_power_law(points)))
    return found


def scaling_content(found: Sequence[Scaling]) -> dict[str, Any]:
    """Plain values, for JSON."""
    return {
        scaling.name: {
            "points": [list(point) for point in scaling.points],
            "alpha": scaling.law.alpha,
            "alpha_95": [scaling.law.low, scaling.law.high],
            "beta": scaling.law.beta,
            "r_squared": scaling.law.r_squared,
        }
        for scaling in found
    }


def scaling_markdown(found: Sequence[Scaling]) -> str:
    """One row a measure."""
    rows = [
        [
            scaling.name,
            f"{scaling.law.alpha:.3f}",
            f"{scaling.law.low:.3f} to {scaling.law.high:.3f}",
            f"{scaling.law.r_squared:.3f}",
            f"{scaling.points[0][1]:.4g} to {scaling.points[-1][1]:.4g}",
        ]
        for scaling in found
    ]
    sizes = [size for size, _ in found[0].points]
    told = f"{len(sizes)} runs of {sizes[0]:,.0f} to {sizes[-1]:,.0f} parameters; y = (beta N)^alpha:"
    return f"{told}\n\n{table_of(['measure', 'alpha', '95% interval', 'R2', 'smallest to largest'], rows)}"


def draw_scaling(found: Sequence[Scaling]) -> Draw:
    """Each measure in its panel, both axes logarithmic."""

    from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

    def draw(path: Path) -> None:
        with figure_of(path, -(-len(found) // 2), 2, width=5.6, height=4.4) as axes:
            for axis, scaling in zip(axes, found, strict=False):
                sizes = [size for size, _ in scaling.points]
                axis.plot(sizes, [value for _, value in scaling.points], "o", color=COLORS[0], markersize=4)
                axis.plot(sizes, [scaling.law.at(size) for size in sizes], "--", color=COLORS[1])
                axis.set(title=scaling.name, xlabel="parameters", xscale="log", yscale="log")
                axis.yaxis.set_major_locator(MaxNLocator(4))  # powers of ten alone would leave most axes without a tick
                axis.yaxis.set_major_formatter(StrMethodFormatter("{x:.4g}"))
                axis.yaxis.set_minor_formatter(NullFormatter())
                law = scaling.law
                axis.annotate(
                    f"alpha {law.alpha:.3f} ({law.low:.3f} to {law.high:.3f})\nR2 {law.r_squared:.3f}",
                    (0.98, 0.98), xycoords="axes fraction", ha="right", va="top", fontsize=7,
                )  # fmt: skip
                axis.margins(y=0.25)

    return draw
