"""Evaluation of a model's images, or of given ones, that goes on where it stopped: sampling, features, numbers, files.

N images, HW pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvar_lightning.checkpoints.source import NO_CLASS
from mvar_lightning.evaluation.feature_store import FeatureStore, extract_part
from mvar_lightning.evaluation.image_plan import Plan, time_features, time_sampling
from mvar_lightning.evaluation.image_report import ImageReport, write_image_report
from mvar_lightning.evaluation.image_request import (
    EvaluateImagesRequest,
    Generated,
    RealImages,
    open_generated,
    open_real,
)
from mvar_lightning.evaluation.image_sources import ArchiveImages, FolderImages, ImageSource
from mvar_lightning.evaluation.images import ImageSide, Reference, measure_images
from mvar_lightning.metrics import FeatureExtractor
from mvar_lightning.sampling.jobs import (
    ARCHIVE_FILE,
    SETTINGS_FILE,
    bytes_of,
    check_gpus,
    claim_folder,
    make_missing,
    mixed,
    write_archive,
)
from mvar_lightning.tools.compute import choose_device
from mvar_lightning.tools.console import progress
from mvar_lightning.tools.files import check_folder
from mvar_lightning.tools.processes import spread

SHOWN = 64
"""Images of the report's picture."""


class EvaluatedImages(NamedTuple):
    """The numbers, and the files they and the images went to."""

    report: ImageReport
    files: list[Path]


def evaluate_images(request: EvaluateImagesRequest, say: Callable[[str], None] = lambda line: None) -> EvaluatedImages:
    """Sample what is missing, take features, compare, and write the report; started again, it goes on.

    Args:
        request: what is compared with what.
        say: is told the plan, and what was sampled, in lines.

    Raises:
        UserError: input that is missing, damaged or does not fit together; a folder of other work; a full disk.
    """
    work = prepare_evaluation(request)
    plan = work.plan()
    say("\n".join(plan.lines()))
    plan.check_disk()
    if sampled := work.sample():
        say(sampled)
    work.extract()
    report = work.report()
    return EvaluatedImages(report, work.write(report))


def plan_evaluation(request: EvaluateImagesRequest) -> Plan:
    """What `evaluate_images` would do, and how long it would take; writes nothing. Raises `UserError` as that does."""
    return prepare_evaluation(request).plan()


def prepare_evaluation(request: EvaluateImagesRequest) -> Evaluation:
    """Open all that a request names, and check that it fits together; writes nothing."""
    device, out = choose_device(request.device), request.folder
    check_gpus(request.devices, device)
    check_folder(out, "``out``")
    if request.save_moments is not None:
        check_folder(Path(request.save_moments).parent, "``save_moments``")
    generated = open_generated(request, out)
    real = open_real(request, generated.source)
    extractor = request.open_extractor(generated.source.size, device)
    work = Evaluation(request, out, device, generated, real, extractor)
    work.check()
    return work


