"""Which samples, in which order: training without end in a seeded order, validation exactly once, over any ranks x
workers. How a sample is read and decoded is an `ImageReader`'s (`samples`); token caches have an order of their own
(`token_data`) over the same two kinds of stream.

A consumer is one worker of one rank; there are ranks x workers of them.

Training: all consumers share one endless seeded row of shards (permutation after permutation); consumer c takes
every shard at index c, c + consumers, ... and draws from a shuffle buffer. So every shard is read equally often,
fewer shards than consumers are no problem, and what comes at batch n is a function of (seed, epoch, rank, workers).
Neighboring passes mix in the buffer, so an epoch may hold a sample twice and lack another. A set that fits into the
buffer is permuted whole instead, by all consumers alike: each pass holds every sample once.
Validation: the samples lie in one row; consumer c takes the c-th of equal blocks, and opens only shards that it
needs. Consumers differ by one sample at most and have equally many batches.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice, pairwise
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import shuffle

from mvar_lightning.data.images import SampleError
from mvar_lightning.data.index import CHECK, ShardInfo
from mvar_lightning.data.reading.samples import Batch, Faults, ImageReader, RawSample, Sample
from mvar_lightning.errors import UserError


@dataclass(frozen=True)
class Failure:
    """A user's error on its way out of a worker process, which would otherwise wrap it into a traceback."""

    message: str


@dataclass(frozen=True)
class StreamConfig:
    """What all streams have in common. `rank` of `world_size` processes reads the stream."""

    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size {self.batch_size}: must be 1 or more")

    def consumer(self, worker: int, workers: int) -> tuple[int, int]:
        """The number of a worker of this rank among all consumers, and how many they are."""
        return self.rank * workers + worker, self.world_size * workers


class WorkerStream(IterableDataset, ABC):
    """Batches, or what `unpack` makes batches of, for one DataLoader worker; subclasses say which."""

    @abstractmethod
    def batches(self, worker: int, workers: int) -> Iterator[Any]:
        """What one worker of this rank gives."""

    @abstractmethod
    def num_batches(self, workers: int) -> int:
        """Batches of a pass on this rank."""

    def unpack(self, item: Any) -> Iterable[Any]:
        """The batches of what a worker sent; called in the process that takes them."""
        return (item,)

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        try:
            yield from self.batches(0, 1) if info is None else self.batches(info.id, info.num_workers)
        except UserError as error:
            if info is None:
                raise
            yield Failure(error.marked)


class EpochStream(WorkerStream):
    """Endless data cut into epochs of `epoch_batches` batches on every rank.

    `position` holds the epoch and the first batch of the next pass.
    """

    def __init__(self, config: StreamConfig, epoch_batches: int) -> None:
        if epoch_batches < 1:
            raise UserError(f"epoch of {epoch_batches} batches: give epoch_samples of at least one global batch")
        self.config, self.epoch_batches = config, epoch_batches
        # in shared memory: worker processes outlive a pass, and find here where the next one begins
        self.position = torch.zeros(2, dtype=torch.int64).share_memory_()

    def num_batches(self, workers: int) -> int:
        return self.epoch_batches


class OnceStream(WorkerStream):
    """Every one of `samples` samples once, over all consumers."""

    def __init__(self, config: StreamConfig, samples: int) -> None:
        self.config, self.samples = config, samples

    def blocks(self, worker: int, workers: int) -> list[range]:
        """Sample numbers of each batch of one worker."""
        return validation_blocks(self.samples, self.config.batch_size, *self.config.consumer(worker, workers))

    def num_batches(self, workers: int) -> int:
        return sum(len(self.blocks(worker, workers)) for worker in range(workers))


