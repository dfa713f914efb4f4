"""Features of a set of images on disk, part by part: what is there is whole, and is not computed again.

A folder holds `about.json` (which images, which features) and `part-00000.npz` and so on, each with ``features``
(N, F) float32 and, where the extractor offers them, ``logits`` (N, C) and ``spatial`` (N, S).

N images of a part, F features, C classes, S spatial features, B batch, HW pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvar_lightning.errors import UserError
from mvar_lightning.evaluation.image_sources import ImageSource
from mvar_lightning.metrics import FeatureExtractor, FeatureMoments
from mvar_lightning.metrics.moments import DAMAGED, open_arrays, write_arrays
from mvar_lightning.tools.files import check_claim, claim

ABOUT = "about.json"
KINDS = ("features", "logits", "spatial")


class FeatureStore:
    """The features of one set of images in a folder. Can be sent to other processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

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
                    rows = file[kind]
            except (UserError, *DAMAGED) as error:
                raise UserError(f"{self._file(part)}: damaged; remove it and run the command again") from error
            yield torch.from_numpy(rows)

    def enlarged(self, parts: int) -> bool:
        """Whether any image was smaller than what it was cut to."""
        return any(bool(rows) for rows in self.rows("enlarged", parts))

    def all_rows(self, kind: str, parts: int, first: int | None = None) -> Tensor | None:
        """The rows of all parts together, or of the first images alone; None where there are none."""
        found = list(self.rows(kind, parts))
        return torch.cat(found)[:first] if found else None

    def moments(self, kind: str, parts: int, first: int | None = None, device: Any = "cpu") -> FeatureMoments | None:
        """Float64 sums over all images, or over the first alone; None where the extractor does not offer the kind."""
        sums: FeatureMoments | None = None
        for rows_NF in self.rows(kind, parts):
            if sums is None:
                sums = FeatureMoments(rows_NF.shape[1], device)
            left = len(rows_NF) if first is None else first - sums.images
            if left > 0:
                sums.update(rows_NF[:left])
        return sums


def extract_part(
    extractor: FeatureExtractor,
    source: ImageSource,
    part: int,
    batch_size: int,
    device: torch.device,
    report: Callable[[int], None] = lambda images: None,
) -> dict[str, np.ndarray]:
    """The features of one part of a source: (N, F) float32 for each of `KINDS` that the extractor offers.

    Raises:
        UserError: an image that cannot be read, or features that are not finite.
    """
    rows: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    for pixels_B3HW in source.read(part, batch_size):
        found = extractor.measure(pixels_B3HW.to(device).float().div(255))
        for kind, values in zip(KINDS, found, strict=True):
            if values is None:
                continue
            if not torch.isfinite(values).all():
                raise UserError(
                    f"{kind} of images in {source.name}: {extractor.name} gives NaN or infinity; its file is damaged, "
                    "or made for other pixels"
                )
            rows[kind].append(values.cpu().numpy())
        report(len(pixels_B3HW))
    return {kind: np.concatenate(values) for kind, values in rows.items() if values}
