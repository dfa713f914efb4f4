"""Images of chosen classes in a folder, made by any number of processes, going on where an earlier call stopped.

One PNG for each image, written aside and renamed: what is in the folder is whole, and is not made again.

B batch, N images, HW pixels.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image

from mvar_lightning.attention import KeepAll
from mvar_lightning.checkpoints.source import NO_CLASS, Source
from mvar_lightning.data.images import to_rgb
from mvar_lightning.errors import UserError, check_counts
from mvar_lightning.pyramid import Size
from mvar_lightning.sampling.class_choice import class_indices, class_names, owner_of
from mvar_lightning.sampling.draws import NUM_SEEDS
from mvar_lightning.sampling.refinement import open_passes
from mvar_lightning.sampling.sampler import SamplingSettings, generate
from mvar_lightning.sampling.stages import load_stages
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.tools.compute import choose_device, choose_precision, computing, peak_memory_bytes
from mvar_lightning.tools.drawing import PictureWriter, check_drawable, enlarge, from_image, make_grid, to_png
from mvar_lightning.tools.files import check_claim, claim, write
from mvar_lightning.tools.ranks import Ranks
from mvar_lightning.transformer import NextScaleTransformer
from mvar_lightning.transformer.acceleration import prepare
from mvar_lightning.transformer.quantized import check_quantizable
from mvar_lightning.transformer.refinement import Refinement

SETTINGS_FILE, GRID_FILE, ARCHIVE_FILE = "sampling.json", "grid.png", "samples.npz"
GRID_CLASSES, GRID_COLUMNS = 16, 16
OPTIONAL = ("selector", "refinement", "cache_policy", "from_scale")  # noted where they are asked for
MOST_IMAGES = 10_000_000
"""In one folder: a thousand classes, ten thousand images of each."""


@dataclass(frozen=True)
class SampleRequest:
    """Which images of which model, and where they go.

    Args:
        source: of the model.
        out: folder of the images; those that are there already, made with the same settings, are kept.
        classes: indices (-1 is "no class"), or text such as ``3,7``, ``0-9``, ``cat,dog``, ``none``, ``all``;
            all if not given, but of more than 16 only 16, evenly spread, so that a first look is not a day's work.
        count: images of each class; if not given 16, and where 16 of more classes are chosen one.
        settings: how tokens are chosen.
        seed: another one gives other images.
        data: shard folder whose class names may stand in ``classes``.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``auto`` (bf16 on a GPU), ``32`` or ``bf16``.
        batch_size: images at a time in each process.
        devices: processes of this machine, each on its own GPU; one, or those of torchrun or SLURM, if not given.
        compiled: compile the blocks.
        graphs: CUDA graphs of the scales, for strategies that keep no key-value cache.
        refinement, refinement_passes: folder or run of a `Refinement`, which draws some maps' least probable tokens
            anew, and its schedule by scale (`InPasses`).
        quantize: weights of few bits: ``int8``, ``int8-weights`` or ``int4-weights`` (`transformer.quantized`).
        npz: also write all images as one file for ADM's evaluator.

    Raises:
        UserError: a number below 1.
    """

    source: Source
    out: str | Path = "samples"
    classes: str | Sequence[int] | None = None
    count: int | None = None
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    seed: int = 0
    data: str | None = None
    device: str = "auto"
    precision: str = "auto"
    batch_size: int = 16
    devices: int | None = None
    compiled: bool = False
    graphs: bool = False
    npz: bool = False
    quantize: str | None = None
    refinement: str | None = None
    refinement_passes: Mapping[int, Sequence[int]] | None = None

    def __post_init__(self) -> None:
        check_counts(count=self.count, batch_size=self.batch_size, devices=self.devices)

    @property
    def folder(self) -> Path:
        return Path(self.out)


class SampledImages(NamedTuple):
    """What `sample_images` leaves: files in ``folder``, the overview, the npz if wanted, and what it did in words;
    ``classes`` says which were chosen where the request leaves that open and there are many."""

    folder: Path
    files: list[str]
    grid: Path
    npz: Path | None
    made: str
    classes: str = ""


def sample_images(request: SampleRequest) -> SampledImages | None:
    """Make the images of a folder that are missing, with a progress bar; None on all processes but the first.

    Raises:
        UserError: a model that cannot be read, classes that it does not have, or a folder of other settings.
    """
    ranks = Ranks.of(choose_device(request.device).type, request.devices)
    with ranks.agreed():
        plan = plan_sampling(request)
    folder, jobs = request.folder, plan.jobs
    made = ranks.run(make_missing, plan.task, jobs, plan.identity)
    if not ranks.is_first:
        return None
    npz = write_archive(folder, mixed(jobs)) if request.npz else None
    return SampledImages(folder, [job.file for job in jobs], write_grid(folder, jobs), npz, made, plan.classes)


@dataclass(frozen=True)
class Job:
    """One image: its class (NO_CLASS for none) and its own seed, the one to give to `generate`."""

    label: int
    seed: int

    @property
    def file(self) -> str:
        label = "none" if self.label == NO_CLASS else f"{self.label:04d}"
        return f"{label}_{self.seed:010d}.png"


class SamplingPlan(NamedTuple):
    """All images of a request, and what beside class and seed an image follows from.

    ``task`` is the request with its device and precision settled: what a process needs to know to do its share.
    """

    task: SampleRequest
    jobs: list[Job]
    identity: dict[str, Any]
    num_classes: int
    image_size: Size
    classes: str = ""


def plan_sampling(request: SampleRequest) -> SamplingPlan:
    """Read the model once to see what is to be made; each process reads its own. Writes nothing."""
    device = choose_device(request.device)
    task = replace(request, device=device.type, precision=choose_precision(request.precision, device))
    stages, tokenizer = load_stages(request.source, torch.device("cpu"))
    check_drawable(tokenizer.image_channels)
    model = stages.first
    names = class_names(request.data, model.num_classes, request.source)
    labels = class_indices(request.classes, model.num_classes, names, owner_of(request.data))
    count, chosen = request.count or 16, ""
    if request.classes is None and len(labels) > GRID_CLASSES:
        labels, count = labels[:: len(labels) // GRID_CLASSES][:GRID_CLASSES], request.count or 1
        chosen = f"{GRID_CLASSES} of {model.num_classes} classes ({', '.join(map(str, labels[:3]))}, ...); "
        chosen += "--classes 3,7 or --classes all for others"
    identity = {
        **task.settings.arguments(),
        "cfg": task.settings.guidance.cfg,
        "guidance": repr(task.settings.guidance),
        "precision": task.precision,
        "weights": weights_hash(*stages.models, tokenizer),
    }
    if (selector := task.settings.selector) is not None:
        selector.check(model, tokenizer)
        identity["selector"] = selector.identity()
    if (passes := open_passes(request.refinement, request.refinement_passes, stages, tokenizer)) is not None:
        passes.check(stages, task.settings.more_smooth)
        identity["refinement"] = f"{weights_hash(passes.refinement)} {passes.told(stages)}"
    stages.check_policy(policy := identity.pop("cache_policy"))
    if policy not in (None, KeepAll()):
        identity["cache_policy"] = repr(policy)
    if request.source.refiner is not None:
        identity["from_scale"] = request.source.from_scale
    if request.quantize is not None:
        for each in stages.models:
            check_quantizable(each, request.quantize, device)
        identity["precision"] += f", {request.quantize}"
    if (images := len(labels) * count) > MOST_IMAGES:
        raise UserError(f"``count`` {count}: makes {images:,} images; one folder takes {MOST_IMAGES:,}")
    jobs = list_jobs(labels, count, request.seed)
    return SamplingPlan(task, jobs, identity, model.num_classes, tokenizer.image_size, chosen)


# Which seeds.


def list_jobs(labels: Sequence[int], count: int, seed: int) -> list[Job]:
    """``count`` images of each class, class after class.

    A class' seeds are consecutive numbers from a start that depends on ``seed`` and the class: they do not change
    when more images or classes are asked for, and another ``seed`` gives other ones.
    """
    starts = {label: zlib.crc32(f"{seed}/{label}".encode()) for label in labels}
    return [Job(label, (starts[label] + index) % NUM_SEEDS) for label in labels for index in range(count)]


def weights_hash(*modules: NextScaleTransformer | MultiScaleTokenizer | Refinement) -> str:
    """SHA-256 over all parameters as they are stored, and over what has none: attention, kernel size, scales."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(json.dumps(module.config, sort_keys=True).encode())
        for name, parameter in sorted(module.named_parameters()):
            digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
            digest.update(bytes_of(parameter))
    return digest.hexdigest()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A tensor as it lies in memory, of any type."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


