"""The work behind `mvar evaluate images`: what is missing, what it will take, sampling, features, numbers, files.

N images, HW pixels.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvar_lightning.checkpoints.source import NO_CLASS
from mvar_lightning.evaluation.feature_store import FeatureStore, extract_part
from mvar_lightning.evaluation.features import features_of
from mvar_lightning.evaluation.image_plan import Plan, time_features, time_sampling
from mvar_lightning.evaluation.image_sources import ArchiveImages, FolderImages, ImageSource
from mvar_lightning.evaluation.images import SHOWN, ImageReport, ImageSide, Reference, evaluate_images, write_report
from mvar_lightning.metrics import FeatureExtractor, StoredReference
from mvar_lightning.sampling.jobs import (
    ARCHIVE_FILE,
    SETTINGS_FILE,
    Job,
    Task,
    claim_folder,
    make_missing,
    mixed,
    write_archive,
)
from mvar_lightning.tools.console import progress
from mvar_lightning.tools.processes import spread


@dataclass(frozen=True)
class Generated:
    """The images to evaluate, and how to make them where they are a model's.

    Args:
        source: of the images; their files need not be there yet.
        task, jobs: of the sampling; None and empty for given images.
        about: for the report.
    """

    source: ImageSource
    task: Task | None
    jobs: Sequence[Job]
    about: dict[str, Any]

    def missing(self) -> list[Job]:
        folder = self.task.folder if self.task is not None else Path()
        return [job for job in self.jobs if not (folder / job.file).exists()]


@dataclass(frozen=True)
class Extraction:
    """Takes features of parts (number of the side, number of the part) in one process; can be sent to it."""

    args: argparse.Namespace
    sides: tuple[tuple[ImageSource, FeatureStore], ...]
    out: Path
    device: str

    def __call__(self, items: Sequence[tuple[int, int]], rank: int, send: Callable[[int], None]) -> None:
        device = torch.device(self.device)
        extractor = features_of(self.args, self.sides[0][0].size, self.out, device)
        for side, part in items:
            source, store = self.sides[side]
            rows = extract_part(extractor, source, part, self.args.batch_size, device, send)
            store.write(part, rows, source.enlarged)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation, from what was asked for to the files."""

    args: argparse.Namespace
    out: Path
    device: torch.device
    generated: Generated
    reference_name: str
    real: ImageSource | None
    stored: StoredReference | None
    other: ImageSource | None
    extractor: FeatureExtractor

    @cached_property
    def sides(self) -> dict[str, ImageSide]:
        """All sets of images by name."""
        sources = {"generated": self.generated.source, "reference": self.real, "other": self.other}
        return {
            name: ImageSide(source, FeatureStore(self.out / "features" / name), self.device)
            for name, source in sources.items()
            if source is not None
        }

    @cached_property
    def reference(self) -> Reference:
        return Reference(self.reference_name, self.sides.get("reference"), self.stored)

    def check(self) -> None:
        """Raise UserError where the folder holds other work, or the reference file other features; writes nothing."""
        self.reference.check(self.extractor)
        task = self.generated.task
        if task is not None and (task.folder / SETTINGS_FILE).exists():
            claim_folder(task.folder, self._sampling_identity)
        for side in self.sides.values():
            side.store.check(self._about(side))

    @cached_property
    def _sampling_identity(self) -> dict[str, Any]:
        own = ("classes", "count", "seed")  # more images of the same settings are welcome
        return {name: value for name, value in self.generated.source.identity.items() if name not in own}

    def _about(self, side: ImageSide) -> dict[str, Any]:
        told = {"extractor": self.extractor.name, "network": self._network, "feature_size": self.args.feature_size}
        return {**told, **side.source.identity}

    @cached_property
    def _network(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.extractor.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    # -- before it starts

    def plan(self) -> Plan:
        """What is missing, how long it will take (measured on two batches of each kind), and how much disk."""
        jobs, task, processes = self.generated.missing(), self.generated.task, self.args.devices
        numbers = (self.extractor.num_features, self.extractor.num_logits, self.extractor.num_spatial)
        told = (
            f"generated: {self._told_generated(len(jobs))}",
            f"reference: {self._told_reference()}",
            f"features: {self.extractor.name}, {' + '.join(str(n) for n in numbers if n)} numbers an image",
        )
        seconds, taken = time_sampling(task, jobs) if task is not None and jobs else (0.0, 0.0)
        rows, feature_seconds = self._time_features()
        (height, width), wanted = self.generated.source.size, self._archive is not None and not self._archive.exists()
        return Plan(
            told,
            self.out,
            images=len(jobs),
            sampling_seconds=seconds * len(jobs) / processes,
            sampling_bytes=taken * len(jobs),
            rows=rows,
            feature_seconds=feature_seconds / processes,
            feature_bytes=4.0 * sum(numbers) * rows,
            archive_bytes=3.0 * height * width * len(self.generated.source) if wanted else 0.0,
        )

    def _time_features(self) -> tuple[int, float]:
        """Images whose features are missing, and seconds that they will take in one process."""
        rows, seconds, todo = 0, 0.0, self._missing_parts()
        for number, source in enumerate(self._sources):
            parts = [part for side, part in todo if side == number]
            left = sum(source.parts[part] for part in parts)
            if left:
                rows += left
                seconds += left * time_features(self.extractor, self._trial_batches(source, parts[0]), self.device)
        return rows, seconds

    def _trial_batches(self, source: ImageSource, part: int) -> Iterator[Tensor]:
        """The first two batches of a part; of images that are yet to be sampled, two of that size."""
        if self.generated.task is None or source is not self.generated.source:
            return islice(source.read(part, self.args.batch_size), 2)
        count = min(self.args.batch_size, source.parts[part])
        return repeat(torch.zeros(count, 3, *source.size, dtype=torch.uint8), 2)

    def _told_generated(self, missing: int) -> str:
        source = self.generated.source
        told = f"{len(source):,} images of {source.size[1]} x {source.size[0]}"
        if self.generated.task is None:
            return f"{told} in {source.name}"
        classes = self.generated.about["classes"]
        return f"{told}, {self.args.count} of each of {classes:,} classes; {len(source) - missing:,} are there already"

    def _told_reference(self) -> str:
        parts = [f"{len(self.real):,} images"] if self.real is not None else []
        if self.stored is not None:
            parts.append("stored moments")
        return f"{self.reference_name}, {' and '.join(parts)}"

    @property
    def _sources(self) -> list[ImageSource]:
        return [side.source for side in self.sides.values()]

    def _missing_parts(self) -> list[tuple[int, int]]:
        sides = enumerate(self.sides.values())
        return [(number, part) for number, side in sides for part in side.store.missing(side.parts)]

    # -- the work

    def sample(self) -> None:
        """Make the images that are missing."""
        task = self.generated.task
        if task is None:
            return
        claim_folder(task.folder, self._sampling_identity)
        print(f"{task.folder}: {make_missing(task, self.generated.jobs, self.args.devices)}", flush=True)

    def extract(self) -> None:
        """Take the features that are missing, and write ``samples.npz``."""
        for side in self.sides.values():
            side.store.claim(self._about(side))
        todo = self._missing_parts()
        if todo:
            sides = tuple((side.source, side.store) for side in self.sides.values())
            work = Extraction(self.args, sides, self.out, self.device.type)
            total = sum(self._sources[side].parts[part] for side, part in todo)
            with progress("features of images", total) as bar:
                spread(work, todo, self.args.devices, self.device.type, bar.advance)
        if self._archive is not None:
            write_archive(*self._pictures(), self._archive)

    @property
    def _archive(self) -> Path | None:
        """Where the npz goes; none where it is not wanted, or the images came from one."""
        from_npz = isinstance(self.generated.source, ArchiveImages)
        return None if self.args.no_npz or from_npz else self.out / ARCHIVE_FILE

    def _pictures(self) -> tuple[Path, list[Any]]:
        source = self.generated.source
        assert isinstance(source, FolderImages)
        pictures: Sequence[Any] = self.generated.jobs or [GivenPicture(name) for name in source.files]
        return source.folder, mixed(pictures)

    def report(self) -> ImageReport:
        return evaluate_images(self.extractor, self.sides["generated"], self.reference, self.sides.get("other"))

    def write(self, report: ImageReport) -> list[Path]:
        """The report's files, and the reference's moments where they are asked for."""
        shown, columns = next(self.generated.source.read(0, SHOWN)), 0
        if self.generated.jobs:
            shown, columns = self._of_many_classes()
        about = {
            **self.generated.about,
            "reference_path": self.args.reference,
            "crop": self.args.crop,
            "resize_ratio": self.args.resize_ratio,
            "features_from": self.args.features,
        }
        written = write_report(report, about, shown.float() / 255, columns, self.out)
        if self._archive is not None:
            written.append(self._archive)
        if self.args.save_moments is not None:
            path = Path(self.args.save_moments)
            self.reference.as_stored(self.extractor).save(path)
            written.append(path)
        return written

    def _of_many_classes(self) -> tuple[Tensor, int]:
        """Images of as many classes as fit, and how many stand in a row: those of a class, 0 if it has only one."""
        task, jobs, count = self.generated.task, self.generated.jobs, self.args.count
        assert task is not None
        classes = len(jobs) // count
        shown = min(classes, SHOWN)
        each = min(count, SHOWN // shown)
        chosen = [jobs[row * classes // shown * count + index].file for row in range(shown) for index in range(each)]
        images = FolderImages(task.folder, chosen, {}, self.generated.source.size)
        return next(images.read(0, len(chosen))), each if each > 1 else 0


@dataclass(frozen=True)
class GivenPicture:
    """A file of somebody's folder."""

    file: str
    label: int = NO_CLASS
