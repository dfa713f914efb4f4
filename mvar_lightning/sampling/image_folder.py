"""A folder of sampled images: their names, the settings that all of them were made with, an overview, and one npz.

N images, HW pixels.
"""

from __future__ import annotations

import hashlib
import random
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image

from mvar_lightning.checkpoints.source import NO_CLASS
from mvar_lightning.errors import UserError
from mvar_lightning.tools.drawing import enlarge, from_image, make_grid, to_png
from mvar_lightning.tools.files import claim, write

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


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder and note the settings in it, or check that it was made with the same.

    Raises:
        UserError: it cannot be written, or holds images of other settings.
    """

    def refusal(name: str, theirs: Any, ours: Any) -> str:
        return f"``out`` {folder}: holds images with {name} {theirs}, these have {ours}; choose another ``out`` folder"

    try:
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
            images.append(from_image(image))
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
    labels_N, digest = np.array([job.label for job in jobs], dtype=np.int64), _digest_of(folder, jobs)
    if file.exists() and _comment_of(file) == digest:
        return file
    try:
        write(file, lambda stream: _write_npz(stream, folder, jobs, labels_N, digest))
    except OSError as error:
        raise UserError(
            f"{file}: cannot be written ({error.strerror}); free some space or choose another ``out``"
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
