"""The papers' analyses in a folder: numbers as JSON, a Markdown table, and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvar_lightning.analysis.alignment import Alignment
from mvar_lightning.analysis.attention_mass import AttentionMass
from mvar_lightning.analysis.perturbation import Damage
from mvar_lightning.analysis.strips import labeled_rows
from mvar_lightning.analysis.style import COLORS, figure_of
from mvar_lightning.callbacks.pictures import to_image
from mvar_lightning.checkpoints.files import written_aside
from mvar_lightning.errors import UserError

Draw = Callable[[Path], None]


def write_analysis(
    name: str, content: Mapping[str, Any], markdown: str, drawings: Mapping[str, Draw], folder: Path
) -> list[Path]:
    """Write ``NAME.json``, ``NAME.md`` and the drawings (file name -> what draws it) into a folder, all or none.

    Raises:
        UserError: the folder cannot be written.
    """
    targets = [folder / f"{name}.json", folder / f"{name}.md", *(folder / file for file in drawings)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_aside(*targets) as (numbers, table, *pictures):
            numbers.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            table.write_text(markdown, encoding="utf-8")
            for path, draw in zip(pictures, drawings.values(), strict=True):
                draw(path)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror}); choose another folder") from error
    return targets


def table_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


# -- attention


def attention_markdown(mass: AttentionMass) -> str:
    """Means over blocks: mass on each scale, and inside each window of the own block."""
    on_scale, within = mass.on_scale.mean(dim=0), mass.within.mean(dim=0)
    names = [f"{side}x{side}" for side in mass.sides]
    first = table_of(["query scale", *names], _rows(names, on_scale.masked_fill(on_scale == 0, math.nan)))
    kernels = [f"{kernel}x{kernel}" for kernel in mass.kernels]
    second = table_of(["query scale", *kernels], _rows(names, within))
    return (
        f"Share of attention on each scale, mean over blocks, heads, queries and {mass.images} images:\n\n{first}\n"
        f"Share of the mass on a query's own block (which carries the adjacent scale) inside a window:\n\n{second}"
    )


def _rows(names: Sequence[str], values: Tensor) -> list[list[str]]:
    return [[name, *(_percent(float(v)) for v in row)] for name, row in zip(names, values, strict=True)]


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1%}"


def draw_on_scale(mass: AttentionMass) -> Draw:
    """The matrix of query scale against key scale."""
    return lambda path: _draw_matrix(
        mass.on_scale.mean(dim=0).masked_fill(mass.on_scale.mean(dim=0) == 0, math.nan) * 100,
        mass.sides,
        "share of attention, %",
        path,
        low=0.0,
    )


def draw_within(mass: AttentionMass) -> Draw:
    """Share inside growing windows, a line for each of the largest scales; a uniform spread for comparison."""

    def draw(path: Path) -> None:
        with figure_of(path, 1, 1, width=4.2, height=2.9) as (axis,):
            shown = [scale for scale, side in enumerate(mass.sides) if side > 2][-6:]
            for number, scale in enumerate(shown):
                side, values = mass.sides[scale], mass.within[:, scale].mean(dim=0)
                fits = [n for n, kernel in enumerate(mass.kernels) if kernel <= side]
                kernels = [mass.kernels[n] for n in fits]
                color = COLORS[number % len(COLORS)]
                axis.plot(kernels, [100 * float(values[n]) for n in fits], "o-", color=color, markersize=3)
                axis.plot(kernels, [100 * (k / side) ** 2 for k in kernels], ":", color=color, linewidth=0.9)
                axis.annotate(f"{side}x{side}", (kernels[-1], 100 * float(values[fits[-1]])), (3, 2),
                              textcoords="offset points", fontsize=7, color=color)  # fmt: skip
            axis.set(xlabel="side of the window", ylabel="attention inside, %", xticks=mass.kernels, ylim=(0, 104))
            axis.set_title("within the own block; dotted: if spread evenly")

    return draw


# -- alignment


def alignment_markdown(found: Alignment) -> str:
    names = [f"{side}x{side}" for side in found.sides]
    values = found.signed_sqrt_KK
    rows = [
        [name, *("" if math.isnan(float(v)) else f"{float(v):+.2f}" for v in row)]
        for name, row in zip(names, values, strict=True)
    ]
    table = table_of(["residual of scale", *names], rows)
    return f"sign(s) sqrt(|s|) of RFA(k, j), columns: input scale j, {found.images} images:\n\n{table}"


def draw_alignment(found: Alignment) -> Draw:
    return lambda path: _draw_matrix(
        found.signed_sqrt_KK, found.sides, "sign(s) sqrt(|s|) of RFA", path, symmetric=True, rows="residual of scale"
    )


def _draw_matrix(
    values: Tensor,
    sides: Sequence[int],
    title: str,
    path: Path,
    low: float | None = None,
    symmetric: bool = False,
    rows: str = "query scale",
) -> None:
    count = len(sides)
    largest = float(values[~values.isnan()].abs().max().clamp_min(1e-6))
    limits = (-largest, largest) if symmetric else (low, largest)
    with figure_of(path, 1, 1, width=1.6 + 0.34 * count, height=1.2 + 0.32 * count) as (axis,):
        image = axis.imshow(values, cmap="RdBu_r" if symmetric else "Blues", vmin=limits[0], vmax=limits[1])
        names = [str(side) for side in sides]
        axis.set_xticks(range(count), names)
        axis.set_yticks(range(count), names)
        axis.set(xlabel="key scale" if not symmetric else "input of scale", ylabel=rows, title=title)
        for row in range(count):
            for column in range(row + 1):
                value = float(values[row, column])
                if not math.isnan(value):
                    dark = abs(value) > 0.6 * largest
                    text = f"{value:+.1f}" if symmetric else f"{value:.0f}"
                    axis.text(column, row, text, ha="center", va="center", fontsize=6,
                              color="white" if dark else "black")  # fmt: skip
        axis.figure.colorbar(image, ax=axis, shrink=0.8)


# -- perturbation


def perturbation_markdown(damages: Sequence[Damage], sides: Sequence[int], images: int, fid: str | None) -> str:
    head = ["perturbed scale", "MSE", "L1"]
    head += ["LPIPS"] if damages[0].lpips is not None else []
    head += [f"FID ({fid})"] if damages[0].fid is not None else []
    rows = []
    for damage in damages:
        name = "none" if damage.scale is None else f"{sides[damage.scale]}x{sides[damage.scale]}"
        row = [name, f"{damage.mse:.5f}", f"{damage.l1:.4f}"]
        row += [f"{damage.lpips:.4f}"] if damage.lpips is not None else []
        row += [f"{damage.fid:.2f}"] if damage.fid is not None else []
        rows.append(row)
    told = f"One random token of each of {images} images replaced at one scale, against the same images undisturbed:"
    return f"{told}\n\n{table_of(head, rows)}"


def draw_damages(damages: Sequence[Damage], sides: Sequence[int], fid: str | None) -> Draw:
    def draw(path: Path) -> None:
        panels: dict[str, list[float]] = {
            "MSE": [damage.mse for damage in damages[1:]],
            "L1": [damage.l1 for damage in damages[1:]],
        }
        if damages[0].lpips is not None:
            panels["LPIPS"] = [damage.lpips or 0.0 for damage in damages[1:]]
        if damages[0].fid is not None:
            panels[f"FID ({fid})"] = [damage.fid or 0.0 for damage in damages[1:]]
        with figure_of(path, 1, len(panels), width=2.4 * len(panels) + 0.4, height=2.3) as axes:
            for axis, (name, values) in zip(axes, panels.items(), strict=True):
                axis.plot(range(len(values)), values, "o-", color=COLORS[0], markersize=3.5)
                axis.set_xticks(range(len(values)), [str(side) for side in sides])
                axis.set(title=name, xlabel="side of the perturbed scale")
                axis.set_ylim(bottom=0)
                if name.startswith("FID"):
                    axis.axhline(damages[0].fid or 0.0, color=COLORS[1], linestyle="--", linewidth=1)
                    axis.annotate("undisturbed", (0.98, damages[0].fid or 0.0), (0, 3), fontsize=6,
                                  xycoords=("axes fraction", "data"), textcoords="offset points",
                                  ha="right", color=COLORS[1])  # fmt: skip

    return draw


def draw_perturbed(pictures: Sequence[Tensor], sides: Sequence[int]) -> Draw:
    """A row for each image: undisturbed, then perturbed at each scale."""

    def draw(path: Path) -> None:
        labels = ["undisturbed", *(f"{side} x {side}" for side in sides)]
        image_RN3HW = torch.stack(list(pictures), dim=1)
        captions = [[""] * len(labels) for _ in image_RN3HW]
        to_image(labeled_rows(image_RN3HW, labels, captions)).save(path)

    return draw
