"""Token caches made of numbers: no image and no tokenizer is needed to say which sample a row is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mvar_lightning.data.index import ShardIndex, ShardInfo, SplitIndex
from mvar_lightning.data.tokens.cache import CacheSettings, TokenCache
from mvar_lightning.data.tokens.making import Task, TokenJob

TRAIN, VAL = (7, 4, 9), (5, 3)
"""Samples of each part."""


def token_settings(**changes: Any) -> CacheSettings:
    """Five tokens (scales 1 and 2), one view."""
    values = {
        "tokenizer_hash": "0123456789abcdef" * 4,
        "scales": (1, 2),
        "vocab_size": 4096,
        "code_dim": 4,
        "data_sha256": "data",
        "image_size": 8,
        "resize_ratio": 1.0,
        "crop": "random",
        "val_crop": "center",
        "flip": False,
        "views": 1,
        "seed": 0,
        "batch_size": 4,
        "precision": "32-true",
    }
    return CacheSettings(**{**values, **changes})


def token_job(folder: Path, train: Sequence[int] = TRAIN, val: Sequence[int] = VAL, **changes: Any) -> TokenJob:
    shards = {
        split: SplitIndex(tuple(ShardInfo(f"{split}/{n:06d}.tar", size, 1, "") for n, size in enumerate(sizes)))
        for split, sizes in (("train", train), ("val", val))
    }
    return TokenJob(folder, token_settings(**changes), ShardIndex(("a", "b", "c"), shards))


def write_numbered_part(job: TokenJob, task: Task) -> None:
    """Tokens of sample i are (i, view, 0, ...), counted from 0 (train) and 1000 (val); its label is i % 3."""
    before = [other.shard.samples for other in job.tasks if other.split == task.split and other.part < task.part]
    numbers = np.arange(task.shard.samples) + sum(before) + (1000 if task.split == "val" else 0)
    tokens = np.zeros((job.settings.views_of(task.split), len(numbers), job.settings.num_tokens), np.uint32)
    tokens[:, :, 0] = numbers
    tokens[:, :, 1] = np.arange(len(tokens))[:, None]
    job.write(task, tokens, numbers % 3, ())


def write_token_cache(
    folder: Path, train: Sequence[int] = TRAIN, val: Sequence[int] = VAL, **changes: Any
) -> TokenCache:
    job = token_job(folder, train, val, **changes)
    job.begin()
    for task in job.todo():
        write_numbered_part(job, task)
    return job.finish()
