"""The images that `mvar sample` makes: their names and seeds, the folder that holds them, and the work of a process.

One PNG for each image, written aside and renamed: what is in the folder is whole, and is not made again.

B batch, N images, HW pixels.
"""

from __future__ import annotations

import hashlib
import json
import random
import resource
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image

from mvar_lightning.checkpoints.source import NO_CLASS, Source
from mvar_lightning.errors import UserError
from mvar_lightning.sampling import generate
from mvar_lightning.sampling.noise import NUM_SEEDS
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.tools.compute import computing
from mvar_lightning.tools.drawing import PictureWriter, enlarge, from_image, make_grid, to_png
from mvar_lightning.tools.files import claim, write
from mvar_lightning.transformer import NextScaleTransformer
from mvar_lightning.transformer.acceleration import prepare

SETTINGS_FILE, GRID_FILE, ARCHIVE_FILE = "sampling.json", "grid.png", "samples.npz"
GRID_CLASSES, GRID_COLUMNS = 16, 16


@dataclass(frozen=True)
class Job:
    """One image: its class (NO_CLASS for none) and its own seed, the one to give to `generate`."""

    label: int
    seed: int

    @property
    def file(self) -> str:
        label = "none" if self.label == NO_CLASS else f"{self.label:04d}"
        return f"{label}_{self.seed:010d}.png"


class Picture(Protocol):
    """An image file in a folder, and its class (NO_CLASS where that is not known)."""

    @property
    def file(self) -> str: ...
    @property
    def label(self) -> int: ...


@dataclass(frozen=True)
class Task:
    """What a process needs to know to do its share; plain values, so that it can be sent."""

    source: Source
    settings: dict[str, Any]
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


def list_jobs(labels: Sequence[int], count: int, seed: int) -> list[Job]:
    """``count`` images of each class, class after class.

    A class' seeds are consecutive numbers from a start that depends on ``seed`` and the class: they do not change
    when more images or classes are asked for, and another ``seed`` gives other ones.
    """
    starts = {label: zlib.crc32(f"{seed}/{label}".encode()) for label in labels}
    return [Job(label, (starts[label] + index) % NUM_SEEDS) for label in labels for index in range(count)]


P = TypeVar("P")


def mixed(pictures: Sequence[P]) -> list[P]:
    """In a random order that is always the same.

    ADM's evaluator takes the Inception score of 5,000 images in a row: sorted by class, they would show a few classes.
    """
    return random.Random(0).sample(pictures, len(pictures))


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder and note the settings in it, or check that it was made with the same.

    Raises:
        UserError: it cannot be written, or holds images of other settings.
    """
    try:
        claim(
            folder / SETTINGS_FILE,
            settings,
            lambda name, theirs, ours: (
                f"--out {folder}: holds images with {name} {theirs}, these have {ours}; choose another --out folder"
            ),
        )
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror}); choose another folder") from error


def weights_hash(*modules: NextScaleTransformer | MultiScaleTokenizer) -> str:
    """SHA-256 over all parameters as they are stored, and over what has none: attention, kernel size, scales."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(json.dumps(module.config, sort_keys=True).encode())
        for name, parameter in sorted(module.named_parameters()):
            digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
            digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
                image_B3HW = generate(model, tokenizer, labels, seeds=seeds, return_tokens=False, **task.settings)
            if not torch.isfinite(image_B3HW).all():
                raise UserError(
                    f"sampled images of class {labels[0]}, seed {seeds[0]} and those with it: some pixels are NaN or "
                    "infinite; the weights are damaged, give an earlier checkpoint"
                )
            writer.add(zip(image_B3HW.cpu(), [task.folder / job.file for job in batch], strict=True))
            if first + len(batch) == len(jobs):
                writer.wait()
            send(Report(rank, len(batch), time.perf_counter() - start, peak_bytes(device)))


def peak_bytes(device: torch.device) -> int:
    """Most memory held so far: of the GPU's allocator, or on a CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


def write_grid(folder: Path, jobs: Sequence[Job]) -> Path:
    """The first images of the first classes (16 x 16 at most), a row for each class."""
    rows: dict[int, list[Job]] = {}
    for job in jobs:
        rows.setdefault(job.label, []).append(job)
    shown = [row[:GRID_COLUMNS] for row in list(rows.values())[:GRID_CLASSES]]
    images = []
    for job in (job for row in shown for job in row):
        with Image.open(folder / job.file) as image:
            images.append(from_image(image))
    to_png(make_grid(enlarge(torch.stack(images)), columns=len(shown[0])), folder / GRID_FILE)
    return folder / GRID_FILE


def write_archive(folder: Path, jobs: Sequence[Picture], file: Path | None = None) -> Path:
    """All images of a folder as one npz, in this order, one at a time: ``arr_0`` uint8 (N, H, W, 3), ``arr_1`` int64
    labels (N,). What the ADM (guided-diffusion) evaluator reads. Left alone where it already holds these images.

    ``file`` is in the same folder unless given.
    """
    file = folder / ARCHIVE_FILE if file is None else file
    labels_N, digest = np.array([job.label for job in jobs], dtype=np.int64), _digest_of(folder, jobs)
    if file.exists() and _comment_of(file) == digest:
        return file
    try:
        write(file, lambda stream: _write_npz(stream, folder, jobs, labels_N, digest))
    except OSError as error:
        raise UserError(
            f"{file}: cannot be written ({error.strerror}); free some space or choose another --out"
        ) from error
    return file


def _write_npz(stream: Any, folder: Path, jobs: Sequence[Picture], labels_N: np.ndarray, digest: bytes) -> None:
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = digest
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            for index, job in enumerate(jobs):
                pixels_HW3 = np.asarray(Image.open(folder / job.file).convert("RGB"))
                if index == 0:
                    shape = (len(jobs), *pixels_HW3.shape)
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_2_0(member, header)  # type: ignore[no-untyped-call]
                member.write(pixels_HW3.tobytes())
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, labels_N, allow_pickle=False)


def _digest_of(folder: Path, jobs: Sequence[Picture]) -> bytes:
    """Changes if the pictures do: files made anew under the same names have other times."""
    digest = hashlib.sha256()
    for job in jobs:
        about = (folder / job.file).stat()
        digest.update(f"{job.file}/{about.st_size}/{about.st_mtime_ns}\n".encode())
    return digest.digest()


def _comment_of(file: Path) -> bytes:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.comment
    except zipfile.BadZipFile:
        return b""


def make_missing(task: Task, jobs: Sequence[Job], processes: int) -> str:
    """Make what is not there yet, with a progress bar; says what was made, how fast, and the peak memory."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mvar_lightning.tools.processes import spread

    missing = [job for job in jobs if not (task.folder / job.file).exists()]
    if not missing:
        return "all of them there already"
    latest: dict[int, Report] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        shown = bar.add_task("images", total=len(jobs), completed=len(jobs) - len(missing))

        def receive(report: Report) -> None:
            latest[report.rank] = report
            bar.advance(shown, report.images)

        spread(partial(make_images, task), missing, processes, task.device, receive)
    speed = len(missing) / max(report.seconds for report in latest.values())
    peak = max(report.peak_bytes for report in latest.values()) / 2**30
    each = "" if processes == 1 else " in the largest process"
    return f"{len(missing)} made now at {speed:.1f} images/s, peak memory {peak:.2f} GiB{each}"
