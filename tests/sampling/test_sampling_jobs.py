"""The images of a folder: written while others are sampled, whole or not there, alike on any number of processes."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults.small_models import SCALES, SIZES, small_model
from PIL import Image

from mvar_lightning import MultiScaleTokenizer, generate, save
from mvar_lightning.checkpoints.source import Source
from mvar_lightning.errors import UserError
from mvar_lightning.sampling import jobs as sampling_jobs
from mvar_lightning.sampling.jobs import SampleRequest, list_jobs, make_images, make_missing, sample_images
from mvar_lightning.tools.ranks import Ranks

Run = Callable[..., int]


def test_channels_that_no_picture_has_leave_nothing(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"channels": 8, "norm_groups": 4, "num_res_blocks": 1, "channel_multipliers": [1]}
    save(tmp_path / "five", small_model(), MultiScaleTokenizer(SCALES, **SIZES, **sizes, image_channels=5))
    with pytest.raises(UserError, match="images of 5 channels: a picture file has"):
        sample_images(SampleRequest(Source(str(tmp_path / "five")), tmp_path / "out", [0], 1))
    assert not (tmp_path / "out").exists()


def pngs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[0-9n]*.png"))}


def test_a_batch_is_written_while_the_next_is_sampled(
    sample: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first batch's files wait for the second one's sampling; written one after another they would wait forever."""
    second = threading.Event()
    calls: list[int] = []
    make, write = sampling_jobs.generate, sampling_jobs.to_png

    def generating(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            second.set()
        return make(*arguments, **named)

    def writing(picture: torch.Tensor, file: Path) -> None:
        assert second.wait(timeout=30), "nothing is sampled meanwhile"
        write(picture, file)

    monkeypatch.setattr(sampling_jobs, "generate", generating)
    monkeypatch.setattr(sampling_jobs, "to_png", writing)
    assert sample(tmp_path, "--classes", "0", "--count", "5", "--batch-size", "2") == 0
    assert len(calls) == 3 and len(pngs(tmp_path)) == 5


def test_a_full_disk_ends_in_one_line_and_what_is_there_counts(
    sample: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--classes", "0", "--count", "9", "--batch-size", "2")
    assert sample(tmp_path / "whole", *arguments) == 0
    files = [job.file for job in list_jobs([0], 9, 0)]
    save = Image.Image.save

    def full(image: Image.Image, file: Path, **named: Any) -> None:
        save(image, file, **named)  # part of it is there when the disk is full
        if files[2] in str(file.name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        assert sample(tmp_path / "full", *arguments) == 2
    error = capsys.readouterr().err
    assert f"{files[2]}: cannot be written (No space left on device)" in error and error.count("\n") == 1
    kept = pngs(tmp_path / "full")
    assert {files[0], files[1]} <= kept.keys() and files[2] not in kept and len(kept) < 9
    assert not list((tmp_path / "full").glob(".*")), "nothing half-written stays"
    assert sample(tmp_path / "full", *arguments) == 0
    assert f"{9 - len(kept)} made now" in capsys.readouterr().out
    for file in files:  # in other batches, so to the last bit of a product
        pixels = [np.asarray(Image.open(tmp_path / folder / file)).astype(int) for folder in ("full", "whole")]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_the_last_batch_is_written_before_it_is_reported(checkpoint: Path, tmp_path: Path) -> None:
    task = SampleRequest(Source(str(checkpoint)), tmp_path, precision="32", batch_size=2, device="cpu")
    there = [len(pngs(tmp_path)) for report in make_images(task, list_jobs([0], 4, 0))]
    assert len(there) == 2 and there[-1] == 4


def test_what_a_last_batch_is_filled_up_to_does_not_depend_on_the_processes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled, an image has the bits of a batch of this size: of three processes one makes the last batch alone."""
    made: list[tuple[int, ...]] = []

    def generating(model: object, tokenizer: object, labels: list[int], *, seeds: list[int], **named: object) -> Any:
        made.append(tuple(seeds))
        return generate(model, tokenizer, labels, seeds=seeds, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(sampling_jobs, "generate", generating)
    monkeypatch.setattr(sampling_jobs, "prepare", lambda *arguments, **named: None)

    def batches(images: int, processes: int) -> set[tuple[int, ...]]:
        made.clear()
        jobs, folder = list_jobs([0], images, 0), tmp_path / f"{images}-{processes}"
        task = SampleRequest(Source(str(checkpoint)), folder, precision="32", batch_size=2, device="cpu", graphs=True)
        folder.mkdir()
        for rank in range(processes):
            whole = [jobs[first : first + 2] for first in range(0, images, 2)]
            list(make_images(task, [job for batch in whole[rank::processes] for job in batch], images))
        return set(made)

    alone = batches(5, 1)
    assert {len(batch) for batch in alone} == {2}
    assert batches(5, 2) == alone and batches(5, 3) == alone


@pytest.mark.slow
def test_a_mistake_in_a_process_is_told_as_one(tmp_path: Path) -> None:
    task = SampleRequest(Source(str(tmp_path / "nothing")), tmp_path, precision="32", batch_size=2, device="cpu")
    with pytest.raises(UserError, match="no such checkpoint"):
        Ranks(here=2).run(make_missing, task, list_jobs([0], 4, 0), {})