@dataclass(frozen=True)
class Extraction:
    """Takes features of parts (number of the side, number of the part) in one process; can be sent to it."""

    request: EvaluateImagesRequest
    sides: tuple[tuple[ImageSource, FeatureStore], ...]
    device: str

    def __call__(self, items: Sequence[tuple[int, int]], rank: int, send: Callable[[int], None]) -> None:
        device = torch.device(self.device)
        extractor = self.request.open_extractor(self.sides[0][0].size, device)
        for side, part in items:
            source, store = self.sides[side]
            rows = extract_part(extractor, source, part, self.request.batch_size, device, send)
            store.write(part, rows, source.enlarged)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation, from what was asked for to the files."""

    request: EvaluateImagesRequest
    out: Path
    device: torch.device
    generated: Generated
    real: RealImages
    extractor: FeatureExtractor

    @cached_property
    def sides(self) -> dict[str, ImageSide]:
        """All sets of images by name."""
        sources = {"generated": self.generated.source, "reference": self.real.source, "other": self.real.other}
        return {
            name: ImageSide(source, FeatureStore(self.out / "features" / name), self.device)
            for name, source in sources.items()
            if source is not None
        }

    @cached_property
    def reference(self) -> Reference:
        return Reference(self.real.name, self.sides.get("reference"), self.real.stored)

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
        size = self.request.feature_size
        features = {"extractor": self.extractor.name, "network": self._network, "feature_size": size}
        return {**features, **side.source.identity}

    @cached_property
    def _network(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.extractor.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(bytes_of(tensor))
        return digest.hexdigest()

    # -- before it starts

    def plan(self) -> Plan:
        """What is missing, how long it will take (measured on two batches of each kind), and how much disk."""
        jobs, task, processes = self.generated.missing(), self.generated.task, self.request.devices
        numbers = (self.extractor.num_features, self.extractor.num_logits, self.extractor.num_spatial)
        about = (
            f"generated: {self._generated_in_words(len(jobs))}",
            f"reference: {self._reference_in_words()}",
            f"features: {self.extractor.name}, {' + '.join(str(n) for n in numbers if n)} numbers an image",
        )
        seconds, taken = time_sampling(task, jobs) if task is not None and jobs else (0.0, 0.0)
        rows, feature_seconds = self._time_features()
        (height, width), wanted = self.generated.source.size, self._archive is not None and not self._archive.exists()
        return Plan(
            about,
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
            return islice(source.read(part, self.request.batch_size), 2)
        count = min(self.request.batch_size, source.parts[part])
        return repeat(torch.zeros(count, 3, *source.size, dtype=torch.uint8), 2)

    def _generated_in_words(self, missing: int) -> str:
        source = self.generated.source
        images = f"{len(source):,} images of {source.size[1]} x {source.size[0]}"
        if self.generated.task is None:
            return f"{images} in {source.name}"
        each = f"{self.request.count} of each of {self.generated.about['classes']:,} classes"
        return f"{images}, {each}; {len(source) - missing:,} are there already"

    def _reference_in_words(self) -> str:
        parts = [f"{len(self.real.source):,} images"] if self.real.source is not None else []
        if self.real.stored is not None:
            parts.append("stored moments")
        return f"{self.real.name}, {' and '.join(parts)}"

    @property
    def _sources(self) -> list[ImageSource]:
        return [side.source for side in self.sides.values()]

    def _missing_parts(self) -> list[tuple[int, int]]:
        sides = enumerate(self.sides.values())
        return [(number, part) for number, side in sides for part in side.store.missing(side.parts)]

    # -- the work

    def sample(self) -> str:
        """Make the images that are missing; says what was made, nothing of given images."""
        task = self.generated.task
        if task is None:
            return ""
        claim_folder(task.folder, self._sampling_identity)
        return f"{task.folder}: {make_missing(task, self.generated.jobs, self.request.devices)}"

    def extract(self) -> None:
        """Take the features that are missing, and write ``samples.npz``."""
        for side in self.sides.values():
            side.store.claim(self._about(side))
        todo = self._missing_parts()
        if todo:
            sides = tuple((side.source, side.store) for side in self.sides.values())
            work = Extraction(self.request, sides, self.device.type)
            total = sum(self._sources[side].parts[part] for side, part in todo)
            with progress("features of images", total) as bar:
                spread(work, todo, self.request.devices, self.device.type, bar.advance)
        if self._archive is not None:
            write_archive(*self._pictures(), self._archive)

    @property
    def _archive(self) -> Path | None:
        """Where the npz goes; none where it is not wanted, or the images came from one."""
        from_npz = isinstance(self.generated.source, ArchiveImages)
        return None if self.request.no_npz or from_npz else self.out / ARCHIVE_FILE

    def _pictures(self) -> tuple[Path, list[Any]]:
        source = self.generated.source
        assert isinstance(source, FolderImages)
        pictures: Sequence[Any] = self.generated.jobs or [GivenPicture(name) for name in source.files]
        return source.folder, mixed(pictures)

    def report(self) -> ImageReport:
        return measure_images(self.extractor, self.sides["generated"], self.reference, self.sides.get("other"))

    def write(self, report: ImageReport) -> list[Path]:
        """The report's files, and the reference's moments where they are asked for."""
        shown, columns = next(self.generated.source.read(0, SHOWN)), 0
        if self.generated.jobs:
            shown, columns = self._of_many_classes()
        about = {
            **self.generated.about,
            "reference_path": self.request.reference,
            "crop": self.request.crop,
            "resize_ratio": self.request.resize_ratio,
            "features_from": self.request.features,
        }
        written = write_image_report(report, about, shown.float() / 255, columns, self.out)
        if self._archive is not None:
            written.append(self._archive)
        if self.request.save_moments is not None:
            path = Path(self.request.save_moments)
            self.reference.as_stored(self.extractor).save(path)
            written.append(path)
        return written

    def _of_many_classes(self) -> tuple[Tensor, int]:
        """Images of as many classes as fit, and how many stand in a row: those of a class, 0 if it has only one."""
        task, jobs, count = self.generated.task, self.generated.jobs, self.request.count
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
