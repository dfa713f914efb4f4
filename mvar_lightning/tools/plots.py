"""One look for all plots: readable in print, and told apart by color-blind readers (Okabe and Ito's palette)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""In this order; the yellow of the palette is left out, since it is faint on white."""

LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v")
"""Line styles and markers go around beside the colors, which a gray print loses; their counts have no common factor."""

SETTINGS: Any = {  # matplotlib types the keys one by one
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "savefig.dpi": 150,
}


@contextmanager
def figure_of(path: Path, rows: int = 1, columns: int = 1, width: float = 6.4, height: float = 3.6) -> Iterator[Any]:
    """Axes of a figure in a flat list, row by row; the figure is written to `path` at the end.

    `width` and `height` are the whole figure's, in inches.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)
        try:
            yield list(axes.flat)
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        finally:
            plt.close(figure)


def line_style(number: int) -> dict[str, Any]:
    """Color, line style and marker of the line of this number; twenty can be told apart in gray."""
    return {
        "color": COLORS[number % len(COLORS)],
        "linestyle": LINES[number % len(LINES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 3.5,
    }


def text_color(background: Any) -> str:
    """Black or white, whichever has more contrast on a color (WCAG's relative luminance)."""
    from matplotlib.colors import to_rgb

    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(background)]
    luminance = sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "white" if luminance < 0.179 else "black"


def format_ticks(axis: Any, form: str) -> None:
    """About three ticks on a matplotlib XAxis or YAxis, written in the format of its values (`.1%`, `,.0f`), with as
    many digits as tell the ticks apart: none is written rounded and none runs into the next."""
    from matplotlib.ticker import MaxNLocator, ScalarFormatter, StrMethodFormatter

    axis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    places = axis.get_majorticklocs()
    found = re.fullmatch(r"(.*\.)(\d+)([f%])", form)
    if found is None:
        axis.set_major_formatter(ScalarFormatter(useOffset=False))
        return
    needed = math.ceil(-math.log10(places[1] - places[0]) - 1e-6) - 2 * (found[3] == "%")
    axis.set_major_formatter(StrMethodFormatter(f"{{x:{found[1]}{max(0, needed)}{found[3]}}}"))
