"""What a token cache can feed: samples per second of one worker, and its memory over many passes.

`python -m benchmarks tokens`. The cache is made of random tokens in a temporary folder; its pages are in
the system's memory when the clock runs, so a disk's speed is not measured.
"""

from __future__ import annotations

import argparse
import platform
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.results import write_figures
from mvar_lightning.data.index import ShardIndex, ShardInfo, SplitIndex
from mvar_lightning.data.reading.loader import TrainLoader
from mvar_lightning.data.reading.order import StreamConfig
from mvar_lightning.data.token_data import TokenTrainStream
from mvar_lightning.data.tokens.cache import CacheSettings, TokenCache
from mvar_lightning.data.tokens.making import TokenJob
from mvar_lightning.pyramid import PUBLISHED_SIDES

PYRAMIDS = {30: (1, 2, 3, 4), 680: PUBLISHED_SIDES[256]}
TARGETS = {30: 50_000, 680: 20_000}
"""Samples per second of one worker."""


@dataclass(frozen=True)
class TokenThroughput:
    """Samples per second, best of the passes and over all of them, and a worker's memory in MB of 10^6 bytes.

    `anonymous_mb` holds the worker's own memory after each pass, `mapped_mb` the pages of files that it has mapped and
    shares with others.
    """

    tokens: int
    batch_size: int
    workers: int
    samples: int
    best: float
    mean: float
    anonymous_mb: tuple[float, ...]
    mapped_mb: tuple[float, ...]


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write the figures."""
    rows = []
    for tokens, target in TARGETS.items():
        for workers in (0, 1):
            row = token_throughput(tokens, arguments.samples, arguments.passes, arguments.batch_size, workers)
            rows.append(vars(row))
            where = "the training process" if workers == 0 else "one worker process  "
            print(
                f"{tokens:3d} tokens, batch {row.batch_size}, {where}: {row.mean:8,.0f} samples/s "
                f"(best pass {row.best:8,.0f}, target {target:,}); over {arguments.passes} passes own memory "
                f"{row.anonymous_mb[0]:.1f} -> {row.anonymous_mb[-1]:.1f} MB, "
                f"mapped {row.mapped_mb[0]:.1f} -> {row.mapped_mb[-1]:.1f} MB"
            )
    content = {"machine": platform.machine(), "figures": rows}
    print(f"{write_figures(content, 'tokens', arguments.out)}: all figures")
    return 0


def token_throughput(
    tokens: int = 680, samples: int = 50_000, passes: int = 20, batch_size: int = 64, workers: int = 1
) -> TokenThroughput:
    """Measure `passes` passes over a cache of random tokens (two views), after one that warms up.

    Args:
        tokens: 30 or 680 a sample.
        workers: 0 reads in this process, whose memory is then told.
    """
    with tempfile.TemporaryDirectory(prefix="mvar-token-bench-") as folder:
        cache = random_cache(Path(folder) / "cache", PYRAMIDS[tokens], samples)
        stream = TokenTrainStream(cache, StreamConfig(batch_size), samples // batch_size)
        loader = TrainLoader(stream, workers)
        seconds, anonymous, mapped = [], [], []
        for number in range(passes + 1):
            started = time.perf_counter()
            batches = sum(1 for _ in loader)
            assert batches == samples // batch_size
            if number:  # the first one starts the workers and reads the files
                seconds.append(time.perf_counter() - started)
                memory = memory_of("self" if workers == 0 else str(loader._iterator._workers[0].pid))
                anonymous.append(memory["RssAnon"])
                mapped.append(memory["RssFile"])
        loader.close()
    seen = samples // batch_size * batch_size
    mean = seen * passes / sum(seconds)
    best = seen / min(seconds)
    return TokenThroughput(tokens, batch_size, workers, samples, best, mean, tuple(anonymous), tuple(mapped))


def random_cache(folder: Path, scales: Sequence[int], samples: int, views: int = 2) -> TokenCache:
    """A cache of random tokens below 4096, in parts of 1,000."""
    settings = CacheSettings(
        tokenizer_hash="0" * 64,
        scales=tuple(scales),
        vocab_size=4096,
        code_dim=32,
        data_sha256="",
        image_size=256,
        resize_ratio=1.125,
        crop="random",
        val_crop="center",
        flip=False,
        views=views,
        seed=0,
        batch_size=64,
        precision="32-true",
    )
    sizes = [min(1000, samples - first) for first in range(0, samples, 1000)]
    shards = tuple(ShardInfo(f"train/{number:06d}.tar", size, 1, "") for number, size in enumerate(sizes))
    index = ShardIndex(tuple(map(str, range(1000))), {"train": SplitIndex(shards)})
    job = TokenJob(folder, settings, index)
    job.begin()
    rng = np.random.default_rng(0)
    for task in job.todo():
        size = task.shard.samples
        tokens_vnL = rng.integers(0, 4096, (views, size, settings.num_tokens), dtype=np.uint16)
        job.write(task, tokens_vnL, rng.integers(0, 1000, size), ())
    return job.finish()


def memory_of(process: str) -> dict[str, float]:
    """Resident memory of a process by kind, in MB (Linux)."""
    status = Path(f"/proc/{process}/status").read_text()
    return {kind: int(size) * 1024 / 1e6 for kind, size in re.findall(r"(Rss\w+|VmRSS):\s+(\d+) kB", status)}
