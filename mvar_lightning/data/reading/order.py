"""Which samples, in which order: training without end in a seeded order, validation exactly once, over any ranks x
workers. How a sample is read and decoded is a `SampleReader`'s (`reading`).

A consumer is one worker of one rank; there are ranks x workers of them.

Training: all consumers share one endless seeded row of shards (permutation after permutation); consumer c takes
every shard at position c, c + consumers, ... and draws from a shuffle buffer. So every shard is read equally often,
fewer shards than consumers are no problem, and what comes at batch n is a function of (seed, epoch, rank, workers).
Validation: the samples lie in one row; consumer c takes the c-th of equal blocks, and opens only shards that it
needs. Consumers differ by one sample at most and have equally many batches.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice, pairwise
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import shuffle

from mvar_lightning.data.faults import CHECK, Faults, SampleError
from mvar_lightning.data.index import ShardInfo
from mvar_lightning.data.reading.samples import Batch, SampleReader
from mvar_lightning.errors import UserError


@dataclass(frozen=True)
class Failure:
    """A user's error on its way out of a worker process, which would otherwise wrap it into a traceback."""

    message: str


@dataclass(frozen=True)
class StreamConfig:
    """What training and validation streams have in common. `rank` of `world_size` processes reads it."""

    reader: SampleReader
    shards: tuple[ShardInfo, ...]
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


class ShardStream(IterableDataset, ABC):
    """Batches for one DataLoader worker; subclasses say which, in `batches(worker, workers)`."""

    def __init__(self, config: StreamConfig) -> None:
        if not config.shards:
            root = config.reader.place.root
            raise UserError(f"data folder {root}: its index lists no shards for this split; make them anew")
        if config.batch_size < 1:
            raise UserError(f"batch_size {config.batch_size}: must be 1 or more")
        self.config = config
        self.reader = config.reader

    @abstractmethod
    def batches(self, worker: int, workers: int) -> Iterator[Batch]:
        """Batches of one worker of this rank."""

    @abstractmethod
    def num_batches(self, workers: int) -> int:
        """Batches of an epoch on this rank."""

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        if info is None:
            yield from self.batches(0, 1)
            return
        try:
            yield from self.batches(info.id, info.num_workers)
        except UserError as error:
            yield Failure(str(error))

    def _decode(self, raw: Any, rng: random.Random, faults: Faults) -> list[Any]:
        """The finished sample; none, counted, when it is damaged."""
        faults.seen += 1
        try:
            return [self.reader.decode(raw, rng)]
        except SampleError as error:
            faults.sample(raw.shard, raw.key, str(error))
            return []