# The work.


class Report(NamedTuple):
    """After each batch: images made; seconds of sampling so far, by the clock and of the processor; most bytes held."""

    images: int
    seconds: float
    processor: float
    peak_bytes: int


def make_missing(ranks: Ranks, task: SampleRequest, jobs: Sequence[Job], identity: Mapping[str, Any]) -> str:
    """Make what is not there yet, with a progress bar; says what was made, how fast, and the peak memory.

    It is cut into batches before it is shared, so that no bit depends on the number of processes. Raises `UserError` as
    `claim_folder` and `make_images`, and for processes of other requests or without a common folder.
    """
    ranks.check_same(**{**vars(task), **identity})
    ranks.from_first(lambda: claim_folder(task.folder, identity))
    ranks.check_shared(task.folder)
    missing = ranks.from_first(lambda: [n for n, job in enumerate(jobs) if not (task.folder / job.file).exists()])
    if not missing:
        return "all of them there already"
    batches = [missing[first : first + task.batch_size] for first in range(0, len(missing), task.batch_size)]
    share = [jobs[number] for batch in ranks.share(batches) for number in batch]
    told: list[Report] = []
    with ranks.agreed(), ranks.progress("images", len(share), len(jobs) - len(missing)) as advance:
        for report in make_images(task, share, len(missing)):
            told[:] = [report]
            advance(report.images)
    reports = [report for last in ranks.exchange(told) for report in last]
    speed, most = len(missing) / max(report.seconds for report in reports), max(report.peak_bytes for report in reports)
    own = 1000 * sum(report.processor for report in reports) / len(missing)  # other work of a machine changes it less
    done = f"{len(missing)} made now at {speed:.1f} images/s ({own:.1f} ms of processor time each)"
    return f"{done}, peak memory {most / 2**30:.2f} GiB" + ("" if ranks.size == 1 else " in the largest process")


