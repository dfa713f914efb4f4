"""Draws the way of the data and the axes of variation, from the code: `make figures`."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
from figures import PICTURES
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from mvar_lightning.attention import AttentionStrategy
from mvar_lightning.attention.backends import BACKENDS
from mvar_lightning.axis import AxisMember
from mvar_lightning.sampling import GuidanceSchedule
from mvar_lightning.tools import plots as style
from mvar_lightning.training.objectives import Objective
from mvar_lightning.transformer import BlockDesign, History

PLAIN, MODEL, THING = "#f5f3ee", "#dbe9f5", "#fbe6c8"
"""Faces of boxes: tensors, networks, what is chosen or computed from both."""

LANES: dict[str, Sequence[tuple[str, str]]] = {
    "data": (
        ("images", PLAIN),
        ("shards\ndata/making", THING),
        ("batches\ndata/reading", THING),
        ("image\nB3HW", PLAIN),
    ),
    "train": (
        ("image\nB3HW", PLAIN),
        ("tokenizer\nencode", MODEL),
        ("tokens\nidx_BL", PLAIN),
        ("inputs\nx_BLZ", PLAIN),
        ("transformer\nhistory, blocks", MODEL),
        ("logits\nBLV", PLAIN),
        ("loss\ntraining/", THING),
    ),
    "sample": (
        ("label\nB", PLAIN),
        ("transformer\none scale", MODEL),
        ("guidance,\nfilters, draw", THING),
        ("tokens of\nthe scale", PLAIN),
        ("f_hat\nquantizer", MODEL),
        ("decoder", MODEL),
        ("image\nB3HW", PLAIN),
    ),
}
"""What happens one after the other, by lane; docs/design.md has it in words."""

AXES: dict[str, tuple[str, type[AxisMember] | Sequence[str]]] = {
    "attention": ("who sees whom", AttentionStrategy),
    "history": ("what of earlier scales enters the input", History),
    "blocks": ("norm, MLP, positions, modulation", BlockDesign),
    "guidance": ("how strong, at which scale", GuidanceSchedule),
    "objective": ("what training minimizes", Objective),
    "backend": ("how attention is computed", tuple(BACKENDS)),
}


def box(axis: Axes, x: float, y: float, width: float, text: str, face: str) -> None:
    """A rounded box around (x, y)."""
    shape = "round,pad=0,rounding_size=0.08"
    patch = FancyBboxPatch((x - width / 2, y - 0.3), width, 0.6, boxstyle=shape, facecolor=face, edgecolor="0.45")
    axis.add_patch(patch)
    axis.text(x, y, text, ha="center", va="center", fontsize=7.5)


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    connection = f"arc3,rad={bend}"
    axis.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color="0.3", connectionstyle=connection)
    )


def data_path_picture(file: str) -> None:
    """Three lanes: from images to batches, a training step, and the loop that draws an image."""
    with plt.rc_context(style.SETTINGS):
        figure, axis = plt.subplots(figsize=(9.2, 3.4), layout="constrained")
        for row, (name, steps) in enumerate(LANES.items()):
            y = -1.25 * row
            axis.text(-0.75, y, name, ha="right", va="center", fontsize=9, fontweight="bold")
            for column, (text, face) in enumerate(steps):
                box(axis, 1.45 * column, y, 1.12, text, face)
                if column:
                    arrow(axis, (1.45 * column - 0.89, y), (1.45 * column - 0.56, y))
        loop = -1.25 * 2 - 0.3
        arrow(axis, (1.45 * 4, loop), (1.45, loop), bend=-0.18)
        axis.text(
            1.45 * 2.5, loop - 0.62, "next input: f_hat, averaged down to the next scale", ha="center", fontsize=7.5
        )
        axis.set(xlim=(-1.6, 9.4), ylim=(-3.6, 0.5), aspect="equal")
        axis.axis("off")
        figure.savefig(PICTURES / file)
        plt.close(figure)


def shipped(root: type[AxisMember]) -> list[str]:
    """Names of the members that come with the package."""
    found = (kind for kind in root.members.values() if kind.__module__.startswith("mvar_lightning"))
    return sorted(kind.__name__ for kind in found if not kind.__name__.startswith("_"))


def axes_picture(file: str) -> None:
    """A row for each axis, with its members as they are registered."""
    with plt.rc_context(style.SETTINGS):
        figure, axis = plt.subplots(figsize=(9.2, 3.9), layout="constrained")
        for row, (name, (asked, members)) in enumerate(AXES.items()):
            names = shipped(members) if isinstance(members, type) else list(members)
            axis.text(-0.1, -row + 0.09, name, ha="right", va="center", fontsize=9, fontweight="bold")
            axis.text(-0.1, -row - 0.17, asked, ha="right", va="center", fontsize=6.5, color="0.35")
            left = 0.05
            for member in names:
                width = 0.068 * len(member) + 0.22
                box(axis, left + width / 2, -row, width, member, (MODEL, THING)[row % 2])
                left += width + 0.1
        axis.set(xlim=(-2.6, 8.1), ylim=(-len(AXES) + 0.5, 0.5))
        axis.axis("off")
        figure.savefig(PICTURES / file)
        plt.close(figure)


if __name__ == "__main__":
    data_path_picture("data_path.png")
    axes_picture("axes.png")
