"""Makes the pictures of the docs that need no training: `make figures`."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

from mvar_lightning import (
    AdjacentAttention,
    FullAttention,
    ScalePyramid,
    SlidingWindowAttention,
    SpatialAttention,
)

PICTURES = Path(__file__).parent / "img"
PYRAMID = ScalePyramid([1, 2, 3, 4, 6])
STRATEGIES = (FullAttention(), SlidingWindowAttention(2), AdjacentAttention(), SpatialAttention(3))


def strategies_picture() -> None:
    """The four strategies' masks side by side, with scale boundaries."""
    figure, axes = plt.subplots(1, len(STRATEGIES), figsize=(12, 3.4), layout="constrained")
    for axis, strategy in zip(axes, STRATEGIES, strict=True):
        mask = strategy.mask(PYRAMID).numpy().astype(np.uint8)
        axis.imshow(mask, cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
        for offset in PYRAMID.offsets[1:-1]:
            axis.axhline(offset - 0.5, color="0.6", linewidth=0.5)
            axis.axvline(offset - 0.5, color="0.6", linewidth=0.5)
        middles = [(a + b - 1) / 2 for a, b in zip(PYRAMID.offsets, PYRAMID.offsets[1:], strict=False)]
        axis.set_xticks(middles, PYRAMID.sides, fontsize=7)
        axis.set_yticks(middles, PYRAMID.sides, fontsize=7)
        axis.tick_params(length=0)
        axis.set_title(repr(strategy), fontsize=9)
        axis.set_xlabel(f"keys, by scale ({mask.sum():,} pairs)", fontsize=8)
    axes[0].set_ylabel("queries, by scale", fontsize=8)
    PICTURES.mkdir(exist_ok=True)
    figure.savefig(PICTURES / "strategies.png", dpi=130)


if __name__ == "__main__":
    strategies_picture()
