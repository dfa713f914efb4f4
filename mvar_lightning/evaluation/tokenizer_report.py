"""What an evaluation of a tokenizer found: the numbers, as JSON and as Markdown, and three pictures.

K scales, N images, HW pixels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mvar_lightning.evaluation.report_files import Draw, markdown_of, write_report
from mvar_lightning.evaluation.strips import progressive_picture
from mvar_lightning.tools.console import table_of
from mvar_lightning.tools.drawing import make_pairs, to_image
from mvar_lightning.tools.plots import COLORS, figure_of


@dataclass(frozen=True)
class ScaleReport:
    """One scale over all images: its share of the codebook, and the image as it is after it.

    Args:
        side: of the token map.
        tokens_seen: tokens of this scale over all images.
        codes_used: different codes among them.
        codes_possible: min(V, tokens seen).
        perplexity: exp(entropy) of the code frequencies.
        psnr: mean PSNR of the images decoded from this scale and the ones before.
    """

    side: int
    tokens_seen: int
    codes_used: int
    codes_possible: int
    perplexity: float
    psnr: float

    @property
    def usage(self) -> float:
        return self.codes_used / self.codes_possible

    @property
    def bits_per_token(self) -> float:
        """Entropy of the code frequencies."""
        return math.log2(self.perplexity)

    @property
    def entropy_bits(self) -> float:
        """Bits of this scale in one image."""
        return self.side**2 * self.bits_per_token


@dataclass(frozen=True)
class FrechetReport:
    """rFID: distance of the reconstructions to their images; ``floor`` is what other real images get.

    Args:
        features: name of what the distance compares.
        num_features: numbers an image.
        rfid: of ``images`` reconstructions to the same ``images`` images.
        floor, floor_images: of the other split's images; None where there are none.
    """

    features: str
    num_features: int
    rfid: float
    images: int
    floor: float | None = None
    floor_images: int = 0


@dataclass(frozen=True)
class Examples:
    """Images for the pictures, in [0, 1]: originals and reconstructions, and the first few of them after each scale."""

    image_N3HW: Tensor
    again_N3HW: Tensor
    after_NK3HW: Tensor


@dataclass(frozen=True)
class TokenizerReport:
    """Everything that was measured; PSNR, SSIM and LPIPS are means over images."""

    images: int
    image_size: int
    vocab_size: int
    psnr: float
    ssim: float | None
    lpips: float | None
    frechet: FrechetReport | None
    scales: tuple[ScaleReport, ...]
    progressive_images: int
    examples: Examples = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def tokens_per_image(self) -> int:
        return sum(scale.side**2 for scale in self.scales)

    @property
    def fixed_bits(self) -> float:
        """Bits of an image at log2(V) a token."""
        return self.tokens_per_image * math.log2(self.vocab_size)

    @property
    def entropy_bits(self) -> float:
        """Bits of an image under an ideal coder that knows each scale's code frequencies and nothing else."""
        return sum(scale.entropy_bits for scale in self.scales)

    def content(self) -> dict[str, Any]:
        """The numbers as plain values, for JSON."""
        per_scale = [
            asdict(scale) | {"usage": scale.usage, "bits_per_token": scale.bits_per_token} for scale in self.scales
        ]
        return {
            "images": self.images,
            "image_size": self.image_size,
            "vocab_size": self.vocab_size,
            "tokens_per_image": self.tokens_per_image,
            "psnr": self.psnr,
            "ssim": self.ssim,
            "lpips": self.lpips,
            "rfid": None if self.frechet is None else asdict(self.frechet),
            "bits_per_image": {"fixed_rate": self.fixed_bits, "entropy_coded": self.entropy_bits},
            "bits_per_pixel": {
                "fixed_rate": self.fixed_bits / self.image_size**2,
                "entropy_coded": self.entropy_bits / self.image_size**2,
            },
            "progressive_images": self.progressive_images,
            "scales": per_scale,
            "notes": list(self.notes),
        }

    def rows(self) -> list[tuple[str, str]]:
        """Measures of the whole image: name and value."""
        pixels = self.image_size**2
        return [
            ("images", f"{self.images:,} of {self.image_size} x {self.image_size} pixels"),
            ("PSNR", f"{self.psnr:.2f} dB"),
            ("SSIM", "-" if self.ssim is None else f"{self.ssim:.4f}"),
            ("LPIPS", "-" if self.lpips is None else f"{self.lpips:.4f}"),
            *self._frechet_rows(),
            ("tokens an image", f"{self.tokens_per_image:,} of {self.vocab_size:,} codes"),
            ("bits an image, fixed rate", f"{self.fixed_bits:,.0f} ({self.fixed_bits / pixels:.3f} a pixel)"),
            ("bits an image, entropy coded", f"{self.entropy_bits:,.0f} ({self.entropy_bits / pixels:.3f} a pixel)"),
        ]

    def _frechet_rows(self) -> list[tuple[str, str]]:
        found = self.frechet
        if found is None:
            return [("rFID", "-")]
        name = f"{found.features}, {found.num_features} features"
        rows = [(f"rFID ({name})", f"{found.rfid:.3f} on {found.images:,} images")]
        if found.floor is not None:
            rows.append(("FID of other real images", f"{found.floor:.3f} on {found.floor_images:,} images"))
        return rows

    def scale_rows(self) -> list[list[str]]:
        """The table of scales: headings, then one row for each."""
        head = ["scale", "codes used", "possible", "usage", "perplexity", "bits a token", "PSNR after it"]
        body = [
            [
                f"{scale.side} x {scale.side}",
                f"{scale.codes_used:,}",
                f"{scale.codes_possible:,}",
                f"{scale.usage:.1%}",
                f"{scale.perplexity:,.1f}",
                f"{scale.bits_per_token:.2f}",
                f"{scale.psnr:.2f} dB",
            ]
            for scale in self.scales
        ]
        return [head, *body]


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
    head, *body = report.scale_rows()
    tables = [table_of(("measure", "value"), report.rows()), table_of(head, body, numbers=True)]
    examples = report.examples
    shown_N3HW = examples.image_N3HW[: len(examples.after_NK3HW)]
    strips = progressive_picture(shown_N3HW, examples.after_NK3HW, [scale.side for scale in report.scales])
    contents: tuple[str | Draw, ...] = (
        json.dumps({**about, **report.content()}, indent=2) + "\n",
        markdown_of("Tokenizer", tables, report.notes, about),
        to_image(make_pairs(examples.image_N3HW, examples.again_N3HW)).save,
        to_image(strips).save,
        partial(plot_scales, report.scales),
    )
    return write_report(folder, dict(zip(FILES, contents, strict=True)))


def plot_scales(scales: tuple[ScaleReport, ...], path: Path) -> None:
    """Three panels over the scales: usage, perplexity beside what is possible, PSNR after the scale."""
    indices, names = range(len(scales)), [str(scale.side) for scale in scales]
    with figure_of(path, columns=3, width=7.2, height=2.4) as (usage, perplexity, decibel):
        usage.bar(indices, [100 * scale.usage for scale in scales], color=COLORS[0])
        usage.set(title="usage, % of possible codes", ylim=(0, 105))
        possible = [scale.codes_possible for scale in scales]
        perplexity.bar(indices, [scale.perplexity for scale in scales], color=COLORS[0])
        perplexity.plot(indices, possible, "_", color=COLORS[1], markersize=9, markeredgewidth=2)
        perplexity.set(title="perplexity (lines: possible codes)", yscale="log", ylim=(0.8, 2 * max(possible)))
        decibel.plot(indices, [scale.psnr for scale in scales], "o-", color=COLORS[0], markersize=3.5)
        decibel.set(title="PSNR after the scale, dB")
        for axis in (usage, perplexity, decibel):
            axis.set_xticks(list(indices), names)
            axis.set_xlabel("side of the token map")
