"""Makes the pictures of the docs that need no training: `make figures`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from my_strategies import CoarseFullAttention

from mvar_lightning import (
    AdjacentAttention,
    AttentionStrategy,
    FullAttention,
    ScalePyramid,
    SlidingWindowAttention,
    SpatialAttention,
)

PICTURES = Path(__file__).parent / "img"
PYRAMID = ScalePyramid([1, 2, 3, 4, 6])
EXAMPLE = PYRAMID.offsets[4] + 2 * 6 + 2
"""The query whose keys stand out: row 2, column 2 of the 6 x 6 map."""

COLORS = ListedColormap(["#f5f3ee", "#3b78b3", "#e08e2b"])
"""Hidden, visible, visible to the example query."""


def draw_mask(axis: Axes, strategy: AttentionStrategy) -> None:
    """One strategy's mask, by scale, with the keys of the example query in another color."""
    visible = strategy.mask(PYRAMID).numpy()
    shades = visible.astype(np.uint8)
    # three rows high, or it could not be seen
    shades[EXAMPLE - 1 : EXAMPLE + 2][:, visible[EXAMPLE]] = 2
    shades[EXAMPLE - 1 : EXAMPLE + 2][:, ~visible[EXAMPLE]] = 0
    axis.imshow(shades, cmap=COLORS, vmin=0, vmax=2, interpolation="nearest")
    for offset in PYRAMID.offsets[1:-1]:
        axis.axhline(offset - 0.5, color="white", linewidth=1.5)
        axis.axvline(offset - 0.5, color="white", linewidth=1.5)
        axis.axhline(offset - 0.5, color="0.55", linewidth=0.6)
        axis.axvline(offset - 0.5, color="0.55", linewidth=0.6)
    middles = [(a + b - 1) / 2 for a, b in zip(PYRAMID.offsets, PYRAMID.offsets[1:], strict=False)]
    names = [str(side) if side < 3 else f"{side}x{side}" for side in PYRAMID.sides]
    axis.set_xticks(middles, names, fontsize=10)
    axis.set_yticks(middles, names, fontsize=10)
    axis.tick_params(length=0)
    axis.set_title(repr(strategy), fontsize=11, family="monospace")
    axis.set_xlabel(f"keys, by scale\n{visible.sum():,} query-key pairs", fontsize=11)


def masks_picture(strategies: Sequence[AttentionStrategy], file: str) -> None:
    """Masks side by side."""
    size = (4.1 * len(strategies), 4.6)
    figure, axes = plt.subplots(1, len(strategies), figsize=size, layout="constrained", squeeze=False)
    for axis, strategy in zip(axes[0], strategies, strict=True):
        draw_mask(axis, strategy)
    axes[0, 0].set_ylabel("queries, by scale", fontsize=11)
    PICTURES.mkdir(exist_ok=True)
    figure.savefig(PICTURES / file, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    masks_picture(
        (FullAttention(), SlidingWindowAttention(2), AdjacentAttention(), SpatialAttention(3)), "strategies.png"
    )
    masks_picture((FullAttention(), CoarseFullAttention(until=3), AdjacentAttention()), "coarse_full.png")
