"""From images to features on disk, and from those to FID, sFID, Inception score, precision and recall.

Features of a set of images lie in a folder, part by part: what is there is whole, and is not computed again. It holds
`about.json` (which images, which features) and `part-00000.npz` and so on, each with ``features`` (N, F) float32 and,
where the extractor offers them, ``logits`` (N, C) and ``spatial`` (N, S).

N images, F features, C classes, S spatial features, B batch, HW pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvar_lightning.errors import UserError
from mvar_lightning.evaluation.image_sources import ImageSource
from mvar_lightning.evaluation.reports import Floor, ImageReport
from mvar_lightning.metrics import (
    FeatureExtractor,
    FeatureMoments,
    Moments,
    StoredReference,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from mvar_lightning.metrics.moments import write_arrays
from mvar_lightning.metrics.precision_recall import NEIGHBORS
from mvar_lightning.tools.files import check_claim, claim
from mvar_lightning.tools.tensors import open_arrays, read_array

MAX_REFERENCE, MAX_GENERATED = 10_000, 50_000
"""Images that precision and recall look at, as published; a fixed random choice where there are more."""

ABOUT = "about.json"
KINDS = ("features", "logits", "spatial")


@dataclass(frozen=True)
class FeatureStore:
    """The features of one set of images in a folder. Can be sent to other processes."""

    folder: Path

    def check(self, about: Mapping[str, Any]) -> None:
        """Raise UserError where the folder holds features of other images, or other features of them."""
        check_claim(self.folder / ABOUT, about, self._refusal)

    def claim(self, about: Mapping[str, Any]) -> None:
        """Make the folder and note in it what it is of. Raises UserError as `check`, or where it cannot be written."""
        try:
            claim(self.folder / ABOUT, about, self._refusal)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error.strerror}); choose another ``out``") from error

    def _refusal(self, name: str, theirs: Any, ours: Any) -> str:
        return (
            f"{self.folder}: holds features with {name} {theirs}, these have {ours}; "
            "choose another ``out`` folder, or remove that one"
        )

    def _file(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.npz"

    def missing(self, parts: int) -> list[int]:
        """Numbers of the parts that are not there yet."""
        return [part for part in range(parts) if not self._file(part).exists()]

    def write(self, part: int, rows: Mapping[str, np.ndarray], enlarged: bool) -> None:
        write_arrays(self._file(part), {**rows, "enlarged": np.array(enlarged)})

    def rows(self, kind: str, parts: int) -> Iterator[Tensor]:
        """One of `KINDS`, part by part; nothing where the extractor does not offer it. Raises UserError for a damaged
        file."""
        for part in range(parts):
            try:
                with open_arrays(self._file(part)) as file:
                    if kind not in file:
                        return
                    rows = read_array(self._file(part), file, kind)
            except UserError as error:
                raise UserError(f"{self._file(part)}: damaged; remove it and run the command again") from error
            yield torch.from_numpy(rows)


@dataclass(frozen=True)
class ImageSide:
    """Images and where their features are kept. Can be sent to other processes."""

    source: ImageSource
    store: FeatureStore
    device: torch.device

    @property
    def parts(self) -> int:
        return len(self.source.parts)

    def extract(self, extractor: FeatureExtractor, part: int, batch_size: int, report: Callable[[int], None]) -> None:
        """Keep the features of one part: (N, F) float32 for each of `KINDS` that the extractor offers.

        Raises:
            UserError: an image that cannot be read, or features that are not finite.
        """
        rows: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
        for pixels_B3HW in self.source.read(part, batch_size):
            found = extractor.measure(pixels_B3HW.to(self.device).float().div(255))
            for kind, values in zip(KINDS, found, strict=True):
                if values is None:
                    continue
                if not torch.isfinite(values).all():
                    raise UserError(
                        f"{kind} of images in {self.source.name}: {extractor.name} gives NaN or infinity; its file is "
                        "damaged, or made for other pixels"
                    )
                rows[kind].append(values.cpu().numpy())
            report(len(pixels_B3HW))
        whole = {kind: np.concatenate(values) for kind, values in rows.items() if values}
        self.store.write(part, whole, self.source.enlarged)

    def moments(self, kind: str, first: int | None = None) -> Moments | None:
        """Of one kind of features, of all images or the first; None where the extractor does not offer it."""
        sums: FeatureMoments | None = None
        for rows_NF in self.store.rows(kind, self.parts):
            if sums is None:
                sums = FeatureMoments(rows_NF.shape[1], self.device)
            left = len(rows_NF) if first is None else first - sums.images
            if left > 0:
                sums.update(rows_NF[:left])
        if sums is None:
            return None
        if sums.images < 2:
            raise UserError(f"{self.source.name}: {sums.images} images; a Frechet distance needs two or more")
        return sums.moments()

    def rows(self, kind: str) -> Tensor | None:
        found = list(self.store.rows(kind, self.parts))
        return torch.cat(found) if found else None


@dataclass(frozen=True)
class Reference:
    """What generated images are compared with: images, stored moments, or both (ADM's file)."""

    name: str
    side: ImageSide | None
    stored: StoredReference | None

    @cached_property
    def features(self) -> Moments:
        moments = self._moments("features")
        assert moments is not None
        return moments

    @cached_property
    def spatial(self) -> Moments | None:
        return self._moments("spatial")

    def _moments(self, kind: str) -> Moments | None:
        if self.stored is not None:
            return getattr(self.stored, kind)
        assert self.side is not None
        return self.side.moments(kind)

    def rows(self) -> Tensor | None:
        """Features for precision and recall; None where only moments are stored."""
        found = self.side.rows("features") if self.side is not None else None
        return self.stored.features_NF if found is None and self.stored is not None else found

    def check(self, extractor: FeatureExtractor) -> None:
        """Raise UserError where moments were stored of other features."""
        if (found := self.stored) is None:
            return
        if found.extractor not in (None, extractor.name):
            raise UserError(
                f"``reference`` {self.name}: holds moments of {found.extractor} features, not of {extractor.name}; "
                "choose the same ``features``"
            )
        pairs = (("", found.features, extractor.num_features), ("spatial ", found.spatial, extractor.num_spatial))
        for kind, moments, expected in pairs:
            if moments is not None and expected and moments.num_features != expected:
                raise UserError(
                    f"``reference`` {self.name}: holds moments of {moments.num_features} {kind}features, "
                    f"``features`` {extractor.name} gives {expected}; ADM's files want ``features`` inception"
                )

    def as_stored(self, extractor: FeatureExtractor) -> StoredReference:
        """For a file that later evaluations take as their reference."""
        return StoredReference(self.features, self.spatial, extractor.name, _some(self.rows(), MAX_REFERENCE))


def _some(rows_NF: Tensor | None, count: int) -> Tensor | None:
    """All rows, or a random choice of them that is always the same."""
    if rows_NF is None or len(rows_NF) <= count:
        return rows_NF
    return rows_NF[torch.randperm(len(rows_NF), generator=torch.Generator().manual_seed(0))[:count]]


def measure_images(
    extractor: FeatureExtractor, generated: ImageSide, reference: Reference, other: ImageSide | None = None
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
    logits, kid, precision, recall, floor = generated.rows("logits"), None, None, None, None
    rows, real_rows = _some(generated.rows("features"), MAX_GENERATED), _some(reference.rows(), MAX_REFERENCE)
    assert rows is not None
    if real_rows is not None and min(len(rows), len(real_rows)) > NEIGHBORS:
        precision, recall = precision_recall(real_rows, rows, NEIGHBORS, device=generated.device)
        kid = kernel_distance(real_rows.to(generated.device), rows.to(generated.device))
    if other is not None and features.images >= 2:
        moments = other.moments("features", first=features.images)
        assert moments is not None and moments.images is not None
        floor = Floor(frechet_distance(moments, reference.features), moments.images, other.source.name)
    report = ImageReport(
        images=features.images,
        size=generated.source.size,
        reference=reference.name,
        reference_images=reference.features.images,
        features=extractor.name,
        num_features=extractor.num_features,
        fid=frechet_distance(features, reference.features),
        kid=kid,
        sfid=None if spatial is None or reference.spatial is None else frechet_distance(spatial, reference.spatial),
        num_spatial=extractor.num_spatial,
        inception_score=None if logits is None else inception_score(logits),
        precision=precision,
        recall=recall,
        covered_generated=len(rows),
        covered_reference=0 if real_rows is None else len(real_rows),
        floor=floor,
    )
    return replace(report, notes=tuple(_notes(report, extractor, [generated, reference.side])))


def _notes(report: ImageReport, extractor: FeatureExtractor, sides: list[ImageSide | None]) -> Iterator[str]:
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
        reason = f"more than {report.neighbors} images of each are needed"
        if not report.covered_reference:
            reason = "the reference file holds moments alone, and no images or features"
        yield f"KID, precision and recall left out: {reason}."
    if name == "classifier":
        yield "All numbers are by the data set's own classifier: compare them among runs on this data alone."
    if any(side is not None and any(map(bool, side.store.rows("enlarged", side.parts))) for side in sides):
        yield "Some reference images were smaller than the generated ones and enlarged: figures are of blurred ones."
