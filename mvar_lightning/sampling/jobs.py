"""Images of chosen classes in a folder, made in as many processes as wanted, going on where an earlier call stopped.

One PNG for each image, written aside and renamed: what is in the folder is whole, and is not made again.

B batch, N images, HW pixels.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mvar_lightning.checkpoints.source import NO_CLASS, Source
from mvar_lightning.data.index import read_index
from mvar_lightning.errors import UserError, check_counts
from mvar_lightning.sampling.image_folder import Job, claim_folder, mixed, write_archive, write_grid
from mvar_lightning.sampling.noise import NUM_SEEDS
from mvar_lightning.sampling.sampler import SamplingSettings, generate
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.tools.compute import choose_device, choose_precision, computing, peak_memory_bytes
from mvar_lightning.tools.console import progress
from mvar_lightning.tools.drawing import PictureWriter, to_png
from mvar_lightning.tools.processes import spread
from mvar_lightning.transformer import NextScaleTransformer
from mvar_lightning.transformer.acceleration import prepare


@dataclass(frozen=True)
class SampleRequest:
    """Which images of which model, and where they go.

    Args:
        source: of the model.
        out: folder of the images; those that are there already, made with the same settings, are kept.
        classes: indices (-1 is "no class"), or text such as ``3,7``, ``0-9``, ``cat,dog``, ``none``; all if not given.
        count: images of each class.
        settings: how tokens are chosen.
        seed: another one gives other images.
        data: shard folder whose class names may stand in ``classes``.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``auto`` (bf16 on a GPU), ``32`` or ``bf16``.
        batch_size: images at a time in each process.
        devices: processes, each on its own GPU.
        compiled: compile the blocks.
        graphs: CUDA graphs of the scales, for strategies that keep no key-value cache.
        npz: also write all images as one file for ADM's evaluator.

    Raises:
        UserError: a number below 1.
    """

    source: Source
    out: str | Path = "samples"
    classes: str | Sequence[int] | None = None
    count: int = 16
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    seed: int = 0
    data: str | None = None
    device: str = "auto"
    precision: str = "auto"
    batch_size: int = 16
    devices: int = 1
    compiled: bool = False
    graphs: bool = False
    npz: bool = False

    def __post_init__(self) -> None:
        check_counts(count=self.count, batch_size=self.batch_size, devices=self.devices)


class SampledImages(NamedTuple):
    """What `sample_images` leaves: files in ``folder``, the overview, the npz if wanted, and what it did in words."""

    folder: Path
    files: list[str]
    grid: Path
    npz: Path | None
    made: str


def sample_images(request: SampleRequest) -> SampledImages:
    """Make the images of a folder that are missing, with a progress bar.

    Raises:
        UserError: a model that cannot be read, classes that it does not have, or a folder of other settings.
    """
    plan = plan_sampling(request)
    claim_folder(plan.task.folder, plan.identity)
    folder, jobs = plan.task.folder, plan.jobs
    made = make_missing(plan.task, jobs, request.devices)
    npz = write_archive(folder, mixed(jobs)) if request.npz else None
    return SampledImages(folder, [job.file for job in jobs], write_grid(folder, jobs), npz, made)


@dataclass(frozen=True)
class Task:
    """What a process needs to know to do its share; plain values, so that it can be sent."""

    source: Source
    settings: SamplingSettings
    precision: str
    batch_size: int
    device: str
    folder: Path
    compiled: bool = False
    graphs: bool = False


@dataclass(frozen=True)
class Report:
    """Sent after each batch: images made, seconds of sampling so far, most bytes held so far."""

    rank: int
    images: int
    seconds: float
    peak_bytes: int


class SamplingPlan(NamedTuple):
    """All images of a request, the work of a process, and what beside class and seed an image follows from."""

    task: Task
    jobs: list[Job]
    identity: dict[str, Any]
    num_classes: int
    image_size: int


def plan_sampling(request: SampleRequest) -> SamplingPlan:
    """Read the model once to see what is to be made; each process reads its own. Writes nothing."""
    device = choose_device(request.device)
    check_gpus(request.devices, device)
    precision = choose_precision(request.precision, device)
    model, tokenizer = request.source.load(torch.device("cpu"))
    names = class_names(request.data, model.num_classes)
    labels = class_indices(request.classes, model.num_classes, names)
    settings = request.settings
    identity = {
        **settings.arguments(),
        "cfg": settings.guidance.cfg,
        "guidance": repr(settings.guidance),
        "precision": precision,
        "weights": weights_hash(model, tokenizer),
    }
    task = Task(
        request.source,
        settings,
        precision,
        request.batch_size,
        device.type,
        Path(request.out),
        request.compiled,
        request.graphs,
    )
    jobs = list_jobs(labels, request.count, request.seed)
    return SamplingPlan(task, jobs, identity, model.num_classes, tokenizer.image_size)


def check_gpus(devices: int, device: torch.device) -> None:
    """Raise `UserError` for more processes than there are GPUs for them."""
    if device.type == "cuda" and devices > torch.cuda.device_count():
        raise UserError(f"``devices`` {devices}: there are {torch.cuda.device_count()} GPUs here")


# Which classes, and which seeds.


def class_names(data: str | None, num_classes: int) -> Sequence[str]:
    """Class names of a shard folder, none without one. Raises `UserError` where they do not fit the model."""
    if data is None:
        return ()
    names = read_index(data).class_names
    if len(names) != num_classes:
        raise UserError(f"``data`` {data}: has {len(names)} classes, the model {num_classes}; give its own data folder")
    return names


def class_indices(classes: str | Sequence[int] | None, num_classes: int, names: Sequence[str] = ()) -> list[int]:
    """Classes, each once, from indices or text such as ``3,7``, ``0-9``, ``cat,dog`` or ``none``; all where None.

    Raises:
        UserError: a class that the model does not have, or a name that is not known.
    """
    if classes is None:
        return list(range(num_classes))
    if not isinstance(classes, str):
        classes, names = ",".join("none" if label == NO_CLASS else str(label) for label in classes), ()
    indices = [index for part in classes.split(",") for index in _classes_of(part.strip(), num_classes, names)]
    return list(dict.fromkeys(indices))


def _classes_of(part: str, num_classes: int, names: Sequence[str]) -> Sequence[int]:
    if part in names:
        return [names.index(part)]
    if part == "none":
        return [NO_CLASS]
    first, dash, last = part.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        known = f"``data`` names {', '.join(names[:5])}, ..." if names else "to use names give ``data`` FOLDER"
        raise UserError(f"class {part!r}: must be an index from 0 to {num_classes - 1} or a known name; {known}")
    chosen = range(int(first), int(last if dash else first) + 1)
    if not chosen or chosen[-1] >= num_classes:
        raise UserError(f"class {part}: the model knows classes 0 to {num_classes - 1}")
    return chosen


def list_jobs(labels: Sequence[int], count: int, seed: int) -> list[Job]:
    """``count`` images of each class, class after class.

    A class' seeds are consecutive numbers from a start that depends on ``seed`` and the class: they do not change
    when more images or classes are asked for, and another ``seed`` gives other ones.
    """
    starts = {label: zlib.crc32(f"{seed}/{label}".encode()) for label in labels}
    return [Job(label, (starts[label] + index) % NUM_SEEDS) for label in labels for index in range(count)]


def weights_hash(*modules: NextScaleTransformer | MultiScaleTokenizer) -> str:
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


def make_missing(task: Task, jobs: Sequence[Job], processes: int) -> str:
    """Make what is not there yet, with a progress bar; says what was made, how fast, and the peak memory."""
    missing = [job for job in jobs if not (task.folder / job.file).exists()]
    if not missing:
        return "all of them there already"
    latest: dict[int, Report] = {}
    with progress("images", len(jobs), done=len(jobs) - len(missing)) as bar:

        def receive(report: Report) -> None:
            latest[report.rank] = report
            bar.advance(report.images)

        spread(partial(make_images, task), missing, processes, task.device, receive)
    speed = len(missing) / max(report.seconds for report in latest.values())
    peak = max(report.peak_bytes for report in latest.values()) / 2**30
    each = "" if processes == 1 else " in the largest process"
    return f"{len(missing)} made now at {speed:.1f} images/s, peak memory {peak:.2f} GiB{each}"


def make_images(task: Task, jobs: Sequence[Job], rank: int, send: Callable[[Report], None]) -> None:
    """Make the images of ``jobs``, batch by batch, and report after each: its files are written while the next batch is
    sampled, those of the last before it is reported.

    Raises:
        UserError: the model cannot be read, or a file not be written.
    """
    device = torch.device(task.device)
    model, tokenizer = task.source.load(device)
    prepare(model, task.precision, compiled=task.compiled, graphs=task.graphs)
    start = time.perf_counter()
    with PictureWriter(to_png) as writer:
        for first in range(0, len(jobs), task.batch_size):
            batch = jobs[first : first + task.batch_size]
            labels, seeds = [job.label for job in batch], [job.seed for job in batch]
            with computing(task.precision, device):
                image_B3HW = generate(model, tokenizer, labels, seeds=seeds, **task.settings.arguments()).images
            if not torch.isfinite(image_B3HW).all():
                raise UserError(
                    f"sampled images of class {labels[0]}, seed {seeds[0]} and those with it: some pixels are NaN or "
                    "infinite; the weights are damaged, give an earlier checkpoint"
                )
            writer.add(zip(image_B3HW.cpu(), [task.folder / job.file for job in batch], strict=True))
            if first + len(batch) == len(jobs):
                writer.wait()
            send(Report(rank, len(batch), time.perf_counter() - start, peak_memory_bytes(device)))
