"""Tokens that a model draws, as a token cache: what a scorer learns to tell from those of images (`training.scorer`).

The cache is as one of images, and made like one, part by part: what is done stays done, however the work is shared or
interrupted (`data.tokens.making`). No image is decoded.

L all tokens, n samples of a part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace

import numpy as np
import torch

from mvar_lightning.data.index import ShardIndex, ShardInfo, SplitIndex
from mvar_lightning.data.tokens.cache import DRAWN, CacheSettings, TokenCache
from mvar_lightning.data.tokens.making import Task, TokenJob
from mvar_lightning.errors import check_counts
from mvar_lightning.sampling.draws import ImageNoise
from mvar_lightning.sampling.jobs import Job, SampleRequest, plan_sampling
from mvar_lightning.sampling.refinement import open_passes
from mvar_lightning.sampling.sampler import check_labels, sample_pyramid
from mvar_lightning.sampling.stages import load_stages
from mvar_lightning.tokenizer import fingerprint
from mvar_lightning.tools.compute import choose_device, computing, evaluating
from mvar_lightning.tools.ranks import Ranks
from mvar_lightning.transformer.acceleration import prepare

PART_SAMPLES = 1024
"""Of a part: what an interruption may cost."""


def draw_tokens(request: SampleRequest, val_count: int | None = None) -> TokenCache | None:
    """Make or complete a cache of drawn tokens in ``request.out``, with a progress bar; None on all processes but the
    first. Made again, a call that was interrupted draws the parts that are missing or damaged.

    Args:
        request: of which model, how many samples of each class for training, and how; ``classes`` are all.
        val_count: of each class for validation, with the seeds after those of training; a tenth as many if not given.

    Raises:
        UserError: a model that cannot be read, a folder of other tokens, a disk that is full.
    """
    check_counts(val_count=val_count)
    count = request.count or 100
    counts = {"train": count, "val": val_count or max(1, count // 10)}
    ranks = Ranks.of(choose_device(request.device).type, request.devices)
    with ranks.agreed():
        task, jobs, job = open_job(request, counts)
    ranks.check_same(out=job.folder, **asdict(job.settings))
    ranks.from_first(job.begin)
    ranks.run(_draw_share, task, jobs, job)
    return job.finish() if ranks.is_first else None


def open_job(request: SampleRequest, counts: dict[str, int]) -> tuple[SampleRequest, dict[str, list[Job]], TokenJob]:
    """The request with its device settled, labels and seeds of each split, and the cache in the making. The classes
    take turns, so that each part has all of them. Writes nothing."""
    plan = plan_sampling(replace(request, classes="all", count=sum(counts.values())))
    stages, tokenizer = load_stages(request.source, torch.device("cpu"))
    classes = [
        plan.jobs[first : first + sum(counts.values())] for first in range(0, len(plan.jobs), sum(counts.values()))
    ]
    turns = [job for each in zip(*classes, strict=True) for job in each]
    cut = counts["train"] * len(classes)
    jobs = {"train": turns[:cut], "val": turns[cut:]}
    identity = json.dumps({**plan.identity, **counts}, sort_keys=True)
    settings = CacheSettings(
        tokenizer_hash=fingerprint(tokenizer),
        scales=tokenizer.pyramid.sides,
        **{name: getattr(tokenizer, name) for name in ("vocab_size", "code_dim", "image_size")},
        data_sha256=hashlib.sha256(identity.encode()).hexdigest(),
        resize_ratio=1.0,
        crop=DRAWN,
        val_crop=DRAWN,
        flip=False,
        views=1,
        seed=request.seed,
        batch_size=request.batch_size,
        precision=plan.identity["precision"],
    )
    names = tuple(request.source.class_names()) or tuple(map(str, range(stages.first.num_classes)))
    parts = {split: SplitIndex(_parts(split, len(each))) for split, each in jobs.items()}
    return plan.task, jobs, TokenJob(request.folder, settings, ShardIndex(names, parts))


def _parts(split: str, samples: int) -> tuple[ShardInfo, ...]:
    """In place of image shards: the samples of each part."""
    sizes = [min(PART_SAMPLES, samples - first) for first in range(0, samples, PART_SAMPLES)]
    return tuple(ShardInfo(f"{split}/{number:06d}.tar", size, 0, "") for number, size in enumerate(sizes))


def _draw_share(ranks: Ranks, task: SampleRequest, jobs: dict[str, list[Job]], cache: TokenJob) -> None:
    """The parts of this process that are missing."""
    ranks.check_shared(cache.folder)
    with ExitStack() as stack:
        with ranks.agreed():
            if ranks.is_first:
                stack.enter_context(cache.locked())
        parts = ranks.share(ranks.from_first(cache.todo))
        total = sum(part.shard.samples for part in parts)
        with ranks.agreed(), ranks.progress("samples", total) as advance:
            if parts:
                _draw(task, jobs, cache, parts, advance)


def _draw(
    task: SampleRequest,
    jobs: dict[str, list[Job]],
    cache: TokenJob,
    parts: Sequence[Task],
    advance: Callable[[int], None],
) -> None:
    """Each part is cut into batches from its own start, so that who draws it changes nothing."""
    device = torch.device(task.device)
    stages, tokenizer = load_stages(task.source, device)
    passes = open_passes(task.refinement, task.refinement_passes, stages, tokenizer)
    for model in stages.models:
        prepare(model, task.precision, compiled=task.compiled, graphs=task.graphs, quantized=task.quantize)
    with torch.no_grad(), evaluating(*stages.models, tokenizer), computing(task.precision, device):
        for part in parts:
            first = PART_SAMPLES * int(part.part.rpartition("/")[2])
            own = jobs[part.split][first : first + part.shard.samples]
            rows = []
            for start in range(0, len(own), task.batch_size):
                batch = own[start : start + task.batch_size]
                label_B = check_labels([job.label for job in batch], stages.first)
                noise = ImageNoise([job.seed for job in batch], stages.pyramid, device)
                drawn = sample_pyramid(stages, tokenizer, label_B, task.settings, noise, refinement=passes)
                rows.append(drawn[1].cpu().numpy())
                advance(len(batch))
            cache.write(part, np.concatenate(rows)[None], np.asarray([job.label for job in own], np.int32), ())
