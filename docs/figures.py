"""Makes the pictures of the docs that need no training: `make figures`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle
from my_strategies import CoarseFullAttention

from mvar_lightning import (
    AdjacentAttention,
    AttentionStrategy,
    FullAttention,
    ScalePyramid,
    SlidingWindowAttention,
    SpatialAttention,
)
from mvar_lightning.tools import plots as style

PICTURES = Path(__file__).parent / "img"
PYRAMID = ScalePyramid([1, 2, 3, 4, 6])
EXAMPLE = PYRAMID.offsets[4] + 2 * 6 + 2
"""The query whose keys are shown in orange: row 2, column 2 of the 6 x 6 map."""

COLORS = ListedColormap(["#f5f3ee", style.COLORS[0], style.COLORS[4]])
"""Hidden, visible, visible to the example query: an orange that stays apart from the blue in a gray print."""


def draw_maps(axis: Axes, visible_L: np.ndarray) -> None:
    """The token maps side by side: what the example query (a ring) sees of each."""
    left = 0.0
    for scale, side in enumerate(PYRAMID.sides):
        own = PYRAMID.slice_of(scale)
        for token, (y, x) in enumerate(np.ndindex(side, side), start=own.start):
            face = COLORS(2 if visible_L[token] else 0)
            axis.add_patch(Rectangle((left + x, 6 - side + y), 1, 1, facecolor=face, edgecolor="0.55", linewidth=0.6))
            if token == EXAMPLE:
                axis.plot(left + x + 0.5, 6 - side + y + 0.5, "o", markersize=4, markerfacecolor="none", color="black")
        left += side + 1
    axis.set(xlim=(-0.2, left - 0.8), ylim=(6.2, -0.2), aspect="equal")
    axis.axis("off")


def draw_mask(axis: Axes, visible_LL: np.ndarray) -> None:
    """A mask with scale boundaries; the row of the example query in another color."""
    shades_LL = visible_LL.astype(np.uint8)
    shades_LL[EXAMPLE] *= 2
    axis.imshow(shades_LL, cmap=COLORS, vmin=0, vmax=2, interpolation="nearest")
    for offset in PYRAMID.offsets[1:-1]:
        axis.axhline(offset - 0.5, color="0.55", linewidth=0.6)
        axis.axvline(offset - 0.5, color="0.55", linewidth=0.6)
    middles = [(a + b - 1) / 2 for a, b in pairwise(PYRAMID.offsets)]
    names = [str(side) if side < 3 else f"{side}x{side}" for side in PYRAMID.sides]
    axis.set_xticks(middles, names, fontsize=6)
    axis.set_yticks(middles, names, fontsize=6)
    axis.tick_params(length=0)
    axis.set_xlabel(f"keys, by scale\n{visible_LL.sum():,} query-key pairs")


def strategies_picture(strategies: Sequence[AttentionStrategy], file: str) -> None:
    """A column for each strategy: what one query sees of the maps, and the whole mask."""
    with plt.rc_context(style.SETTINGS):
        figure, axes = plt.subplots(
            2, len(strategies), figsize=(3.1 * len(strategies), 4.6), height_ratios=(1, 3), layout="constrained"
        )
        for (maps, mask), strategy in zip(axes.T, strategies, strict=True):
            visible_LL = strategy.mask(PYRAMID).numpy()
            maps.set_title(repr(strategy))
            draw_maps(maps, visible_LL[EXAMPLE])
            draw_mask(mask, visible_LL)
        axes[1, 0].set_ylabel("queries, by scale")
        PICTURES.mkdir(exist_ok=True)
        figure.savefig(PICTURES / file)
        plt.close(figure)


if __name__ == "__main__":
    published = (FullAttention(), SlidingWindowAttention(2), AdjacentAttention(), SpatialAttention(3))
    strategies_picture(published, "strategies.png")
    strategies_picture((FullAttention(), CoarseFullAttention(until=3), AdjacentAttention()), "coarse_full.png")
