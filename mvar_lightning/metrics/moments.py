"""Mean and covariance of features: summed in float64, merged over batches and ranks, and kept in files as ADM's.

N images, F features, S spatial features.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvar_lightning.errors import UserError
from mvar_lightning.tools.files import write
from mvar_lightning.tools.tensors import open_arrays, read_array


@dataclass(frozen=True)
class Moments:
    """Mean (F,) and covariance (F, F) in float64 on the CPU; ``images`` is None where a file does not tell it.

    Raises:
        UserError: shapes that do not belong together, numbers that are not finite, or a covariance that is not
            symmetric. That it has no negative variance costs an eigenvalue decomposition: see `check_variances`.
    """

    mean_F: Tensor
    covariance_FF: Tensor
    images: int | None = None

    def __post_init__(self) -> None:
        mean, covariance = tuple(self.mean_F.shape), tuple(self.covariance_FF.shape)
        if len(mean) != 1 or covariance != 2 * mean:
            raise UserError(f"moments: a mean of shape {mean} and a covariance of shape {covariance} do not fit")
        if not (torch.isfinite(self.mean_F).all() and torch.isfinite(self.covariance_FF).all()):
            raise UserError("moments: some are NaN or infinite; compute them again")
        apart = float((self.covariance_FF - self.covariance_FF.T).abs().amax()) if len(self.mean_F) else 0.0
        if apart > self._rounding(float(self.covariance_FF.abs().amax()) if len(self.mean_F) else 0.0):
            raise UserError(f"moments: the covariance is not symmetric, two halves differ by {apart:.3g}; "
                            "compute them again")  # fmt: skip

    def check_variances(self, variance_F: Tensor | None = None) -> None:
        """Raise UserError where a direction has a negative variance: no set of images has such a covariance.

        Args:
            variance_F: the eigenvalues in ascending order, where they are known.
        """
        variance_F = torch.linalg.eigvalsh(self.covariance_FF) if variance_F is None else variance_F
        if len(variance_F) and float(variance_F[0]) < -self._rounding(max(float(variance_F[-1]), 0.0)):
            raise UserError(f"moments: the covariance has a negative variance, {float(variance_F[0]):.3g}; "
                            "compute them again")  # fmt: skip

    def _rounding(self, scale: float) -> float:
        """What is no error yet: float32 files, and the mean's square that was subtracted (images all alike)."""
        return 1e-6 * scale + 1e-10 * float(self.mean_F.square().amax())

    @property
    def num_features(self) -> int:
        return len(self.mean_F)


