"""One look for all plots: readable in print, and told apart by color-blind readers (Okabe and Ito's palette)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""In this order; the yellow of the palette is left out, since it is faint on white."""

LINES = ("-", "--", ":", "-.")
"""Line styles, for more lines than colors."""

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
