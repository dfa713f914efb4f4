"""What the data path can feed: decoding against the published pipeline, the loader, a no-op model, workers' memory.

Decoding: all sides decode the same JPEGs on one thread, in turn, and medians are compared; the times belong to this
machine, the ratios are what carries over.

Legend: B batch, S side of the crops.
"""

from __future__ import annotations

import io
import logging
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor, nn

from mvar_lightning.data.image_data import ShardsDataModule
from mvar_lightning.data.images import decode_rgb
from mvar_lightning.data.index import ShardInfo
from mvar_lightning.data.making.embedded import PHOTOS
from mvar_lightning.data.making.shards import ShardsRequest, make_shards
from mvar_lightning.data.making.sources import Example, Source
from mvar_lightning.data.reading.loader import StreamLoader
from mvar_lightning.data.reading.place import ShardPlace
from mvar_lightning.data.reading.samples import Faults, read_shard
from mvar_lightning.data.transforms import (
    DRAFT_MARGIN,
    ResizeCrop,
    choose_resizer,
    has_fast_lanczos,
    random_corner,
    shorter_to,
    to_batch,
)
from mvar_lightning.errors import UserError
from mvar_lightning.tools.drawing import normalize

RATIO = 1.125
SYNTHETIC_SIZE = (500, 375)
"""The size that most images of ImageNet have."""


@dataclass(frozen=True)
class LoaderOptions:
    """What `python -m benchmarks data` is asked to measure."""

    folder: str
    image_size: int = 256
    batch_size: int = 64
    workers: int = 2
    seconds: float = 10.0
    passes: int = 20
    pass_batches: int = 2

    def module(self, decoding: str, epoch_batches: int | None = None) -> ShardsDataModule:
        return ShardsDataModule(
            self.folder,
            self.image_size,
            self.batch_size,
            self.workers,
            epoch_samples=None if epoch_batches is None else epoch_batches * self.batch_size,
            decoding=decoding,
        )


# --- pictures


def synthetic_shards(folder: Path, samples: int = 256, size: tuple[int, int] = SYNTHETIC_SIZE) -> None:
    """Shards of photographs that ship with the libraries, cut and scaled to the size; JPEG of quality 95."""

    def examples(split: str, count: int) -> list[Example]:
        names = list(PHOTOS)
        return [
            Example(f"{split} {n}", n % len(names), partial(_photo_jpeg, names[n % len(names)], f"{split}{n}", size))
            for n in range(count)
        ]

    make_shards(ShardsRequest(Source(tuple(PHOTOS), examples("train", samples), examples("val", len(PHOTOS))), folder))


@lru_cache
def _photo(name: str) -> Image.Image:
    with Image.open(PHOTOS[name].path()) as file:
        return file.convert("RGB")


def _photo_jpeg(name: str, seed: str, size: tuple[int, int]) -> bytes:
    rng, photo = random.Random(seed), _photo(name)
    scale = min(photo.width / size[0], photo.height / size[1]) * rng.uniform(0.7, 1.0)
    width, height = size[0] * scale, size[1] * scale
    left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
    picture = photo.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def some_jpegs(folder: str, count: int) -> list[bytes]:
    """The first encoded training images of a shard folder. Raises UserError when it has fewer than one."""
    module = ShardsDataModule(folder, 8, 1, 0)
    shards: Sequence[ShardInfo] = module.index.split("train").shards
    faults = Faults(len(shards))
    images = list(islice((raw.image for s in shards for raw in read_shard(ShardPlace(str(folder)), s, faults)), count))
    if not images:
        raise UserError(f"--data {folder}: holds no training images; make its shards anew")
    return images


# --- decoding

Decoding = Callable[[Sequence[bytes], int, random.Random], Tensor]
"""(JPEGs, S, rng) -> batch (B, 3, S, S) in [-1, 1]."""


def plain(images: Sequence[bytes], side: int, rng: random.Random) -> Tensor:
    """As the published pipeline does it (VAR, `utils/data.py`): decode and resize all of the picture, crop, and one
    float tensor a picture, stacked."""
    tensors = []
    for data in images:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        picture = picture.resize(shorter_to(picture.size, round(RATIO * side)), Image.Resampling.LANCZOS)
        left, top = random_corner(picture.size, side, rng)
        picture = picture.crop((left, top, left + side, top + side))
        pixels_HW3 = torch.from_numpy(np.array(picture, np.uint8, copy=True))
        x_3HW = pixels_HW3.permute(2, 0, 1).contiguous().float().div(255)
        tensors.append(x_3HW.add(x_3HW).add_(-1))
    return torch.stack(tensors)


def ours(decoding: str) -> Decoding:
    """Our pipeline from bytes to the finished batch, on the CPU to its end."""

    def decode(images: Sequence[bytes], side: int, rng: random.Random) -> Tensor:
        module = ShardsDataModule("unread", side, 1, 0, resize_ratio=RATIO, decoding=decoding)
        pictures = [module.train_transform(decode_rgb(data, module.draft_side), rng) for data in images]
        return to_batch(pictures)

    return decode


def decoding_sides() -> dict[str, Decoding]:
    sides = {"plain": plain, "exact": ours("exact")}
    return sides | ({"fast": ours("fast")} if has_fast_lanczos() else {})