class FeatureMoments:
    """Float64 sums of features and of their products.

    ``update`` adds rows (N, F), ``merge`` another's sums, ``reduced`` gives the sums over all ranks of the process
    group, ``moments`` the result (covariance over N - 1, as ``numpy.cov``).

    Args:
        num_features: F.
        device: of the sums; with NCCL, the rank's GPU.
    """

    def __init__(self, num_features: int, device: torch.device | str = "cpu") -> None:
        self.num_features = num_features
        self.count = torch.zeros((), dtype=torch.float64, device=device)  # exact up to 2^53
        self.sum_F = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.products_FF = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    @property
    def images(self) -> int:
        return int(self.count)

    def update(self, features_NF: Tensor) -> None:
        """Add rows (N, F) of any floating dtype. Raises UserError for another F or numbers that are not finite."""
        if features_NF.ndim != 2 or features_NF.shape[1] != self.num_features:
            raise UserError(
                f"features of shape {tuple(features_NF.shape)}: these moments are of (images, {self.num_features})"
            )
        # the covariance is a small difference of large sums: float32 would lose it after some thousand images
        features_NF = features_NF.detach().to(self.sum_F.device, torch.float64)
        sum_F = features_NF.sum(dim=0)
        if not torch.isfinite(sum_F).all():
            raise UserError("features: some are NaN or infinite; check the images and the network")
        self.count += len(features_NF)
        self.sum_F += sum_F
        self.products_FF += features_NF.T @ features_NF

    def merge(self, other: FeatureMoments) -> None:
        """Add the images of other sums. Raises UserError for another F."""
        if other.num_features != self.num_features:
            raise UserError(f"moments of {other.num_features} features: these are of {self.num_features}")
        for mine, theirs in zip(self._sums(), other._sums(), strict=True):
            mine += theirs.to(mine.device)

    def reduced(self) -> FeatureMoments:
        """The sums over all ranks, on each of them; a copy of these where there is no process group."""
        # into a copy: these sums may go on to grow, and a second call must not count images twice
        whole = FeatureMoments(self.num_features, self.sum_F.device)
        whole.merge(self)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for total in whole._sums():
                torch.distributed.all_reduce(total)
        return whole

    def moments(self) -> Moments:
        """Mean and covariance. Raises UserError for fewer than two images."""
        if self.images < 2:
            raise UserError(f"moments of {self.images} images: a covariance needs at least two")
        mean_F = self.sum_F / self.count
        covariance_FF = (self.products_FF - self.count * torch.outer(mean_F, mean_F)) / (self.count - 1)
        return Moments(mean_F.cpu(), covariance_FF.cpu(), self.images)

    def _sums(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.count, self.sum_F, self.products_FF


@dataclass(frozen=True)
class StoredReference:
    """What a reference file holds: moments, and where it has them rows of features for precision and recall.

    In a file: ``mu``, ``sigma`` and for sFID ``mu_s``, ``sigma_s``, as in ADM's; ours add ``images``, ``extractor`` and
    ``features`` (N, F).
    """

    features: Moments
    spatial: Moments | None = None
    extractor: str | None = None
    features_NF: Tensor | None = None

    def save(self, path: Path) -> None:
        """Write ``path`` (.npz), aside first and then renamed. Raises UserError where it cannot be written."""
        arrays: dict[str, Any] = {"mu": self.features.mean_F, "sigma": self.features.covariance_FF}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mean_F, "sigma_s": self.spatial.covariance_FF}
        if self.features_NF is not None:
            arrays["features"] = self.features_NF
        arrays = {name: tensor.numpy() for name, tensor in arrays.items()}
        if self.features.images is not None:
            arrays["images"] = np.array(self.features.images)
        if self.extractor is not None:
            arrays["extractor"] = np.array(self.extractor)
        write_arrays(path, arrays)

    @classmethod
    def load(cls, path: Path) -> StoredReference:
        """Read a file of ours or ADM's. Raises UserError where it is no such file."""
        with open_arrays(path) as file:
            missing = [name for name in ("mu", "sigma") if name not in file]
            if missing:
                raise UserError(f"{path}: holds no {missing[0]} (it has {', '.join(file) or 'nothing'}); give stored "
                                "moments, mu and sigma, or images as arr_0")  # fmt: skip
            found = {name: read_array(path, file, name) for name in file if name in _STORED}
        try:
            images = _images(found["images"]) if "images" in found else None
            features = _moments(found, "mu", "sigma", images)
            spatial = _moments(found, "mu_s", "sigma_s", images) if {"mu_s", "sigma_s"} <= found.keys() else None
            rows_NF = torch.from_numpy(_numbers(found, "features")).float() if "features" in found else None
            if rows_NF is not None and rows_NF.shape[1:] != features.mean_F.shape:
                raise UserError(
                    f"features of shape {tuple(rows_NF.shape)}, moments of {features.num_features}; write it again"
                )
            for moments in (features, spatial):
                if moments is not None:
                    moments.check_variances()
        except (ValueError, TypeError, OverflowError) as error:
            raise UserError(f"{path}: {error}") from error
        return cls(features, spatial, str(found["extractor"]) if "extractor" in found else None, rows_NF)


LARGEST_MOMENT = 1e100
"""Far from any feature's, and its square is still a float64."""

_STORED = ("mu", "sigma", "mu_s", "sigma_s", "images", "extractor", "features")


def _images(found: Any) -> int:
    count = np.asarray(found)
    if count.size != 1 or count.dtype.kind not in "iuf" or not 2 <= count.item() < 1e15 or count.item() % 1:
        raise UserError(
            f"images {reprlib.repr(count.tolist())}: must be one whole number of at least 2; write the file again"
        )
    return int(count.item())


def _moments(found: dict[str, Any], mean: str, covariance: str, images: int | None) -> Moments:
    mean_F, covariance_FF = (torch.from_numpy(_numbers(found, name)) for name in (mean, covariance))
    if max((float(part.abs().max()) for part in (mean_F, covariance_FF) if part.numel()), default=0) > LARGEST_MOMENT:
        raise UserError(f"{mean} or {covariance} beyond {LARGEST_MOMENT:g}: are no moments of features")
    if not mean_F.numel():
        raise UserError(f"{mean} is empty: there are no features; write the file again")
    return Moments(mean_F, covariance_FF, images)


def _numbers(found: dict[str, Any], name: str) -> np.ndarray:
    """An array in float64, of any real type, byte order and layout."""
    array = np.asarray(found[name])
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} is of type {array.dtype}; give real numbers")
    return np.ascontiguousarray(array, np.float64).reshape(array.shape)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an npz, whole and on the disk. Raises UserError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, lambda file: np.savez(file, **arrays), durable=True)  # type: ignore[arg-type]
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); free some space or choose another") from error
