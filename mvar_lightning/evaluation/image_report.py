"""What an evaluation of generated images found: the numbers, as JSON and as Markdown, and a picture.

N images, HW pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mvar_lightning.evaluation.report_files import markdown_of, write_report
from mvar_lightning.tools.console import table_of
from mvar_lightning.tools.drawing import enlarge, make_grid, to_image

Row = tuple[str, str]


@dataclass(frozen=True)
class Floor:
    """What other real images get: distance of ``images`` of them to the reference."""

    fid: float
    images: int
    name: str


@dataclass(frozen=True)
class ImageReport:
    """Everything that was measured; None is left out, and `notes` say why.

    Args:
        images: generated ones.
        size: their height and width.
        reference: what they are compared with.
        reference_images: None where a file with moments does not tell.
        features, num_features: name of the extractor, and numbers an image.
        fid: Frechet distance of the features.
        sfid, num_spatial: of the spatial features.
        inception_score: mean and standard deviation over the splits.
        precision, recall: with ``neighbors``, of ``covered_generated`` and ``covered_reference`` images.
        floor: of other real images.
        notes: whole sentences.
    """

    images: int
    size: tuple[int, int]
    reference: str
    reference_images: int | None
    features: str
    num_features: int
    fid: float
    sfid: float | None = None
    num_spatial: int = 0
    inception_score: tuple[float, float] | None = None
    precision: float | None = None
    recall: float | None = None
    neighbors: int = 3
    covered_generated: int = 0
    covered_reference: int = 0
    floor: Floor | None = None
    notes: tuple[str, ...] = ()

    def content(self) -> dict[str, Any]:
        """The numbers as plain values, for JSON."""
        return asdict(self)

    def rows(self) -> list[Row]:
        """Name and value of every measure."""
        height, width = self.size
        count = "?" if self.reference_images is None else f"{self.reference_images:,}"
        return [
            ("images", f"{self.images:,} of {width} x {height} pixels"),
            ("reference", f"{self.reference}, {count} images"),
            (f"FID ({self.features}, {self.num_features} features)", f"{self.fid:.3f}"),
            *self._floor_rows(),
            *self._spatial_rows(),
            *self._score_rows(),
            *self._coverage_rows(),
        ]

    def _floor_rows(self) -> list[Row]:
        if self.floor is None:
            return []
        return [("FID of other real images", f"{self.floor.fid:.3f} ({self.floor.images:,} of {self.floor.name})")]

    def _spatial_rows(self) -> list[Row]:
        if self.sfid is None:
            return [("sFID", "-")]
        return [(f"sFID ({self.features}, {self.num_spatial} features)", f"{self.sfid:.3f}")]

    def _score_rows(self) -> list[Row]:
        if self.inception_score is None:
            return [("Inception score", "-")]
        mean, deviation = self.inception_score
        return [(f"Inception score ({self.features})", f"{mean:.3f} +- {deviation:.3f}")]

    def _coverage_rows(self) -> list[Row]:
        if self.precision is None or self.recall is None:
            return [("precision", "-"), ("recall", "-")]
        of = f"k = {self.neighbors}, {self.covered_reference:,} real and {self.covered_generated:,} generated"
        return [(f"precision ({of})", f"{self.precision:.4f}"), (f"recall ({of})", f"{self.recall:.4f}")]


def write_image_report(
    report: ImageReport, about: Mapping[str, Any], image_N3HW: Tensor, columns: int, folder: Path
) -> list[Path]:
    """Write ``images.json``, ``images.md`` and ``images.png`` into ``folder``, all or none.

    Args:
        report: what was measured.
        about: what was measured on, for the JSON and the foot of the Markdown.
        image_N3HW: some images in [0, 1] for the picture.
        columns: of them in a row; 0 makes a square.
        folder: made if it is missing.

    Raises:
        UserError: the folder cannot be written.
    """
    picture = to_image(make_grid(enlarge(image_N3HW), columns))
    tables = [table_of(("measure", "value"), report.rows())]
    return write_report(
        folder,
        {
            "images.json": json.dumps({**about, **report.content()}, indent=2) + "\n",
            "images.md": markdown_of("Generated images", tables, report.notes, about),
            "images.png": picture.save,
        },
    )