class TrainStream(ShardStream):
    """Endless data cut into epochs of `epoch_batches` batches on every rank.

    `position` holds the epoch and the first batch of the next pass; it is shared with worker processes.
    """

    def __init__(self, config: StreamConfig, epoch_batches: int, shuffle_buffer: int = 1000) -> None:
        super().__init__(config)
        if epoch_batches < 1:
            raise UserError(f"epoch of {epoch_batches} batches: give epoch_samples of at least one global batch")
        self.epoch_batches = epoch_batches
        self.shuffle_buffer = shuffle_buffer
        self.position = torch.zeros(2, dtype=torch.int64).share_memory_()

    def num_batches(self, workers: int) -> int:
        return self.epoch_batches

    def batches(self, worker: int, workers: int) -> Iterator[Batch]:
        """Batch n of an epoch comes from the worker whose turn is n mod workers. A pass that starts at batch n > 0
        reads past what came before without decoding it, and turns the roles so that worker 0 still comes first."""
        epoch, first = self.position.tolist()
        turn = (worker + first) % workers
        faults = Faults(len(self.config.shards))
        raw = self._raw_samples(epoch, turn, workers, faults)
        for number in range(turn, self.epoch_batches, workers):
            slots = list(islice(raw, self.config.batch_size))
            if number >= first:
                rng = random.Random(f"{self.config.seed}/{epoch}/{self.config.rank}/{number}")
                yield self._batch(slots, rng, faults)

    def _batch(self, slots: Sequence[Any], rng: random.Random, faults: Faults) -> Batch:
        """A damaged sample's place is filled by the others in turn: batches keep their shape, and which samples
        come later does not depend on the damage."""
        good = [sample for raw in slots for sample in self._decode(raw, rng, faults)]
        if not good:
            raise UserError(f"shard {slots[0].shard}: not one sample of a batch of {len(slots)} is readable; {CHECK}")
        return self.reader.collate([good[place % len(good)] for place in range(len(slots))])

    def _raw_samples(self, epoch: int, turn: int, workers: int, faults: Faults) -> Iterator[Any]:
        consumer = self.config.rank * workers + turn
        shards = self._shard_row(epoch, consumer, self.config.world_size * workers)
        samples = _endless(self.reader, shards, faults)
        if self.shuffle_buffer <= 1:
            return samples
        rng = random.Random(f"{self.config.seed}/{epoch}/{consumer}")
        return iter(shuffle(self.shuffle_buffer, initial=max(1, self.shuffle_buffer // 2), rng=rng)(samples))

    def _shard_row(self, epoch: int, consumer: int, consumers: int) -> Iterator[ShardInfo]:
        size = len(self.config.shards)
        current, order = -1, list(self.config.shards)
        for place in count(consumer, consumers):
            if place // size != current:
                current = place // size
                rng = random.Random(f"{self.config.seed}/{epoch}/pass {current}")
                order = rng.sample(self.config.shards, size)
            yield order[place % size]


class ValidationStream(ShardStream):
    """Every sample once over all consumers; damaged ones are left out."""

    def blocks(self, worker: int, workers: int) -> list[range]:
        """Positions of each batch of one consumer in the row of all samples."""
        samples, consumers = self.config.samples, self.config.world_size * workers
        consumer = self.config.rank * workers + worker
        first, end = samples * consumer // consumers, samples * (consumer + 1) // consumers
        largest = -(-samples // consumers)
        batches = min(-(-largest // self.config.batch_size), end - first)
        cuts = [first + (end - first) * batch // batches for batch in range(batches + 1)] if batches else []
        return [range(start, stop) for start, stop in pairwise(cuts)]

    def num_batches(self, workers: int) -> int:
        return sum(len(self.blocks(worker, workers)) for worker in range(workers))

    def batches(self, worker: int, workers: int) -> Iterator[Batch]:
        blocks = self.blocks(worker, workers)
        if not blocks:
            return
        faults = Faults(len(self.config.shards))
        rng = random.Random(self.config.seed)
        samples = self._from(blocks[0].start, blocks[-1].stop, faults)
        waiting = next(samples, None)
        for block in blocks:
            good: list[Any] = []
            while waiting is not None and waiting[0] < block.stop:
                good += self._decode(waiting[1], rng, faults)
                waiting = next(samples, None)
            if good:
                yield self.reader.collate(good)

    def _from(self, first: int, end: int, faults: Faults) -> Iterator[tuple[int, Any]]:
        """(position, sample) for positions first..end - 1, opening only the shards that hold them."""
        offset = 0
        for shard in self.config.shards:
            if offset < end and first < offset + shard.samples:
                wanted = slice(max(first - offset, 0), min(end - offset, shard.samples))
                samples = islice(enumerate(self.reader.read(shard, faults)), wanted.start, wanted.stop)
                yield from ((offset + place, sample) for place, sample in samples)
            offset += shard.samples


def _endless(reader: SampleReader, shards: Iterator[ShardInfo], faults: Faults) -> Iterator[Any]:
    barren = 0
    for shard in shards:
        barren += 1
        for sample in reader.read(shard, faults):
            barren = 0
            yield sample
        if barren > 2 * faults.num_shards:
            raise UserError(f"shard {shard.name}: it and all others give no samples; {CHECK}")