def make_images(task: SampleRequest, jobs: Sequence[Job], of_all: int | None = None) -> Iterator[Report]:
    """Make the images of ``jobs`` on the device of a plan's ``task``, batch by batch, and report after each: its files
    are written while the next batch is sampled, those of the last before it is reported. ``of_all`` counts the images
    that all processes make together, if these are a share of them.

    Raises:
        UserError: the model cannot be read, or a file not be written.
    """
    if not jobs:
        return
    device = torch.device(task.device)
    stages, tokenizer = load_stages(task.source, device)
    passes = open_passes(task.refinement, task.refinement_passes, stages, tokenizer)
    for model in stages.models:
        prepare(model, task.precision, compiled=task.compiled, graphs=task.graphs, quantized=task.quantize)
    start, used = time.perf_counter(), time.process_time()
    with PictureWriter(to_png) as writer:
        for first in range(0, len(jobs), task.batch_size):
            batch = list(jobs[first : first + task.batch_size])
            # a last, smaller batch would be compiled or recorded anew: fill it up with one of its images, also where
            # this process has no other, for the bits of an image depend on how many are made with it
            several = (of_all or len(jobs)) > task.batch_size
            left = task.batch_size - len(batch) if several and (task.compiled or task.graphs) else 0
            asked = batch + batch[:1] * left
            labels, seeds = [job.label for job in asked], [job.seed for job in asked]
            with computing(task.precision, device):
                arguments = {**task.settings.arguments(), "refinement": passes}
                image_B3HW = generate(stages, tokenizer, labels, seeds=seeds, **arguments).images
            writer.add(zip(image_B3HW[: len(batch)].cpu(), [task.folder / job.file for job in batch], strict=True))
            if first + len(batch) == len(jobs):
                writer.wait()
            yield Report(len(batch), time.perf_counter() - start, time.process_time() - used, peak_memory_bytes(device))


