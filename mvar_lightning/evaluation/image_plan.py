"""What an evaluation will take, measured before it starts: time and disk, and whether the disk has the room."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mvar_lightning.errors import UserError
from mvar_lightning.metrics import FeatureExtractor
from mvar_lightning.sampling.jobs import Job, Report, SampleRequest, make_images

SPARE = 1.05
"""So much more room than computed is asked for: file systems round up."""


@dataclass(frozen=True)
class Plan:
    """Work that is left.

    Args:
        about: what is evaluated, in lines for people.
        folder: that all goes to.
        images, sampling_seconds, sampling_bytes: to sample, with all processes at work.
        rows, feature_seconds, feature_bytes: images to take features of; the same.
        archive_bytes: of the npz that is to be written.
    """

    about: tuple[str, ...]
    folder: Path
    images: int = 0
    sampling_seconds: float = 0.0
    sampling_bytes: float = 0.0
    rows: int = 0
    feature_seconds: float = 0.0
    feature_bytes: float = 0.0
    archive_bytes: float = 0.0

    @property
    def bytes(self) -> float:
        return self.sampling_bytes + self.feature_bytes + self.archive_bytes

    def lines(self) -> list[str]:
        seconds = self.sampling_seconds + self.feature_seconds
        return [
            *self.about,
            f"time: {duration(seconds)}, by two batches of each ({self.images:,} images to sample "
            f"{duration(self.sampling_seconds)}, features of {self.rows:,} {duration(self.feature_seconds)}), "
            "then the numbers",
            f"disk: about {size(self.bytes)} (images {size(self.sampling_bytes)}, npz {size(self.archive_bytes)}, "
            f"features {size(self.feature_bytes)}); {size(_free(self.folder))} are free in {self.folder}",
        ]

    def check_disk(self) -> None:
        """Raise UserError where there is not enough room."""
        free = _free(self.folder)
        if self.bytes * SPARE > free:
            raise UserError(
                f"``out`` {self.folder}: needs {size(self.bytes)}, {size(free)} are free; free some space, "
                "choose another ``out``, or leave out the npz with ``no_npz``"
            )


def _free(folder: Path) -> int:
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def duration(seconds: float) -> str:
    """In two units at most."""
    if 0 < seconds < 1:
        return "under 1 s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def size(count: float) -> str:
    """Bytes in a unit of which there are some."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def time_sampling(task: SampleRequest, jobs: Sequence[Job]) -> tuple[float, float]:
    """Seconds and bytes of disk of one image: of a second batch, made in a folder that is then removed.

    Raises:
        UserError: as `make_images`, for instance where the images are not finite.
    """
    reports: list[Report] = []
    trial = jobs[: 2 * task.batch_size]
    with tempfile.TemporaryDirectory(prefix="mvar-") as folder:
        make_images(dataclasses.replace(task, out=folder), trial, 0, reports.append)
        taken = sum(path.stat().st_blocks * 512 for path in Path(folder).iterdir())  # small files fill whole blocks
    seconds, images = reports[-1].seconds, len(trial)
    if len(reports) == 2:  # the first batch warms up
        seconds, images = seconds - reports[0].seconds, reports[1].images
    return seconds / images, taken / len(trial)


def time_features(extractor: FeatureExtractor, batches: Iterator[Tensor], device: torch.device) -> float:
    """Seconds of one image: of a second batch (uint8), read and taken features of."""
    seconds = images = 0.0
    start = time.perf_counter()
    for pixels_B3HW in batches:
        extractor.measure(pixels_B3HW.to(device).float().div(255)).features_BF.cpu()
        now = time.perf_counter()
        seconds, images, start = now - start, len(pixels_B3HW), now
    return seconds / max(images, 1)