def validation_blocks(samples: int, batch_size: int, consumer: int, consumers: int) -> list[range]:
    """Batches of one consumer: every sample once over all of them, and equally many batches for each that has any.

    Consumers differ by one sample at most; only with a batch size of 1, or fewer samples than consumers, do they
    differ by a batch.
    """
    first, end = samples * consumer // consumers, samples * (consumer + 1) // consumers
    # as many batches as the largest share needs, so that no rank waits for another at a collective call
    largest = -(-samples // consumers)
    batches = min(-(-largest // batch_size), end - first)
    cuts = [first + (end - first) * batch // batches for batch in range(batches + 1)] if batches else []
    return [range(low, high) for low, high in pairwise(cuts)]


class TrainStream(EpochStream):
    """Training batches of `shards`: batch n of an epoch is a function of (seed, epoch, rank, workers)."""

    def __init__(
        self,
        reader: ImageReader,
        shards: Sequence[ShardInfo],
        config: StreamConfig,
        epoch_batches: int,
        shuffle_buffer: int = 1000,
    ) -> None:
        super().__init__(config, epoch_batches)
        self.reader, self.shards = reader, _not_empty(shards, reader)
        self.shuffle_buffer = shuffle_buffer

    def batches(self, worker: int, workers: int) -> Iterator[Batch]:
        """Batch n of an epoch comes from the worker whose turn is n mod workers.

        The DataLoader asks worker 0 first in every pass. So a pass that starts at batch n > 0 turns the roles: worker
        0 takes the turn n mod workers, and the consumer that goes with it. What came before n is read past without
        being decoded: only the reader, the buffer and its generator have to be where they would have been.
        """
        epoch, first = self.position.tolist()
        turn = (worker + first) % workers
        faults = Faults(len(self.shards))
        rows = self._whole_set if self._fits else self._streamed
        numbers = range(turn, self.epoch_batches, workers)
        for number, slots in zip(numbers, rows(epoch, turn, workers, faults), strict=False):
            if number >= first:
                # of its own for each batch: crops do not depend on batches that a resumed run never decoded
                rng = random.Random(f"{self.config.seed}/{epoch}/{self.config.rank}/{number}")
                good = [sample for slot in slots for sample in _decoded(self.reader, slot, rng, faults)]
                if not good:
                    raise UserError(
                        f"not one sample of a batch of {len(slots)} is usable, last {faults.reason}; {CHECK}"
                    )
                # A damaged sample's slot is filled by the others in turn: batches keep their shape, and which samples
                # come later does not depend on the damage.
                yield self.reader.collate([good[index % len(good)] for index in range(len(slots))])

    @property
    def _fits(self) -> bool:
        """Whether the set fits into the buffer, and is to be shuffled at all."""
        counts = [shard.samples for shard in self.shards]
        return all(counts) and 1 < self.shuffle_buffer >= sum(counts)

    def _streamed(self, epoch: int, turn: int, workers: int, faults: Faults) -> Iterator[list[RawSample]]:
        """Batches of one consumer, from its shards through the buffer."""
        consumer, consumers = self.config.consumer(turn, workers)
        samples = _endless(self.reader, self._shard_row(epoch, consumer, consumers), faults)
        if self.shuffle_buffer > 1:
            rng = random.Random(f"{self.config.seed}/{epoch}/{consumer}")
            samples = iter(shuffle(self.shuffle_buffer, initial=max(1, self.shuffle_buffer // 2), rng=rng)(samples))
        while True:
            yield list(islice(samples, self.config.batch_size))

    def _whole_set(self, epoch: int, turn: int, workers: int, faults: Faults) -> Iterator[list[RawSample]]:
        """Batches of one consumer: its turns in one row of permutations of the set, the same for all."""
        samples = [raw for shard in self.shards for raw in self.reader.read(shard, faults)]
        if not samples:
            raise UserError(f"shard {self.shards[0].name}: it and all others give no samples; {CHECK}")
        size, current, order = self.config.batch_size, -1, samples
        for number in count(turn, workers):
            first = (number * self.config.world_size + self.config.rank) * size
            slots = []
            for place in range(first, first + size):
                if place // len(samples) != current:
                    current = place // len(samples)
                    order = random.Random(f"{self.config.seed}/{epoch}/set {current}").sample(samples, len(samples))
                slots.append(order[place % len(samples)])
            yield slots

    def _shard_row(self, epoch: int, consumer: int, consumers: int) -> Iterator[ShardInfo]:
        """One consumer's shards. Each computes the whole row, from the seed alone, so none has to ask another."""
        size = len(self.shards)
        current, order = -1, list(self.shards)
        for index in count(consumer, consumers):
            if index // size != current:
                current = index // size
                rng = random.Random(f"{self.config.seed}/{epoch}/pass {current}")
                order = rng.sample(self.shards, size)
            yield order[index % size]


class ValidationStream(OnceStream):
    """Every sample of `shards` once over all consumers; damaged ones are left out."""

    def __init__(self, reader: ImageReader, shards: Sequence[ShardInfo], config: StreamConfig) -> None:
        super().__init__(config, sum(shard.samples for shard in shards))
        self.reader, self.shards = reader, _not_empty(shards, reader)

    def batches(self, worker: int, workers: int) -> Iterator[Batch]:
        blocks = self.blocks(worker, workers)
        if not blocks:
            return
        faults = Faults(len(self.shards))
        rng = random.Random(self.config.seed)
        samples = self._from(blocks[0].start, blocks[-1].stop, faults)
        # by their numbers, not by counting: a shard that is cut off gives fewer than its index says
        waiting = next(samples, None)
        for block in blocks:
            good: list[Sample] = []
            while waiting is not None and waiting[0] < block.stop:
                if waiting[0] >= block.start:
                    good += _decoded(self.reader, waiting[1], rng, faults)
                waiting = next(samples, None)
            if good:
                yield self.reader.collate(good)
        if 0 < faults.samples == faults.seen and not self._any_usable():
            raise UserError(f"not one sample of this split is usable, last {faults.reason}; {CHECK}")

    def _any_usable(self) -> bool:
        """Whether other consumers have what this one lacks."""
        rng, faults = random.Random(0), Faults(len(self.shards))
        return any(_decoded(self.reader, raw, rng, faults) for _, raw in self._from(0, self.samples, faults))

    def _from(self, first: int, end: int, faults: Faults) -> Iterator[tuple[int, RawSample]]:
        """(number, sample) for numbers first..end - 1, opening only the shards that hold them."""
        offset = 0
        for shard in self.shards:
            if offset < end and first < offset + shard.samples:
                wanted = slice(max(first - offset, 0), min(end - offset, shard.samples))
                yield from islice(enumerate(self.reader.read(shard, faults), offset), wanted.start, wanted.stop)
            offset += shard.samples


class TurnStream(ValidationStream):
    """Every n-th of the batches that a single process without workers would read: what is computed of a batch does not
    depend on how many share the work."""

    def blocks(self, worker: int, workers: int) -> list[range]:
        consumer, consumers = worker * self.config.world_size + self.config.rank, workers * self.config.world_size
        return validation_blocks(self.samples, self.config.batch_size, 0, 1)[consumer::consumers]


def _not_empty(shards: Sequence[ShardInfo], reader: ImageReader) -> Sequence[ShardInfo]:
    if not shards:
        root = reader.place.root
        raise UserError(f"data folder {root}: its index lists no shards for this split; make them anew")
    return shards


def _decoded(reader: ImageReader, raw: RawSample, rng: random.Random, faults: Faults) -> list[Sample]:
    """The finished sample; none, counted, when it is damaged."""
    faults.seen += 1
    try:
        return [reader.decode(raw, rng)]
    except SampleError as error:
        faults.sample(raw.shard, raw.key, str(error))
        return []


def _endless(reader: ImageReader, shards: Iterator[ShardInfo], faults: Faults) -> Iterator[RawSample]:
    barren = 0
    for shard in shards:
        barren += 1
        for sample in reader.read(shard, faults):
            barren = 0
            yield sample
        # twice round: a consumer may meet the same shards again before it has met all
        if barren > 2 * faults.num_shards:
            raise UserError(f"shard {shard.name}: it and all others give no samples; {CHECK}")
