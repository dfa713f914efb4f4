"""Evaluation of a model's images, or of given ones, that goes on where it stopped: sampling, features, numbers, files.

N images, HW pixels.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvar_lightning.checkpoints.source import NO_CLASS
from mvar_lightning.errors import UserError
from mvar_lightning.evaluation.image_request import (
    EvaluateImagesRequest,
    Generated,
    Plan,
    open_generated,
    open_real,
    time_features,
    time_sampling,
)
from mvar_lightning.evaluation.image_sources import ArchiveImages, FolderImages
from mvar_lightning.evaluation.images import FeatureStore, ImageSide, Reference, measure_images
from mvar_lightning.evaluation.memorization import Memorized, measure_memorization
from mvar_lightning.evaluation.reports import ImageReport, write_image_report
from mvar_lightning.metrics import FeatureExtractor
from mvar_lightning.sampling.jobs import (
    ARCHIVE_FILE,
    SETTINGS_FILE,
    bytes_of,
    claim_folder,
    make_missing,
    mixed,
    write_archive,
)
from mvar_lightning.tools.compute import choose_device
from mvar_lightning.tools.files import check_folder
from mvar_lightning.tools.ranks import Ranks

SHOWN = 64
"""Images of the report's picture."""


class EvaluatedImages(NamedTuple):
    """The numbers, and the files they and the images went to."""

    report: ImageReport
    files: list[Path]


def evaluate_images(
    request: EvaluateImagesRequest, say: Callable[[str], None] = lambda line: None
) -> EvaluatedImages | None:
    """Sample what is missing, take features, compare, and write the report; started again, it goes on. None on all
    processes but the first.

    Args:
        request: what is compared with what.
        say: is told the plan, and what was sampled, in lines.

    Raises:
        UserError: input that is missing, damaged or does not fit together; a folder of other work; a full disk.
    """
    ranks = Ranks.of(choose_device(request.device).type, request.devices)
    ranks.check_same(**vars(request))
    with ranks.agreed():
        if ranks.is_first:  # before the others: it trains the classifier where there is none
            work = prepare_evaluation(request)
            plan = work.plan(ranks.processes)
            say("\n".join(plan.lines()))
            plan.check_disk()
    with ranks.agreed():
        if not ranks.is_first:
            work = prepare_evaluation(request, writes=False)
    sampled = work.sample(ranks)
    if sampled and ranks.is_first:
        say(sampled)
    work.extract(ranks)
    if not ranks.is_first:
        return None
    report = work.report()
    return EvaluatedImages(report, work.write(report))


def plan_evaluation(request: EvaluateImagesRequest) -> Plan:
    """What `evaluate_images` would do, and how long it would take; writes nothing. Raises `UserError` as that does."""
    return prepare_evaluation(request).plan(request.devices or 1)


def prepare_evaluation(request: EvaluateImagesRequest, writes: bool = True) -> Evaluation:
    """Open all that a request names, and check that it fits together, and can be written where this process ``writes``;
    leaves nothing behind.

    Raises:
        UserError: as `evaluate_images`, such as where the folder holds other work, or a reference file other features.
    """
    device, out = choose_device(request.device), request.folder
    if writes:
        check_folder(out, "``out``")
    if writes and request.save_moments is not None:
        check_folder(Path(request.save_moments).parent, "``save_moments``")
        _check_nothing_lost(Path(request.save_moments))
    generated = open_generated(request, out)
    real = open_real(request, generated.source)
    extractor = request.open_extractor(generated.source.size, device)
    sources = {
        "generated": generated.source,
        "reference": real.source,
        "other": real.other,
        "training": real.training,
    }
    sides = {
        name: ImageSide(source, FeatureStore(out / "features" / name), device)
        for name, source in sources.items()
        if source is not None
    }
    reference = Reference(real.name, sides.get("reference"), real.stored)
    reference.check(extractor)
    work = Evaluation(request, out, device, generated, sides, reference, extractor)
    if generated.task is not None and (generated.task.folder / SETTINGS_FILE).exists():
        work.claim_samples(generated.task.folder)
    for side in sides.values():
        side.store.check(work.about(side))
    return work


