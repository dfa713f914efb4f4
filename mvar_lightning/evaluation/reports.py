"""What evaluations found, of generated images and of tokenizers: numbers as JSON and as Markdown, and pictures.

K scales, N images, HW pixels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mvar_lightning.errors import UserError
from mvar_lightning.evaluation.strips import progressive_picture
from mvar_lightning.metrics.copying import CopyingTest
from mvar_lightning.pyramid import Size, height_width, short, times
from mvar_lightning.tools.console import table_of
from mvar_lightning.tools.drawing import enlarge, make_grid, make_pairs, to_image
from mvar_lightning.tools.files import writing
from mvar_lightning.tools.plots import COLORS, figure_of

Row = tuple[str, str]
Draw = Callable[[Path], Any]
"""Writes a picture to a file."""


def write_report(folder: Path, files: Mapping[str, str | Draw]) -> list[Path]:
    """Write files by name, a text or what a function draws; the folder is made if it is missing.

    Raises:
        UserError: the folder cannot be written.
    """
    targets = [folder / name for name in files]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with writing(*targets) as asides:
            for aside, content in zip(asides, files.values(), strict=True):
                if isinstance(content, str):
                    aside.write_text(content, encoding="utf-8")
                else:
                    content(aside)
    except OSError as error:
        raise UserError(f"``out`` {folder}: cannot be written ({error.strerror}); choose another folder") from error
    return targets


def markdown_of(title: str, tables: Sequence[str], notes: Sequence[str], about: Mapping[str, Any]) -> str:
    """A report in Markdown: tables, notes, and what was measured on; what is None there is left out."""
    told = [f"{name.replace('_', ' ')}: {value}" for name, value in about.items() if value is not None]
    lists = ["".join(f"- {line}\n" for line in lines) for lines in (notes, told) if lines]
    return "\n".join([f"# {title}\n", *tables, *lists])


# Of generated images.


@dataclass(frozen=True)
class Floor:
    """What other real images get: distance of ``images`` of them to the reference."""

    fid: float
    images: int
    name: str


@dataclass(frozen=True)
class Memorization:
    """Distances to the nearest of ``images`` training images of ``training``, by features and by pixels."""

    training: str
    images: int
    features: CopyingTest
    pixels: CopyingTest

    def rows(self) -> list[Row]:
        rows = [("memorization against", f"{self.training}, {self.images:,} images")]
        for space, test in (("features", self.features), ("pixels", self.pixels)):
            of = f"{test.images:,} generated, {test.held_out_images:,} held out, {test.cells} cells"
            rows += [
                (f"C_T, {space} ({of})", f"{test.statistic:.2f} (p = {test.p_value:.2g})"),
                (f"median nearest, {space}", f"{test.generated:.4g}; held out {test.held_out:.4g}"),
                (f"closer than 5% of held out, {space}", f"{test.closer:.1%}"),
            ]
        return rows


@dataclass(frozen=True)
class ImageReport:
    """Everything that was measured; None is left out, and `notes` say why.

    Args:
        images: generated ones.
        size: their height and width.
        reference: what they are compared with.
        reference_images: None where a file with moments does not tell.
        features, num_features: name of the extractor, and numbers an image.
        fid, kid: Frechet and kernel distance of the features.
        sfid, num_spatial: of the spatial features.
        inception_score: mean and standard deviation over the splits.
        precision, recall: with ``neighbors``, of ``covered_generated`` and ``covered_reference`` images.
        floor: of other real images.
        memorization: where it was asked for.
        notes: whole sentences.
    """

    images: int
    size: tuple[int, int]
    reference: str
    reference_images: int | None
    features: str
    num_features: int
    fid: float
    kid: float | None = None
    sfid: float | None = None
    num_spatial: int = 0
    inception_score: tuple[float, float] | None = None
    precision: float | None = None
    recall: float | None = None
    neighbors: int = 3
    covered_generated: int = 0
    covered_reference: int = 0
    floor: Floor | None = None
    memorization: Memorization | None = None
    notes: tuple[str, ...] = ()

    def rows(self) -> list[Row]:
        """Name and value of every measure; a dash for what was left out."""
        return [*self._quality(), *(self.memorization.rows() if self.memorization is not None else [])]

    def _quality(self) -> list[Row]:
        height, width = self.size
        count = "?" if self.reference_images is None else f"{self.reference_images:,}"
        rows = [
            ("images", f"{self.images:,} of {width} x {height} pixels"),
            ("reference", f"{self.reference}, {count} images"),
            (f"FID ({self.features}, {self.num_features} features)", f"{self.fid:.3f}"),
        ]
        if (floor := self.floor) is not None:
            rows.append(("FID of other real images", f"{floor.fid:.3f} ({floor.images:,} of {floor.name})"))
        rows.append(
            (f"KID ({self.features}, {self.num_features} features)", "-" if self.kid is None else f"{self.kid:.5f}")
        )
        if self.sfid is None:
            rows.append(("sFID", "-"))
        else:
            rows.append((f"sFID ({self.features}, {self.num_spatial} features)", f"{self.sfid:.3f}"))
        if self.inception_score is None:
            rows.append(("Inception score", "-"))
        else:
            mean, deviation = self.inception_score
            rows.append((f"Inception score ({self.features})", f"{mean:.3f} +- {deviation:.3f}"))
        if self.precision is None or self.recall is None:
            return [*rows, ("precision", "-"), ("recall", "-")]
        of = f"k = {self.neighbors}, {self.covered_reference:,} real and {self.covered_generated:,} generated"
        return [*rows, (f"precision ({of})", f"{self.precision:.4f}"), (f"recall ({of})", f"{self.recall:.4f}")]


def write_image_report(
    report: ImageReport,
    about: Mapping[str, Any],
    image_N3HW: Tensor,
    columns: int,
    folder: Path,
    pairs_3HW: Tensor | None = None,
) -> list[Path]:
    """Write ``images.json``, ``images.md`` and ``images.png`` into ``folder``, and ``memorization.png`` where there are
    closest pairs, all or none.

    ``about`` is what was measured on, for the JSON and the foot of the Markdown. The picture shows images in [0, 1],
    ``columns`` of them in a row; 0 makes a square. Raises UserError as `write_report`.
    """
    tables = [table_of(("measure", "value"), report.rows())]
    files: dict[str, str | Draw] = {
        "images.json": json.dumps({**about, **asdict(report)}, indent=2) + "\n",
        "images.md": markdown_of("Generated images", tables, report.notes, about),
        "images.png": to_image(make_grid(enlarge(image_N3HW), columns)).save,
    }
    if pairs_3HW is not None:
        files["memorization.png"] = to_image(pairs_3HW).save
    return write_report(folder, files)


# Of a tokenizer.


@dataclass(frozen=True)
class ScaleReport:
    """One scale over all images: its share of the codebook, and the image as it is after it.

    Args:
        side: of the token map, or its height and width.
        tokens_seen: tokens of this scale over all images.
        codes_used: different codes among them.
        codes_possible: min(V, tokens seen).
        perplexity: exp(entropy) of the code frequencies.
        psnr: mean PSNR of the images decoded from this scale and the ones before.
    """

    side: Size
    tokens_seen: int
    codes_used: int
    codes_possible: int
    perplexity: float
    psnr: float

    @property
    def tokens(self) -> int:
        return math.prod(height_width(self.side))

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
        return self.tokens * self.bits_per_token


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
    image_size: Size
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
        return sum(scale.tokens for scale in self.scales)

    @property
    def pixels(self) -> int:
        return math.prod(height_width(self.image_size))

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
        bits, pixels = {"fixed_rate": self.fixed_bits, "entropy_coded": self.entropy_bits}, self.pixels
        return {
            "images": self.images,
            "image_size": self.image_size,
            "vocab_size": self.vocab_size,
            "tokens_per_image": self.tokens_per_image,
            "psnr": self.psnr,
            "ssim": self.ssim,
            "lpips": self.lpips,
            "rfid": None if self.frechet is None else asdict(self.frechet),
            "bits_per_image": bits,
            "bits_per_pixel": {name: count / pixels for name, count in bits.items()},
            "progressive_images": self.progressive_images,
            "scales": [asdict(one) | {"usage": one.usage, "bits_per_token": one.bits_per_token} for one in self.scales],
            "notes": list(self.notes),
        }

    def rows(self) -> list[Row]:
        """Measures of the whole image: name and value."""
        pixels, rfid = self.pixels, [("rFID", "-")]
        if (found := self.frechet) is not None:
            name = f"rFID ({found.features}, {found.num_features} features)"
            rfid = [(name, f"{found.rfid:.3f} on {found.images:,} images")]
            if found.floor is not None:
                rfid.append(("FID of other real images", f"{found.floor:.3f} on {found.floor_images:,} images"))
        return [
            ("images", f"{self.images:,} of {times(self.image_size)} pixels"),
            ("PSNR", f"{self.psnr:.2f} dB"),
            ("SSIM", "-" if self.ssim is None else f"{self.ssim:.4f}"),
            ("LPIPS", "-" if self.lpips is None else f"{self.lpips:.4f}"),
            *rfid,
            ("tokens an image", f"{self.tokens_per_image:,} of {self.vocab_size:,} codes"),
            ("bits an image, fixed rate", f"{self.fixed_bits:,.0f} ({self.fixed_bits / pixels:.3f} a pixel)"),
            ("bits an image, entropy coded", f"{self.entropy_bits:,.0f} ({self.entropy_bits / pixels:.3f} a pixel)"),
        ]

    def scale_rows(self) -> list[list[str]]:
        """The table of scales: headings, then one row for each."""
        head = ["scale", "codes used", "possible", "usage", "perplexity", "bits a token", "PSNR after it"]
        body = [
            [
                times(scale.side),
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

    ``about`` is what was measured on, for the JSON and the foot of the Markdown. Raises UserError as `write_report`.
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
    indices, names = range(len(scales)), [short(scale.side) for scale in scales]
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
