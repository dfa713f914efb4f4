"""Images as they grow: a folder's first images after each scale, coarse to fine, as one moving picture.

A folder holds finished images alone. Those that are shown are drawn again from their seeds, which takes a moment and
works for folders of any age.

B images, K scales, HW pixels.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image
from torch import Tensor

from mvar_lightning.errors import UserError
from mvar_lightning.sampling.jobs import GRID_CLASSES, Job, SampleRequest, plan_sampling
from mvar_lightning.sampling.refinement import open_passes
from mvar_lightning.sampling.sampler import generate
from mvar_lightning.sampling.stages import load_stages
from mvar_lightning.tools.compute import computing, evaluating
from mvar_lightning.tools.drawing import as_rgb, enlarge, make_grid, to_image, to_unit
from mvar_lightning.tools.files import write
from mvar_lightning.transformer.acceleration import prepare

FORMATS = ("gif", "webp")
COLUMNS = 8
"""Images of a class that are shown."""

SHOWN_MS, LAST_MS = 600, 2400
"""How long a scale is shown, and the finished images."""


def animate(request: SampleRequest, form: str = "gif") -> Path:
    """Write ``coarse_to_fine.gif`` (or ``.webp``, without loss of colors) beside the images of a request.

    Raises:
        UserError: as of `sample_images`; another form; a folder that cannot be written.
    """
    if form not in FORMATS:
        raise UserError(f"``strips`` {form}: choose one of {', '.join(FORMATS)}")
    plan = plan_sampling(request)
    rows = [[*jobs][:COLUMNS] for _, jobs in groupby(plan.jobs, key=lambda job: job.label)][:GRID_CLASSES]
    after_KB3HW = draw_after_scales(plan.task, [job for row in rows for job in row])
    frames = [to_image(make_grid(enlarge(as_rgb(after_B3HW)), columns=len(rows[0]))) for after_B3HW in after_KB3HW]
    file = request.folder / f"coarse_to_fine.{form}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, lambda stream: save_frames(frames, stream, form))
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror}); choose another ``out`` folder") from error
    return file


def draw_after_scales(task: SampleRequest, jobs: list[Job]) -> Tensor:
    """The images of ``jobs`` in [0, 1] after each scale, (K, B, 3, H, W) on the CPU; ``task`` as of a plan."""
    device = torch.device(task.device)
    stages, tokenizer = load_stages(task.source, device)
    passes = open_passes(task.refinement, task.refinement_passes, stages, tokenizer)  # of the weights as they are saved
    for model in stages.models:
        prepare(model, task.precision, quantized=task.quantize)
    arguments = {**task.settings.arguments(), "refinement": passes}
    batches = []
    for first in range(0, len(jobs), task.batch_size):
        batch = jobs[first : first + task.batch_size]
        labels, seeds = [job.label for job in batch], [job.seed for job in batch]
        with computing(task.precision, device), evaluating(tokenizer):
            idx_BL = generate(stages, tokenizer, labels, seeds=seeds, **arguments).tokens
            batches.append(torch.stack([to_unit(image_B3HW).cpu() for image_B3HW in tokenizer.progressive(idx_BL)]))
    return torch.cat(batches, dim=1)


def save_frames(frames: list[Image.Image], stream: IO[bytes], form: str) -> None:
    """Frames of one size into an open file, the last shown for longer, over and over."""
    durations = [SHOWN_MS] * (len(frames) - 1) + [LAST_MS]
    more: dict[str, Any] = {"lossless": True} if form == "webp" else {}
    frames[0].save(
        stream, format=form.upper(), save_all=True, append_images=frames[1:], duration=durations, loop=0, **more
    )