class GivenPicture(NamedTuple):
    """A file of somebody's folder."""

    file: str
    label: int = NO_CLASS


def extract_parts(
    ranks: Ranks, request: EvaluateImagesRequest, sides: Sequence[ImageSide], todo: Sequence[tuple[int, int]]
) -> None:
    """Take features of this process' share of the parts (number of the side, number of the part)."""
    for side in sides:
        ranks.check_shared(side.store.folder)
    share = ranks.share(todo)
    total = sum(sides[number].source.parts[part] for number, part in share)
    with ranks.agreed(), ranks.progress("features of images", total) as advance:
        if not share:
            return
        device = torch.device(ranks.device)
        extractor = request.open_extractor(sides[0].source.size, device)
        for number, part in share:
            replace(sides[number], device=device).extract(extractor, part, request.batch_size, advance)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation, from what was asked for to the files; ``sides`` are all sets of images by name."""

    request: EvaluateImagesRequest
    out: Path
    device: torch.device
    generated: Generated
    sides: dict[str, ImageSide]
    reference: Reference
    extractor: FeatureExtractor

    def claim_samples(self, folder: Path) -> None:
        """Note in a folder what its images follow from. Raises UserError where others lie there."""
        claim_folder(folder, self._settings_of_samples)

    @property
    def _settings_of_samples(self) -> dict[str, Any]:
        own = ("classes", "count", "seed")  # more images of the same settings are welcome
        return {name: value for name, value in self.generated.source.identity.items() if name not in own}

    def about(self, side: ImageSide) -> dict[str, Any]:
        """What the features of a set of images follow from."""
        size = self.request.feature_size
        return {
            "extractor": self.extractor.name,
            "network": self._network,
            "feature_size": size,
            **side.source.identity,
        }

    @cached_property
    def _network(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.extractor.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(bytes_of(tensor))
        return digest.hexdigest()

    def _missing_parts(self) -> list[tuple[int, int]]:
        sides = enumerate(self.sides.values())
        return [(number, part) for number, side in sides for part in side.store.missing(side.parts)]

    @property
    def _archive(self) -> Path | None:
        """Where the npz goes; none where it is not wanted, or the images came from one."""
        from_npz = isinstance(self.generated.source, ArchiveImages)
        return None if self.request.no_npz or from_npz else self.out / ARCHIVE_FILE

    # -- before it starts

    def plan(self, processes: int) -> Plan:
        """What is missing, how long it will take (measured on two batches of each kind), and how much disk."""
        jobs, task = self.generated.missing(), self.generated.task
        numbers = (self.extractor.num_features, self.extractor.num_logits, self.extractor.num_spatial)
        seconds, taken = time_sampling(task, jobs) if task is not None and jobs else (0.0, 0.0)
        rows, feature_seconds = self._time_features()
        (height, width), wanted = self.generated.source.size, self._archive is not None and not self._archive.exists()
        features = f"features: {self.extractor.name}, {' + '.join(str(n) for n in numbers if n)} numbers an image"
        return Plan(
            (*self._in_words(len(jobs)), features),
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
        rows, seconds, todo, batch_size = 0, 0.0, self._missing_parts(), self.request.batch_size
        for number, side in enumerate(self.sides.values()):
            source, parts = side.source, [part for other, part in todo if other == number]
            if not parts:
                continue
            trial = islice(source.read(parts[0], batch_size), 2)
            if source is self.generated.source and self.generated.task is not None:
                # they are yet to be sampled: any two batches of that size
                count = min(batch_size, source.parts[parts[0]])
                trial = islice(repeat(torch.zeros(count, 3, *source.size, dtype=torch.uint8)), 2)
            left = sum(source.parts[part] for part in parts)
            rows, seconds = rows + left, seconds + left * time_features(self.extractor, trial, self.device)
        return rows, seconds

    def _in_words(self, missing: int) -> tuple[str, str]:
        """The generated images, and the reference."""
        source = self.generated.source
        generated = f"generated: {len(source):,} images of {source.size[1]} x {source.size[0]}"
        if self.generated.task is None:
            generated += f" in {source.name}"
        else:
            each = f"{self.request.count} of each of {self.generated.about['classes']:,} classes"
            generated += f", {each}; {len(source) - missing:,} are there already"
        real = self.reference
        parts = [f"{len(real.side.source):,} images"] if real.side is not None else []
        if real.stored is not None:
            parts.append("stored moments")
        return generated, f"reference: {real.name}, {' and '.join(parts)}"

    # -- the work

    def sample(self, ranks: Ranks) -> str:
        """Make the images that are missing; says what was made, nothing of given images."""
        task = self.generated.task
        if task is None:
            return ""
        made = ranks.run(make_missing, task, self.generated.jobs, self._settings_of_samples)
        return f"{task.folder}: {made}"

    def extract(self, ranks: Ranks) -> None:
        """Take the features that are missing; the first process writes ``samples.npz``."""
        sides = tuple(self.sides.values())

        def missing() -> list[tuple[int, int]]:
            for side in sides:
                side.store.claim(self.about(side))
            return self._missing_parts()

        if todo := ranks.from_first(missing):
            ranks.run(extract_parts, self.request, sides, todo)
        if not ranks.is_first:
            return
        if self._archive is not None:
            source = self.generated.source
            assert isinstance(source, FolderImages)
            pictures: Sequence[Any] = self.generated.jobs or [GivenPicture(name) for name in source.files]
            write_archive(source.folder, mixed(pictures), self._archive)

    def report(self) -> ImageReport:
        report = measure_images(self.extractor, self.sides["generated"], self.reference, self.sides.get("other"))
        return report if self._memorized is None else replace(report, memorization=self._memorized.numbers)

    @cached_property
    def _memorized(self) -> Memorized | None:
        names = ("generated", "reference", "training")
        return measure_memorization(*map(self.sides.__getitem__, names)) if self.request.memorization else None

    def write(self, report: ImageReport) -> list[Path]:
        """The report's files, and the reference's moments where they are asked for."""
        shown, columns = self._shown()
        about = {
            **self.generated.about,
            "reference_path": self.request.reference,
            "crop": self.request.crop,
            "resize_ratio": self.request.resize_ratio,
            "features_from": self.request.features,
        }
        pairs = None if self._memorized is None else self._memorized.picture_3HW
        written = write_image_report(report, about, shown.float() / 255, columns, self.out, pairs)
        if self._archive is not None:
            written.append(self._archive)
        if self.request.save_moments is not None:
            path = Path(self.request.save_moments)
            self.reference.as_stored(self.extractor).save(path)
            written.append(path)
        return written

    def _shown(self) -> tuple[Tensor, int]:
        """Images of as many classes as fit, and how many stand in a row: those of a class, 0 if it has only one."""
        task, jobs, count = self.generated.task, self.generated.jobs, self.request.count
        if task is None:  # nobody tells the classes of given images
            return next(self.generated.source.read(0, SHOWN)), 0
        classes = len(jobs) // count
        shown = min(classes, SHOWN)
        each = min(count, SHOWN // shown)
        chosen = [jobs[row * classes // shown * count + index].file for row in range(shown) for index in range(each)]
        images = FolderImages(task.folder, chosen, {}, self.generated.source.size)
        return next(images.read(0, len(chosen))), each if each > 1 else 0


def _check_nothing_lost(moments: Path) -> None:
    """Raises `UserError` where a file stands that holds images: the moments would take their place."""
    try:
        with zipfile.ZipFile(moments) as archive:
            images = "arr_0.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return
    if images:
        raise UserError(f"``save_moments`` {moments}: holds images, which would be lost; choose another name")