# The folder: the settings that all of its images were made with, an overview, and one npz.


class Picture(Protocol):
    """An image file in a folder, and its class (NO_CLASS where that is not known)."""

    @property
    def file(self) -> str: ...
    @property
    def label(self) -> int: ...


def claim_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder and note the settings in it, or check that it was made with the same.

    Raises:
        UserError: it cannot be written, or holds images of other settings.
    """

    def refusal(name: str, theirs: Any, ours: Any) -> str:
        return f"``out`` {folder}: holds images with {name} {theirs}, these have {ours}; choose another ``out`` folder"

    if (folder / GRID_FILE).exists() and not (folder / SETTINGS_FILE).exists():
        raise UserError(f"``out`` {folder}: holds a {GRID_FILE} of something else; choose another folder")
    try:
        check_claim(folder / SETTINGS_FILE, {**dict.fromkeys(OPTIONAL), **settings}, refusal)
        claim(folder / SETTINGS_FILE, settings, refusal)
    except OSError as error:
        raise UserError(f"``out`` {folder}: cannot be written ({error.strerror}); choose another folder") from error


def write_grid(folder: Path, jobs: Sequence[Job]) -> Path:
    """The first images of the first classes (16 x 16 at most), a row for each class."""
    rows: dict[int, list[Job]] = {}
    for job in jobs:
        rows.setdefault(job.label, []).append(job)
    shown = [row[:GRID_COLUMNS] for row in list(rows.values())[:GRID_CLASSES]]
    images = []
    for job in (job for row in shown for job in row):
        with Image.open(folder / job.file) as image:
            images.append(from_image(to_rgb(image)))
    to_png(make_grid(enlarge(torch.stack(images)), columns=len(shown[0])), folder / GRID_FILE)
    return folder / GRID_FILE


P = TypeVar("P")


def mixed(pictures: Sequence[P]) -> list[P]:
    """In a random order that is always the same.

    ADM's evaluator takes the Inception score of 5,000 images in a row: sorted by class, they would show a few classes.
    """
    return random.Random(0).sample(pictures, len(pictures))


def write_archive(folder: Path, jobs: Sequence[Picture], file: Path | None = None) -> Path:
    """All images of a folder as one npz, in this order, one at a time: ``arr_0`` uint8 (N, H, W, 3), ``arr_1`` int64
    labels (N,). What the ADM (guided-diffusion) evaluator reads. Left alone where it already holds these images.

    ``file`` is in the same folder unless given.
    """
    file = folder / ARCHIVE_FILE if file is None else file
    digest = hashlib.sha256()
    for job in jobs:  # files made anew under the same names have other times
        about = (folder / job.file).stat()
        digest.update(f"{job.file}/{about.st_size}/{about.st_mtime_ns}\n".encode())
    if file.exists():
        with suppress(zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
            if archive.comment == digest.digest():
                return file
    try:
        write(file, lambda stream: _write_npz(stream, folder, jobs, digest.digest()))
    except OSError as error:
        raise UserError(
            f"{file}: cannot be written ({error.strerror}); free some space or choose another ``out``"
        ) from error
    return file


def _write_npz(stream: Any, folder: Path, jobs: Sequence[Picture], digest: bytes) -> None:
    labels_N = np.array([job.label for job in jobs], dtype=np.int64)
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = digest
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            for index, job in enumerate(jobs):
                pixels_HW3 = np.asarray(to_rgb(Image.open(folder / job.file)))
                if index == 0:
                    shape = (len(jobs), *pixels_HW3.shape)
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_2_0(member, header)  # type: ignore[no-untyped-call]
                member.write(pixels_HW3.tobytes())
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, labels_N, allow_pickle=False)
