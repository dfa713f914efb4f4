"""Image shards through a tokenizer into a token cache, on any number of devices (Lightning Fabric).

Each process encodes every n-th part and writes it as soon as it is whole, so nothing is sent between processes.

Legend: N rows of a batch, S side of the images, n samples of a part, v views, L tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from mvar_lightning.checkpoints import load_tokenizer
from mvar_lightning.data.reading.place import ShardPlace, index_at
from mvar_lightning.data.tokens.cache import CacheSettings, TokenCache
from mvar_lightning.data.tokens.making import PartEnd, Rows, TokenJob, ViewReader, ViewStream, content_hash, view_loader
from mvar_lightning.data.transforms import normalize
from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer import MultiScaleTokenizer, fingerprint

PRECISIONS = ("32-true", "bf16-mixed")

PATIENCE = timedelta(days=2)
"""How long a process that is done waits for the others."""


@dataclass(frozen=True)
class Machines:
    """Where to encode; none of it changes the cache."""

    accelerator: str = "auto"
    devices: int | None = None
    num_nodes: int = 1
    num_workers: int = 2

    def fabric(self) -> Fabric:
        """Raises UserError where there are no such devices."""
        if self.devices is not None and self.devices < 1:
            raise UserError(f"devices {self.devices}: must be 1 or more")
        if self.num_workers < 0:
            raise UserError(f"num_workers {self.num_workers}: must be 0 (decode in the main process) or more")
        devices = "auto" if self.devices is None else self.devices
        several = self.num_nodes > 1 or (self.devices or torch.cuda.device_count()) > 1
        try:
            strategy: Any = DDPStrategy(timeout=PATIENCE) if several else "auto"
            return Fabric(accelerator=self.accelerator, strategy=strategy, devices=devices, num_nodes=self.num_nodes)
        except (MisconfigurationException, ImportError, RuntimeError, ValueError) as error:
            told = " ".join(str(error).split())
            raise UserError(f"accelerator {self.accelerator}, devices {devices}: {told}") from None


def settings_of(args: argparse.Namespace) -> CacheSettings:
    """What the arguments say; `make_tokens` adds tokenizer and data. Raises UserError for values that cannot be."""
    for name in ("views", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"{name} {getattr(args, name)}: must be 1 or more")
    if args.precision not in PRECISIONS:
        raise UserError(f"precision {args.precision!r}: choose one of {', '.join(PRECISIONS)}")
    return CacheSettings(
        tokenizer_hash="",
        scales=(),
        vocab_size=0,
        code_dim=0,
        data_sha256="",
        image_size=1,
        resize_ratio=args.resize_ratio,
        crop=args.crop,
        val_crop="adm" if args.crop == "adm" else "center",
        flip=args.flip,
        views=args.views,
        seed=args.seed,
        batch_size=args.batch_size,
        precision=args.precision,
    )


def make_tokens(
    checkpoint: str | Path, data: str | Path, out: str | Path, machines: Machines, settings: CacheSettings
) -> TokenCache | None:
    """Make or complete the cache at `out`; None on all processes but the first.

    Raises:
        UserError: no such tokenizer or data, a folder of other tokens, a disk that is full, too many damaged images.
    """
    index = index_at(str(data))
    tokenizer = load_tokenizer(checkpoint).eval().requires_grad_(False)
    settings = replace(
        settings,
        tokenizer_hash=fingerprint(tokenizer),
        scales=tokenizer.pyramid.sides,
        vocab_size=tokenizer.vocab_size,
        code_dim=tokenizer.code_dim,
        image_size=tokenizer.image_size,
        data_sha256=content_hash(index),
    )
    reader = ViewReader(ShardPlace(str(data)), settings, index.num_classes)  # wrong settings are told here
    job = TokenJob(out, settings, index)
    fabric = machines.fabric()
    for task in job.tasks:
        if problem := reader.place.problem(task.shard):
            raise UserError(f"data {data}: shard {problem}; copy it again or make the shards anew")
    job.begin()
    fabric.launch()
    tokenizer.to(fabric.device)
    with ExitStack() as stack:
        if fabric.device.type == "cpu":  # with more threads, sums could depend on how many there are
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
        with _together(fabric):
            if fabric.is_global_zero:
                stack.enter_context(job.locked())
        with _together(fabric):
            stream = ViewStream(reader, job.todo(fabric.global_rank, fabric.world_size), len(job.tasks))
            advance = stack.enter_context(_progress(stream, fabric.is_global_zero))
            _encode(job, stream, machines.num_workers, partial(encode, tokenizer, settings.precision), advance)
        return job.finish() if fabric.is_global_zero else None


@contextmanager
def _together(fabric: Fabric) -> Iterator[None]:
    """Wait for all processes at the end; where one has failed all do, its own words first, instead of waiting on."""
    failure: UserError | None = None
    try:
        yield
    except UserError as error:
        failure = error
    failed = torch.tensor(int(failure is not None), device=fabric.device)
    total = int(cast(Tensor, fabric.all_reduce(failed, reduce_op="sum")))
    if failure is not None:
        raise failure
    if total:
        raise UserError(f"{total} of {fabric.world_size} processes failed; finished parts are kept, see their messages")


def _encode(
    job: TokenJob,
    stream: ViewStream,
    num_workers: int,
    encode_rows: Callable[[Tensor], np.ndarray],
    advance: Callable[[int], None],
) -> None:
    """Every part of the stream, written when its last rows are encoded. Parts of several workers come interleaved."""
    rows: dict[str, list[np.ndarray]] = {}
    for item in view_loader(stream, num_workers):
        if isinstance(item, Rows):
            rows.setdefault(item.part, []).append(encode_rows(item.pixels_N3SS))
            advance(len(item.pixels_N3SS))
        else:
            _write(job, item, rows.pop(item.task.part, []))


def _write(job: TokenJob, end: PartEnd, rows: list[np.ndarray]) -> None:
    views, length = job.settings.views_of(end.task.split), job.settings.num_tokens
    tokens_NL = np.concatenate(rows) if rows else np.empty((0, length), job.settings.dtype)
    tokens_vnL = tokens_NL.reshape(-1, views, length).transpose(1, 0, 2)
    job.write(end.task, tokens_vnL, np.asarray(end.labels, np.int32), tuple(end.damaged))


@torch.no_grad()
def encode(tokenizer: MultiScaleTokenizer, precision: str, pixels_N3SS: Tensor) -> np.ndarray:
    """Tokens (N, L) of uint8 pixels. The quantizer computes in float32 in any precision."""
    device = next(tokenizer.parameters()).device
    image_B3HW = normalize(pixels_N3SS.to(device))
    if precision == "32-true":
        idx_BL = tokenizer.encode(image_B3HW)
    else:
        with torch.autocast(device.type, torch.bfloat16):
            latent_BZhw = tokenizer.latent(image_B3HW)
        idx_BL = tokenizer.quantizer.encode(latent_BZhw.float())
    return idx_BL.cpu().numpy().astype(np.uint32)


@contextmanager
def _progress(stream: ViewStream, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar for the first process' share; told the number of views just encoded."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not shown:
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    total = sum(task.shard.samples * stream.settings.views_of(task.split) for task in stream.tasks)
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("views (of this process)", total=total)
        yield lambda count: bar.advance(task, count)
