"""An evaluation of images before it starts: what is asked for, the images that this names, and what it will take."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvar_lightning.checkpoints.source import Source, beside
from mvar_lightning.data.image_data import ShardsDataModule
from mvar_lightning.errors import UserError, check_counts
from mvar_lightning.evaluation.features import OTHER_SPLIT, holds_shards, open_features
from mvar_lightning.evaluation.image_sources import ArchiveImages, FolderImages, ImageSource, ShardImages, open_images
from mvar_lightning.metrics import FeatureExtractor, StoredReference
from mvar_lightning.metrics.copying import LEAST
from mvar_lightning.pyramid import height_width, size_of
from mvar_lightning.sampling.jobs import Job, SampleRequest, make_images, plan_sampling
from mvar_lightning.sampling.sampler import SamplingSettings
from mvar_lightning.tools.tensors import open_arrays


@dataclass(frozen=True)
class EvaluateImagesRequest:
    """Which images are compared with what, and by which features. Can be sent to other processes.

    Args:
        reference: a shard folder, a folder of images, or an npz of images (``arr_0``), of moments, or of both (ADM's).
        source: of a model, ``count`` images of each of whose classes are sampled as `SampleRequest` says; or
        images: a folder of images or an npz instead.
        out: where everything goes; ``evaluation/`` beside the checkpoint or the images if not given.
        split: of a shard folder, ``val`` or ``train``.
        resize_ratio, crop: how shards' images are cut (`runs.run.settle_cutting` tells how a run's were).
        features: ``data`` (a classifier of the shards, trained if there is none), ``inception``, or a TorchScript file.
        feature_size: to which images are resized for a TorchScript file.
        data: shard folder of the classifier, and of class names; the reference if not given.
        save_moments: npz to write the reference's moments to, for later evaluations.
        no_npz: do not write ``samples.npz``.
        no_floor: leave out the FID of other real images.
        memorization: also measure whether images are copies of training images; the reference is what was held out.
        training: those: a shard folder (its training split), a folder of images or an npz; the training split of the
            reference if not given.
        batch_size: images at a time in each process.
        devices: processes of this machine, each on its own GPU; one, or those of torchrun or SLURM, if not given.
        workers: loading processes for shards.
        count, settings, seed, device, precision, quantize, refinement, refinement_passes: as of `SampleRequest`.

    Raises:
        UserError: not exactly one of ``source`` and ``images``, a number out of range, no features, or no npz's name.
    """

    reference: str
    source: Source | None = None
    images: str | None = None
    out: str | Path | None = None
    split: str = "val"
    resize_ratio: float = 1.125
    crop: str = "center"
    features: str = "data"
    feature_size: int | None = None
    data: str | None = None
    save_moments: str | None = None
    no_npz: bool = False
    no_floor: bool = False
    memorization: bool = False
    training: str | None = None
    batch_size: int = 16
    devices: int | None = None
    workers: int = 0
    count: int = 50
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    quantize: str | None = None
    refinement: str | None = None
    refinement_passes: Mapping[int, Sequence[int]] | None = None

    def __post_init__(self) -> None:
        check_counts(**{name: getattr(self, name) for name in ("count", "batch_size", "devices", "feature_size")})
        if (self.source is None) == (self.images is None):
            raise UserError("evaluate images: give one of source and images")
        if self.features == "none":
            raise UserError(
                "``features`` none: every number needs features; choose data, inception or a TorchScript file"
            )
        if self.save_moments is not None and Path(self.save_moments).suffix.lower() != ".npz":
            raise UserError(f"``save_moments`` {self.save_moments}: give a name that ends in .npz")
        if self.memorization and self.split == "train":
            raise UserError("``memorization``: the reference must be images that were held out; choose ``split`` val")
        if self.training is not None and not self.memorization:
            raise UserError("``training``: is for ``memorization`` alone; ask for that, too")
        if self.workers < 0:
            raise UserError(f"``workers`` {self.workers}: must be 0 or more")

    @property
    def folder(self) -> Path:
        if self.out is not None:
            return Path(self.out)
        return beside(self.source.path if self.source is not None else str(self.images))

    def open_extractor(self, size: tuple[int, int], device: torch.device) -> FeatureExtractor:
        """The features of generated images of one size, on their device.

        A classifier is of the shards of ``data``, else of the reference. Raises UserError as `open_features`.
        """
        data = None
        path = self.data or (self.reference if holds_shards(self.reference) else None)
        if self.features == "data" and path is not None:
            data = ShardsDataModule(
                path, size_of(*size), 64, num_workers=self.workers, resize_ratio=self.resize_ratio, val_crop=self.crop
            )
            data.setup("validate")
        others = "inception or a TorchScript file"  # none leaves no number
        extractor = open_features(self.features, self.feature_size, data, self.folder, device, others)
        assert extractor is not None
        return extractor.to(device)


@dataclass(frozen=True)
class Generated:
    """The images to evaluate, and how to make them where they are a model's.

    Args:
        source: of the images; their files need not be there yet.
        task, jobs: of the sampling; None and empty for given images.
        about: for the report.
    """

    source: ImageSource
    task: SampleRequest | None
    jobs: Sequence[Job]
    about: dict[str, Any]

    def missing(self) -> list[Job]:
        folder = self.task.folder if self.task is not None else Path()
        return [job for job in self.jobs if not (folder / job.file).exists()]


def open_generated(request: EvaluateImagesRequest, out: Path) -> Generated:
    if request.images is not None:
        return Generated(open_images(Path(request.images)), None, [], {"images_from": request.images})
    assert request.source is not None
    names = "count settings seed device precision batch_size devices quantize refinement refinement_passes"
    same = {name: getattr(request, name) for name in names.split()}
    source = request.source.inside_run()
    plan = plan_sampling(SampleRequest(source, out / "samples", classes="all", **same))
    classes = plan.num_classes
    identity = {**plan.identity, "classes": classes, "count": request.count, "seed": request.seed}
    images = FolderImages(plan.task.folder, [job.file for job in plan.jobs], identity, height_width(plan.image_size))
    about = {name: value for name, value in identity.items() if name != "precision"}  # the report has one of its own
    about |= {"checkpoint": source.path, "sampled_in": plan.identity["precision"]}
    if source.refiner is not None:
        about |= {"refiner": source.refiner}
    return Generated(images, plan.task, plan.jobs, about)


class RealImages(NamedTuple):
    """What generated images are compared with; None for what there is not.

    Args:
        name: for people.
        source: of the images.
        stored: moments of their features, as a file holds them.
        other: real images that are not the reference's.
        training: those of the memorization test.
    """

    name: str
    source: ImageSource | None = None
    stored: StoredReference | None = None
    other: ImageSource | None = None
    training: ImageSource | None = None


def open_real(request: EvaluateImagesRequest, generated: ImageSource) -> RealImages:
    """The reference that a request names. Raises `UserError` where it is none, or for images of another size."""
    real = _open_reference(request, generated)
    if request.memorization:
        if real.source is None:
            raise UserError(
                f"``memorization``: ``reference`` {request.reference} holds moments alone; give held-out images"
            )
        for name, images in (("generated", generated), ("``reference``", real.source)):
            if len(images) < LEAST:
                raise UserError(f"``memorization``: {len(images)} {name} images; it takes {LEAST} of each")
        real = real._replace(training=_open_training(request, generated))
    for name, other in (("reference", real.source), ("training", real.training)):
        if other is not None and other.size != generated.size:
            (height, width), (high, wide) = generated.size, other.size
            raise UserError(
                f"``{name}`` {other.name}: its images are {wide} x {high}, the generated ones {width} x "
                f"{height}; make both of one size (images of a shard folder are cut to it)"
            )
    return real


def _open_training(request: EvaluateImagesRequest, generated: ImageSource) -> ImageSource:
    path = request.training or request.reference
    if holds_shards(path):
        size = size_of(*generated.size)
        return ShardImages(path, "train", size, request.crop, request.resize_ratio, request.workers)
    if request.training is None:
        raise UserError(f"``memorization``: {path} holds no training split; name the training images with ``training``")
    return open_images(Path(path))


def _open_reference(request: EvaluateImagesRequest, generated: ImageSource) -> RealImages:
    path = Path(request.reference)
    if path.suffix.lower() == ".npz":
        with open_arrays(path) as file:
            held = set(file)
        stored = StoredReference.load(path) if "mu" in held or "arr_0" not in held else None
        return RealImages(str(path), ArchiveImages(path) if "arr_0" in held else None, stored)
    if path.is_file():
        raise UserError(f"``reference`` {path}: is a file, but no npz; give a folder of shards or images, or an npz")
    if not holds_shards(path):
        return RealImages(str(path), FolderImages(path))
    cutting = (size_of(*generated.size), request.crop, request.resize_ratio, request.workers)
    real, other, other_split = ShardImages(request.reference, request.split, *cutting), None, OTHER_SPLIT[request.split]
    if not request.no_floor and other_split in real.splits:
        other = ShardImages(request.reference, other_split, *cutting, at_least=len(generated))
    return RealImages(real.name, real, other=other)


# What it will take, measured before it starts: time and disk, and whether the disk has the room.

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
    trial = jobs[: 2 * task.batch_size]
    with tempfile.TemporaryDirectory(prefix="mvar-") as folder:
        reports = list(make_images(dataclasses.replace(task, out=folder), trial))
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
