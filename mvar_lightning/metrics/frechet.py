"""Frechet distance between two sets of images: of their moments, or torchmetrics' FID with any feature extractor.

B batch, F features, R rank of a covariance, HW pixels.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from mvar_lightning.errors import UserError
from mvar_lightning.metrics.features import FeatureExtractor
from mvar_lightning.metrics.moments import Moments, StoredReference


def frechet_distance(one: Moments, other: Moments) -> float:
    """|m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2)), in float64 on the CPU.

    The last trace is the sum of the singular values of the product of their roots: nothing turns complex, and
    a covariance without full rank (fewer images than features) costs no precision.

    Raises:
        UserError: moments of different numbers of features, or a covariance with negative variances (left out, they
            would make the distance too small).
    """
    if one.num_features != other.num_features:
        raise UserError(
            f"Frechet distance: moments of {one.num_features} and of {other.num_features} features; "
            "take both from one extractor"
        )
    apart = (one.mean_F - other.mean_F).square().sum()
    traces = one.covariance_FF.trace() + other.covariance_FF.trace()
    # the roots need not be symmetric: R1^T R2 and the product of symmetric roots have the same singular values
    overlap = torch.linalg.svdvals(_root(one).T @ _root(other)).sum()
    distance = float(apart + traces - 2 * overlap)
    if not math.isfinite(distance):
        raise UserError("Frechet distance: is not finite; one side's moments are damaged or no features' of images")
    return max(distance, 0.0)


def _root(moments: Moments) -> Tensor:
    """(F, R) with root root^T = covariance; directions within rounding of none are left out."""
    variance_F, directions_FF = torch.linalg.eigh(moments.covariance_FF)
    moments.check_variances(variance_F)
    real_F = variance_F > variance_F.amax().clamp_min(0) * len(variance_F) * torch.finfo(torch.float64).eps
    return directions_FF[:, real_F] * variance_F[real_F].sqrt()


def as_saved(image_B3HW: Tensor) -> Tensor:
    """Images in [0, 1] rounded to the 256 levels of a PNG, still floats in [0, 1].

    Published FIDs are of saved files; rounding here (once, to nearest) keeps live numbers equal to those of the files.
    """
    return image_B3HW.float().clamp(0, 1).mul(255).round().div(255)


class TooFewImages(UserError):
    """One image has no covariance."""


ADM_ADDRESS = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
"""Of ADM's reference files; no hash of them is published."""

UNKNOWN_IMAGES = 50_000
"""Stands for the number of images behind stored moments that do not tell it: it cancels out."""


def check_features(moments: Moments, extractor: FeatureExtractor) -> None:
    """Raise `UserError` for moments of another number of features than the extractor's."""
    if moments.num_features != extractor.num_features:
        raise UserError(
            f"reference: its moments are of {moments.num_features} features, {extractor.name} gives "
            f"{extractor.num_features}; take both from one extractor (ADM's files want InceptionFeatures)"
        )


def read_reference(path: str, extractor: FeatureExtractor | None) -> Moments:
    """Moments that belong to the extractor. Raises `UserError`, with the address of ADM's where there is no file."""
    if extractor is None:
        raise UserError(f"reference {path}: needs the extractor that its moments were made with, InceptionFeatures say")
    file = Path(path)
    if not file.is_file():
        raise UserError(
            f"reference {path}: no such file; ADM's are {ADM_ADDRESS}/256/VIRTUAL_imagenet256_labeled.npz and "
            "/512/VIRTUAL_imagenet512.npz; or null, for the images that this run validates on"
        )
    stored = StoredReference.load(file)
    if stored.extractor not in (None, extractor.name):
        raise UserError(f"reference {path}: made with {stored.extractor}, the extractor here is {extractor.name}")
    check_features(stored.features, extractor)
    return stored.features


class _Given(nn.Identity):
    """An extractor for torchmetrics that is given features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


class FrechetDistance:
    """Frechet distance of generated images to real ones, with the real statistics kept between measurements.

    ``normalize`` and ``antialias`` of torchmetrics touch only its built-in Inception network, which is not used here:
    images reach the extractor as floats in [0, 1], rounded to PNG levels. Moments are float64 sums, reduced over
    ranks when ``compute`` is called (on every rank). The metric hangs on no module: it is in no state dict and
    no weight average sees it.

    Args:
        extractor: of the features.
        alone: of this process only, wherever there are others.
    """

    def __init__(self, extractor: FeatureExtractor, alone: bool = False) -> None:
        self.extractor = extractor
        given = _Given(extractor.num_features)
        self._metric = FrechetInceptionDistance(feature=given, reset_real_features=False, sync_on_compute=not alone)
        # torchmetrics notes the dtype at the first update; a rank without images has none and needs it all the same
        self._metric.orig_dtype = torch.float64
        self._counts = {True: 0, False: 0}

    def to(self, device: torch.device | str) -> FrechetDistance:
        self.extractor.to(device)
        self._metric.to(device)
        return self

    def update(self, image_B3HW: Tensor, real: bool) -> Tensor:
        """Add images in [0, 1] to the real or to the generated set; gives their features (B, F)."""
        features_BF = self.features(image_B3HW)
        self.add(features_BF, real)
        return features_BF

    def features(self, image_B3HW: Tensor) -> Tensor:
        """What `add` takes of images in [0, 1]: (B, F)."""
        features_BF: Tensor = self.extractor(as_saved(image_B3HW))
        return features_BF

    def add(self, features_BF: Tensor, real: bool) -> None:
        """Add images by their features."""
        features_BF = features_BF.to(self._metric.device).double()  # so that ``compute`` answers in float64, too
        self._metric.update(features_BF, real=real)
        self._counts[real] += features_BF.shape[0]

    def refer_to(self, moments: Moments) -> None:
        """Take stored moments in place of real images; of several ranks one alone does so.

        Raises:
            UserError: moments of another number of features.
        """
        check_features(moments, self.extractor)
        images = moments.images or UNKNOWN_IMAGES
        mean_F, metric = moments.mean_F, self._metric
        products_FF = moments.covariance_FF * (images - 1) + torch.outer(mean_F, mean_F) * images
        for name, value in (("sum", mean_F * images), ("cov_sum", products_FF), ("num_samples", images)):
            state = getattr(metric, f"real_features_{name}")
            state.copy_(torch.as_tensor(value).to(state.dtype))
        self._counts[True] = moments.images or 0

    def count(self, real: bool) -> int:
        """Images that this rank has added to one of the sets."""
        return self._counts[real]

    def compute(self) -> float:
        """The distance, over the images of all ranks."""
        try:
            return max(float(self._metric.compute()), 0.0)
        except RuntimeError as error:
            if "More than one sample" not in str(error):
                raise
            raise TooFewImages(
                "Frechet distance: needs at least two real and two generated images; raise num_images or the batch size"
            ) from error

    def reset_generated(self) -> None:
        """Forget the generated images; the real ones stay."""
        self._metric.reset()  # of the real side it keeps what it has
        self._metric.orig_dtype = torch.float64
        self._counts[False] = 0
