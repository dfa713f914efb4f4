"""An evaluation of a tokenizer in a folder: JSON, Markdown, and three pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvar_lightning.analysis.strips import progressive_picture
from mvar_lightning.analysis.style import COLORS, figure_of
from mvar_lightning.analysis.tokenizer_report import ScaleReport, TokenizerReport
from mvar_lightning.callbacks.pictures import make_pairs, to_image
from mvar_lightning.checkpoints.files import written_aside
from mvar_lightning.errors import UserError

FILES = ("tokenizer.json", "tokenizer.md", "reconstructions.png", "progressive.png", "usage.png")


def write_evaluation(report: TokenizerReport, about: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write `FILES` into ``folder``, all or none.

    Args:
        report: what was measured.
        about: what was measured on, for the JSON and the foot of the Markdown.
        folder: made if it is missing.

    Raises:
        UserError: the folder cannot be written.
    """
    targets = [folder / name for name in FILES]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_aside(*targets) as (numbers, table, pairs, strips, usage):
            numbers.write_text(json.dumps({**about, **report.content()}, indent=2) + "\n", encoding="utf-8")
            table.write_text(_markdown(report, about), encoding="utf-8")
            to_image(make_pairs(report.examples.image_N3HW, report.examples.again_N3HW)).save(pairs)
            to_image(_progressive(report)).save(strips)
            plot_scales(report.scales, usage)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror}); choose another folder") from error
    return targets


def _markdown(report: TokenizerReport, about: Mapping[str, Any]) -> str:
    told = "".join(f"- {name.replace('_', ' ')}: {value}\n" for name, value in about.items() if value is not None)
    return f"{report.markdown('Tokenizer')}\n{told}"


def _progressive(report: TokenizerReport) -> Any:
    examples = report.examples
    count = len(examples.after_NK3HW)
    return progressive_picture(
        examples.image_N3HW[:count], examples.after_NK3HW, [scale.side for scale in report.scales]
    )


def plot_scales(scales: tuple[ScaleReport, ...], path: Path) -> None:
    """Three panels over the scales: usage, perplexity beside what is possible, PSNR after the scale."""
    places, names = range(len(scales)), [str(scale.side) for scale in scales]
    with figure_of(path, columns=3, width=7.2, height=2.4) as (usage, perplexity, decibel):
        usage.bar(places, [100 * scale.usage for scale in scales], color=COLORS[0])
        usage.set(title="usage, % of possible codes", ylim=(0, 105))
        possible = [scale.codes_possible for scale in scales]
        perplexity.bar(places, [scale.perplexity for scale in scales], color=COLORS[0])
        perplexity.plot(places, possible, "_", color=COLORS[1], markersize=9, markeredgewidth=2)
        perplexity.set(title="perplexity (lines: possible codes)", yscale="log", ylim=(0.8, 2 * max(possible)))
        decibel.plot(places, [scale.psnr for scale in scales], "o-", color=COLORS[0], markersize=3.5)
        decibel.set(title="PSNR after the scale, dB")
        for axis in (usage, perplexity, decibel):
            axis.set_xticks(list(places), names)
            axis.set_xlabel("side of the token map")
