"""The papers' analyses as Markdown tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvar_lightning.evaluation.papers.alignment import Alignment
from mvar_lightning.evaluation.papers.attention_mass import AttentionMass
from mvar_lightning.evaluation.papers.perturbation import Damage
from mvar_lightning.pyramid import Size, height_width, short, times
from mvar_lightning.tools.console import table_of
from mvar_lightning.tools.drawing import labeled_rows, to_image
from mvar_lightning.tools.plots import COLORS, MARKERS, figure_of, text_color

# -- attention


def attention_markdown(mass: AttentionMass) -> str:
    """Means over blocks: mass on each scale, the same against an even spread, and inside windows of the own block."""
    on_scale, within = mass.on_scale.mean(dim=0), mass.within.mean(dim=0)
    names = [times(side, "x") for side in mass.sides]
    first = table_of(["query scale", *names], _rows(names, on_scale.masked_fill(on_scale == 0, math.nan), ".1%"))
    second = table_of(["query scale", *names], _rows(names, _over_even(mass), ".2f"))
    fitting = _fitting(mass)
    kernels = [f"{mass.kernels[number]}x{mass.kernels[number]}" for number in fitting]
    third = table_of(["query scale", *kernels], _rows(names, within[:, fitting], ".1%"))
    return (
        f"Share of attention on each scale, mean over blocks, heads, queries and {mass.images} images:\n\n{first}\n"
        "The same, as a multiple of what an even spread over all visible tokens would give that scale:\n\n"
        f"{second}\n"
        f"Share of the mass on a query's own block (which carries the adjacent scale) inside a window:\n\n{third}"
    )


def _rows(names: Sequence[str], values: Tensor, form: str) -> list[list[str]]:
    """A row for each name; cells that are NaN are empty."""
    cells = [["" if math.isnan(value) else format(value, form) for value in row] for row in values.tolist()]
    return [[name, *row] for name, row in zip(names, cells, strict=True)]


def _fitting(mass: AttentionMass) -> list[int]:
    """Numbers of the windows that fit into some map."""
    return [number for number, kernel in enumerate(mass.kernels) if kernel <= max(map(_longer, mass.sides))]


def _longer(size: Size) -> int:
    """The longer side of a map: windows up to it show something new."""
    return max(height_width(size))


def _over_even(mass: AttentionMass) -> Tensor:
    """Mass (K, K), mean over blocks, over that of an even spread over the scales that are seen at all; else NaN.

    Under a neighborhood the own scale has fewer visible tokens than its map; the map is counted all the same.
    """
    on_scale_KK = mass.on_scale.mean(dim=0)
    tokens_K = torch.tensor([float(math.prod(height_width(side))) for side in mass.sides])
    tokens_KK = tokens_K.expand(len(mass.sides), -1)
    seen_KK = tokens_KK * (on_scale_KK > 0)
    return on_scale_KK / (seen_KK / seen_KK.sum(dim=1, keepdim=True)).masked_fill(seen_KK == 0, math.nan)


def draw_on_scale(mass: AttentionMass, path: Path) -> None:
    """Query scale against key scale: the share, and how many times the share of an even spread."""
    on_scale_KK = mass.on_scale.mean(dim=0)
    count = len(mass.sides)
    with figure_of(path, 1, 2, width=2 * (1.6 + 0.34 * count), height=1.2 + 0.32 * count) as (left, right):
        share_KK = on_scale_KK.masked_fill(on_scale_KK == 0, math.nan) * 100
        _draw_matrix(left, share_KK, mass.sides, "share of attention, %", "Blues", (0.0, 100.0), ".0f")
        _draw_matrix(right, _over_even(mass).log2(), mass.sides, "log2 of share / even spread",
                     "RdBu_r", (-2.0, 2.0), "+.1f")  # fmt: skip
        for axis in (left, right):
            axis.set(xlabel="key scale", ylabel="query scale")


def draw_within(mass: AttentionMass, path: Path) -> None:
    """Share inside growing windows: a line for each of the largest scales; for the largest one, a line a block.

    An even spread is dotted, for comparison, up to the window that holds all that is visible. Lines differ by marker
    and not by style, for that reason.
    """
    shown = [scale for scale, side in enumerate(mass.sides) if _longer(side) > 2][-6:]
    with figure_of(path, 1, 2, width=6.4, height=2.7) as (left, right):
        for number, scale in enumerate(shown):
            name, color = times(mass.sides[scale], "x"), COLORS[number % len(COLORS)]
            marker = MARKERS[number % len(MARKERS)]
            _draw_windows(left, mass, mass.within[:, scale].mean(dim=0), scale, color, name, marker)
        blocks = len(mass.within)
        for block in range(blocks):
            shade = str(round(0.75 * (1 - block / max(blocks - 1, 1)), 3))
            name = f"block {block + 1}" if block in (0, blocks - 1) else ""
            _draw_windows(right, mass, mass.within[block, -1], len(mass.sides) - 1, shade, name)
        largest = times(mass.sides[-1], "x")
        left.set(title="each scale, mean over blocks", ylabel="attention inside the window, %")
        right.set(title=f"scale {largest}, each block")
        for axis in (left, right):
            axis.set(xlabel="side of the window", xticks=[mass.kernels[n] for n in _fitting(mass)], ylim=(0, 104))
            axis.plot([], [], ":", color="gray", linewidth=0.9, label="even spread")
            axis.legend(loc="lower right", fontsize=6)


def _draw_windows(
    axis: Any, mass: AttentionMass, within_N: Tensor, scale: int, color: str, name: str, marker: str = "o"
) -> None:
    fits = [n for n, kernel in enumerate(mass.kernels) if kernel <= _longer(mass.sides[scale])]
    kernels = [mass.kernels[n] for n in fits]
    axis.plot(kernels, [100 * float(within_N[n]) for n in fits], f"{marker}-", color=color, markersize=3,
              label=name or "_unnamed")  # fmt: skip
    even = [float(mass.even[scale, n]) for n in fits]
    shown = next((count for count, share in enumerate(even, 1) if share > 1 - 1e-6), len(even))
    axis.plot(kernels[:shown], [100 * share for share in even[:shown]], ":", color=color, linewidth=0.9)


# -- alignment


def alignment_markdown(found: Alignment) -> str:
    names = [times(side, "x") for side in found.sides]
    table = table_of(["residual of scale", *names], _rows(names, found.signed_sqrt_KK, "+.2f"))
    return f"sign(s) sqrt(|s|) of RFA(k, j), columns: input scale j, {found.images} images:\n\n{table}"


def draw_alignment(found: Alignment, path: Path) -> None:
    values_KK, count = found.signed_sqrt_KK, len(found.sides)
    largest = float(values_KK[~values_KK.isnan()].abs().max().clamp_min(1e-6))
    with figure_of(path, 1, 1, width=1.7 + 0.36 * count, height=1.2 + 0.32 * count) as (axis,):
        _draw_matrix(axis, values_KK, found.sides, "sign(s) sqrt(|s|) of RFA", "RdBu_r", (-largest, largest), "+.2f")
        axis.set(xlabel="input of scale", ylabel="residual of scale")


def _draw_matrix(
    axis: Any, values_KK: Tensor, sides: Sequence[Size], title: str, colors: str, limits: tuple[float, float], form: str
) -> None:
    """The lower half of a matrix over scales, each cell with its number."""
    count = len(sides)
    image = axis.imshow(values_KK.numpy(), cmap=colors, vmin=limits[0], vmax=limits[1])
    names = list(map(short, sides))
    axis.set_xticks(range(count), names)
    axis.set_yticks(range(count), names)
    axis.set_title(title)
    for row in range(count):
        for column in range(row + 1):
            value = float(values_KK[row, column])
            if not math.isnan(value):
                text = format(round(value, int(form[-2])) + 0.0, form)  # no -0.0
                color = text_color(image.cmap(image.norm(value)))
                axis.text(column, row, text, ha="center", va="center", fontsize=6, color=color)
    known_KK = values_KK[~values_KK.isnan()]
    beyond = bool((known_KK < limits[0]).any()), bool((known_KK > limits[1]).any())
    extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get(beyond, "neither")
    axis.figure.colorbar(image, ax=axis, shrink=0.8, extend=extend)


# -- perturbation


def perturbation_markdown(damages: Sequence[Damage], sides: Sequence[Size], images: int, fid: str | None) -> str:
    kinds = [("MSE", "mse", ".5f"), ("L1", "l1", ".4f"), ("LPIPS", "lpips", ".4f"), (f"FID ({fid})", "fid", ".2f")]
    kinds = [kind for kind in kinds if getattr(damages[0], kind[1]) is not None]
    head = ["perturbed scale", *(heading for heading, _, _ in kinds)]
    rows = []
    for damage in damages:
        name = "none" if damage.scale is None else times(sides[damage.scale], "x")
        rows.append([name, *(format(getattr(damage, measure), form) for _, measure, form in kinds)])
    line = f"One random token of each of {images} images replaced at one scale, against the same images undisturbed:"
    return f"{line}\n\n{table_of(head, rows)}"


def draw_damages(damages: Sequence[Damage], sides: Sequence[Size], fid: str | None, path: Path) -> None:
    kinds = (("MSE", "mse"), ("L1", "l1"), ("LPIPS", "lpips"), (f"FID ({fid})", "fid"))
    panels: dict[str, list[float]] = {
        name: [getattr(damage, kind) or 0.0 for damage in damages[1:]]
        for name, kind in kinds
        if getattr(damages[0], kind) is not None
    }
    with figure_of(path, 1, len(panels), width=2.4 * len(panels) + 0.4, height=2.3) as axes:
        for axis, (name, values) in zip(axes, panels.items(), strict=True):
            axis.plot(range(len(values)), values, "o-", color=COLORS[0], markersize=3.5)
            axis.set_xticks(range(len(values)), list(map(short, sides)))
            axis.set(title=name, xlabel="side of the perturbed scale")
            if not name.startswith("FID") and min(values) > 0:
                axis.set_yscale("log")  # each scale does a fraction of the damage of the one before
            else:
                axis.set_ylim(0, 1.15 * max(values) or 1.0)
            if name.startswith("FID"):
                axis.axhline(damages[0].fid or 0.0, color=COLORS[1], linestyle="--", linewidth=1,
                             label="undisturbed")  # fmt: skip
                axis.legend(loc="best", fontsize=6)  # where no line runs, however small the damage


def draw_perturbed(pictures: Sequence[Tensor], sides: Sequence[Size], path: Path) -> None:
    """A row for each image: undisturbed, then perturbed at each scale."""
    labels = ["undisturbed", *map(times, sides)]
    image_RN3HW = torch.stack(list(pictures), dim=1)
    captions = [[""] * len(labels) for _ in image_RN3HW]
    to_image(labeled_rows(image_RN3HW, labels, captions)).save(path)