def compare_decoding(images: Sequence[bytes], side: int, repeats: int) -> dict[str, Any]:
    """Images per second of processor time of each side, ratios to the plain one, and differences of pictures in levels
    of 255. Work is on one thread, and processor time is what other programs disturb least."""
    sides = decoding_sides()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, decode in sides.items():
            started = time.process_time()
            decode(images, side, random.Random(repeat))
            if repeat:  # the first one warms up
                seconds[name].append(time.process_time() - started)
    rates = {name: len(images) / statistics.median(values) for name, values in seconds.items()}
    want = plain(images, side, random.Random(0))
    apart = {name: differences(decode(images, side, random.Random(0)), want) for name, decode in sides.items()}
    return {
        name: {"images_per_second": round(rate, 1), "times_plain": round(rate / rates["plain"], 3)} | apart[name]
        for name, rate in rates.items()
    }


def differences(image_B3SS: Tensor, want_B3SS: Tensor) -> dict[str, float]:
    """In levels of 255."""
    apart = ((image_B3SS - want_B3SS) * 127.5).abs().round()
    return {"largest_difference": float(apart.max()), "mean_difference": round(float(apart.mean()), 5)}


def draft_differences(side: int, margins: Sequence[int] = (1, 2, 3, 4)) -> dict[str, dict[str, float]]:
    """How far pictures decoded at half size are from exact ones, by how much longer than needed they still are.

    Photographs are enlarged for it only as far as none is lost, so small sides tell more.
    """
    rows = {}
    for margin in margins:
        shorter = 2 * margin * round(RATIO * side)
        images = [_photo_jpeg(name, f"draft {margin}", (shorter * 4 // 3, shorter)) for name in PHOTOS]
        want = ours("exact")(images, side, random.Random(0))
        drafted = ResizeCrop(side, RATIO, random_corner, resizer=choose_resizer("fast"))
        rng = random.Random(0)
        got = [drafted(decode_rgb(data, margin * round(RATIO * side)), rng) for data in images]
        rows[str(margin)] = differences(to_batch(got), want)
    return rows


# --- loader


def loader_rate(options: LoaderOptions, decoding: str) -> float:
    """Images per second of the bare loader."""
    loader = options.module(decoding).train_dataloader()
    try:
        return _rate(_endless(loader), options)
    finally:
        loader.close()


def _endless(loader: StreamLoader) -> Iterator[Any]:
    while True:
        yield from loader


def _rate(batches: Iterator[Any], options: LoaderOptions) -> float:
    for _ in range(2 * max(1, options.workers)):  # workers start, and have a few batches ready
        next(batches)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < options.seconds:
        next(batches)
        count += 1
    return count * options.batch_size / (time.perf_counter() - started)


class NoModel(lightning.LightningModule):
    """Takes batches and does nothing with them."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        assert normalize(batch["image"]).dtype == torch.float32

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Clock(lightning.Callback):
    """Images per second between the batch after the warm-up and the last."""

    def __init__(self, options: LoaderOptions) -> None:
        self.options = options
        self.warm_up = 2 * max(1, options.workers)
        self.seen, self.started, self.rate = 0, 0.0, 0.0

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.seen += 1
        if self.seen == self.warm_up:
            self.started = time.perf_counter()
        elif self.seen > self.warm_up:
            seconds = time.perf_counter() - self.started
            self.rate = (self.seen - self.warm_up) * self.options.batch_size / seconds
            trainer.should_stop = seconds >= self.options.seconds


def trainer_rate(options: LoaderOptions, decoding: str) -> float:
    """Images per second through Lightning's trainer, to a model that normalizes and does nothing else."""
    clock = Clock(options)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=-1,
            devices=1,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[clock],
        )
        trainer.fit(NoModel(), datamodule=options.module(decoding))
    return clock.rate


# --- memory


def worker_memory(options: LoaderOptions, decoding: str) -> list[float]:
    """MiB held by all workers (by this process without workers) after each of some passes."""
    loader = options.module(decoding, options.pass_batches).train_dataloader()
    try:
        return [_pass_memory(loader) for _ in range(options.passes)]
    finally:
        loader.close()


def _pass_memory(loader: StreamLoader) -> float:
    for _ in loader:
        pass
    workers = getattr(loader._iterator, "_workers", None)
    pids = [worker.pid for worker in workers] if workers else ["self"]
    return sum(resident_mib(pid) for pid in pids)


def resident_mib(pid: int | str) -> float:
    """Resident memory of a process that is its own: pages of batches on their way are shared, and left out."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024


# --- all of it


def measure(options: LoaderOptions, repeats: int = 9) -> dict[str, Any]:
    """All figures of `python -m benchmarks data`."""
    torch.set_num_threads(1)
    decodings = ["exact", *(["fast"] if has_fast_lanczos() else [])]
    images = some_jpegs(options.folder, options.batch_size)
    memory = worker_memory(options, "exact")
    return {
        "machine": f"{platform.machine()}, Pillow {PIL.__version__}, torch {torch.__version__}",
        "options": {name: value for name, value in vars(options).items() if name != "folder"},
        "mean_kilobytes": round(sum(map(len, images)) / len(images) / 1000, 1),
        "decoding": compare_decoding(images, options.image_size, repeats),
        "draft": {"margin": DRAFT_MARGIN, "by_margin": draft_differences(64) if has_fast_lanczos() else {}},
        "loader_images_per_second": {name: round(loader_rate(options, name), 1) for name in decodings},
        "trainer_images_per_second": {name: round(trainer_rate(options, name), 1) for name in decodings},
        "worker_mib_by_pass": [round(value, 1) for value in memory],
    }
