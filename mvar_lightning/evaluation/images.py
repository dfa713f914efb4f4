"""From features on disk to FID, sFID, Inception score, precision and recall.

N images, F features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mvar_lightning.errors import UserError
from mvar_lightning.evaluation.feature_store import FeatureStore
from mvar_lightning.evaluation.image_report import Floor, ImageReport
from mvar_lightning.evaluation.image_sources import ImageSource
from mvar_lightning.metrics import (
    FeatureExtractor,
    Moments,
    StoredReference,
    frechet_distance,
    inception_score,
    precision_recall,
)
from mvar_lightning.metrics.precision_recall import NEIGHBORS

MAX_REFERENCE, MAX_GENERATED = 10_000, 50_000
"""Images that precision and recall look at, as published; a fixed random choice where there are more."""


@dataclass(frozen=True)
class ImageSide:
    """Images and where their features are kept."""

    source: ImageSource
    store: FeatureStore
    device: torch.device

    @property
    def parts(self) -> int:
        return len(self.source.parts)

    def moments(self, kind: str, first: int | None = None) -> Moments | None:
        """Of one kind of features, of all images or the first; None where the extractor does not offer it."""
        found = self.store.moments(kind, self.parts, first, self.device)
        if found is None:
            return None
        if found.images < 2:
            raise UserError(f"{self.source.name}: {found.images} images; a Frechet distance needs two or more")
        return found.moments()

    def rows(self, kind: str) -> Tensor | None:
        return self.store.all_rows(kind, self.parts)


@dataclass(frozen=True)
class Reference:
    """What generated images are compared with: images, stored moments, or both (ADM's file)."""

    name: str
    side: ImageSide | None
    stored: StoredReference | None

    @cached_property
    def features(self) -> Moments:
        moments = self.stored.features if self.stored is not None else self._of_images("features")
        assert moments is not None
        return moments

    @cached_property
    def spatial(self) -> Moments | None:
        return self.stored.spatial if self.stored is not None else self._of_images("spatial")

    def rows(self) -> Tensor | None:
        """Features for precision and recall; None where only moments are stored."""
        found = self.side.rows("features") if self.side is not None else None
        return self.stored.features_NF if found is None and self.stored is not None else found

    def _of_images(self, kind: str) -> Moments | None:
        assert self.side is not None
        return self.side.moments(kind)

    def check(self, extractor: FeatureExtractor) -> None:
        """Raise UserError where moments were stored of other features."""
        if self.stored is None:
            return
        found = self.stored
        if found.extractor not in (None, extractor.name):
            raise UserError(
                f"``reference`` {self.name}: holds moments of {found.extractor} features, not of {extractor.name}; "
                "choose the same ``features``"
            )
        for kind, moments, expected in (
            ("", found.features, extractor.num_features),
            ("spatial ", found.spatial, extractor.num_spatial),
        ):
            if moments is not None and expected and moments.num_features != expected:
                raise UserError(
                    f"``reference`` {self.name}: holds moments of {moments.num_features} {kind}features, "
                    f"``features`` {extractor.name} gives {expected}; ADM's files want ``features`` inception"
                )

    def as_stored(self, extractor: FeatureExtractor) -> StoredReference:
        """For a file that later evaluations take as their reference."""
        rows = self.rows()
        return StoredReference(
            self.features, self.spatial, extractor.name, None if rows is None else some(rows, MAX_REFERENCE)
        )


def some(rows_NF: Tensor, count: int) -> Tensor:
    """All rows, or a random choice of them that is always the same."""
    if len(rows_NF) <= count:
        return rows_NF
    return rows_NF[torch.randperm(len(rows_NF), generator=torch.Generator().manual_seed(0))[:count]]


def measure_images(
    extractor: FeatureExtractor,
    generated: ImageSide,
    reference: Reference,
    other: ImageSide | None = None,
) -> ImageReport:
    """Every number that the features allow.

    Args:
        extractor: that all features came from.
        generated: with all parts there.
        reference: the same.
        other: real images that are not the reference's; as many as generated ones give the floor.
    """
    features, spatial = generated.moments("features"), generated.moments("spatial")
    assert features is not None and features.images is not None
    logits = generated.rows("logits")
    precision = recall = None
    rows, real_rows = generated.rows("features"), reference.rows()
    assert rows is not None
    rows, real_rows = some(rows, MAX_GENERATED), None if real_rows is None else some(real_rows, MAX_REFERENCE)
    if real_rows is not None and min(len(rows), len(real_rows)) > NEIGHBORS:
        precision, recall = precision_recall(real_rows, rows, NEIGHBORS, device=generated.device)
    report = ImageReport(
        images=features.images,
        size=generated.source.size,
        reference=reference.name,
        reference_images=reference.features.images,
        features=extractor.name,
        num_features=extractor.num_features,
        fid=frechet_distance(features, reference.features),
        sfid=None if spatial is None or reference.spatial is None else frechet_distance(spatial, reference.spatial),
        num_spatial=extractor.num_spatial,
        inception_score=None if logits is None else inception_score(logits),
        precision=precision,
        recall=recall,
        covered_generated=len(rows),
        covered_reference=0 if real_rows is None else len(real_rows),
        floor=_floor(other, reference, features.images),
    )
    notes = tuple(_notes(report, extractor, reference, [generated, reference.side]))
    return replace(report, notes=notes)


def _floor(other: ImageSide | None, reference: Reference, images: int) -> Floor | None:
    if other is None or images < 2:
        return None
    moments = other.moments("features", first=images)
    assert moments is not None and moments.images is not None
    return Floor(frechet_distance(moments, reference.features), moments.images, other.source.name)


def _notes(
    report: ImageReport, extractor: FeatureExtractor, reference: Reference, sides: list[ImageSide | None]
) -> Iterator[str]:
    name = extractor.name
    few = [n for n in (report.images, report.reference_images) if n is not None and n <= report.num_features]
    if few:
        yield (
            f"FID: {min(few):,} images are too few for {report.num_features:,} features: the covariance has no "
            "full rank; read it only beside the FID of other real images."
        )
    if report.images < MAX_GENERATED:
        yield f"{report.images:,} images: FID falls and IS grows with more; published numbers are of 50,000."
    if report.sfid is None:
        reason = "the reference file holds no mu_s and sigma_s" if extractor.num_spatial else f"{name} offers no map"
        yield f"sFID left out: {reason}."
    if report.inception_score is None:
        yield f"Inception score left out: {name} offers no class probabilities."
    if report.precision is None:
        reason = (
            "the reference file holds moments alone, and no images or features"
            if not report.covered_reference
            else f"more than {report.neighbors} images of each are needed"
        )
        yield f"Precision and recall left out: {reason}."
    if name == "classifier":
        yield "All numbers are by the data set's own classifier: compare them among runs on this data alone."
    if any(side is not None and side.store.enlarged(side.parts) for side in sides):
        yield "Some reference images were smaller than the generated ones and enlarged: figures are of blurred ones."
