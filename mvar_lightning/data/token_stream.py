"""A token cache to batches, by slicing arrays; nothing is done for each sample.

Legend: B batch, L tokens, P parts, N samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from mvar_lightning.data.loader import StreamLoader, TrainLoader
from mvar_lightning.data.streaming import Failure
from mvar_lightning.data.token_cache import REPAIR, TokenCache, open_part
from mvar_lightning.data.token_order import TrainOrder, validation_blocks
from mvar_lightning.errors import UserError

TokenBatch = dict[str, Tensor]
"""`tokens` int64 (B, L) and `label` int64 (B,)."""

Arrays = tuple[np.ndarray, np.ndarray]
"""Tokens (N, L) and labels (N,)."""

ROWS_AT_ONCE = 2048
"""Rows that a worker reads, and sends, together: each part is asked once for them, however small the batches."""


class Chunk(NamedTuple):
    """Consecutive batches of a worker, in the cache's type; `ends` says where each ends.

    Tensors, not arrays: these go from process to process in shared memory.
    """

    tokens_NL: Tensor
    labels_N: Tensor
    ends: list[int]


class TokenReader:
    """Rows of one split. Parts are mapped as they are needed; `forget` unmaps them, so that memory stays bounded."""

    def __init__(self, cache: TokenCache, split: str) -> None:
        self.cache, self.parts = cache, cache.split(split)
        if not self.parts:
            raise UserError(f"token cache {cache.folder}: has no samples for {split}; make it from shards that have")
        self.views = cache.settings.views_of(split)
        self.sizes = [part.samples for part in self.parts]
        self.ends_P = np.cumsum(self.sizes)
        self._mapped: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": {}}  # a map would be pickled with all it maps

    def forget(self) -> None:
        self._mapped.clear()

    def read(self, numbers_N: np.ndarray, number: int) -> Arrays:
        """Tokens (N, L) and labels (N,) of these samples, with the view that is due in pass `number`.

        Raises:
            UserError: a part that is missing, damaged, or holds tokens beyond the vocabulary.
        """
        tokens_NL = np.empty((len(numbers_N), self.cache.settings.num_tokens), self.cache.settings.dtype)
        labels_N = np.empty(len(numbers_N), np.int64)
        part_N = np.searchsorted(self.ends_P, numbers_N, side="right")
        order_N = np.argsort(part_N, kind="stable")
        cuts = np.flatnonzero(np.diff(part_N[order_N])) + 1
        for places in np.split(order_N, cuts):
            part = int(part_N[places[0]])
            tokens_vnL, labels_n = self._map(part)
            rows = numbers_N[places] - (self.ends_P[part] - self.sizes[part])
            # parts differ in their view, so that any stretch of training sees all of them
            tokens_NL[places] = tokens_vnL[(number + part) % self.views][rows]
            labels_N[places] = labels_n[rows]
        self._check(tokens_NL, labels_N)
        return tokens_NL, labels_N

    def _map(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        if part not in self._mapped:
            # plain views of the maps: slicing a subclass costs more
            tokens_vnL, labels_n = open_part(self.cache, self.parts[part])
            self._mapped[part] = tokens_vnL.view(np.ndarray), labels_n.view(np.ndarray)
        return self._mapped[part]

    def _check(self, tokens_NL: np.ndarray, labels_N: np.ndarray) -> None:
        """On a device such an index would end the process without a word about its origin."""
        codes, classes = self.cache.settings.vocab_size, len(self.cache.class_names)
        if tokens_NL.max() >= codes or labels_N.min() < 0 or labels_N.max() >= classes:
            raise UserError(
                f"token cache {self.cache.folder}: tokens up to {tokens_NL.max()} of {codes} codes and labels up to "
                f"{labels_N.max()} of {classes} classes: it is damaged; {REPAIR}"
            )


@dataclass(frozen=True)
class TokenConfig:
    """What training and validation have in common. `rank` of `world_size` processes reads it."""

    cache: TokenCache
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1


class TokenStream(IterableDataset, ABC):
    """Chunks of batches for one DataLoader worker; subclasses say which, in `chunks(worker, workers)`."""

    def __init__(self, config: TokenConfig, split: str) -> None:
        self.config = config
        self.reader = TokenReader(config.cache, split)

    @abstractmethod
    def chunks(self, worker: int, workers: int) -> Iterator[Chunk]:
        """Batches of one worker of this rank."""

    @abstractmethod
    def num_batches(self, workers: int) -> int:
        """Batches of an epoch on this rank."""

    def __iter__(self) -> Iterator[Chunk | Failure]:
        info = get_worker_info()
        if info is None:
            yield from self.chunks(0, 1)
            return
        try:
            yield from self.chunks(info.id, info.num_workers)
        except UserError as error:
            yield Failure(str(error))


class TokenTrainStream(TokenStream):
    """Endless data cut into epochs of `epoch_batches` batches on every rank: batch n of epoch e is a function of
    (seed, e, n, rank, ranks, batch size); the number of workers has no part in it.

    `position` holds the epoch and the first batch of the next pass; it is shared with worker processes.
    """

    def __init__(self, config: TokenConfig, epoch_batches: int, shuffle_window: int = 100_000) -> None:
        super().__init__(config, "train")
        self.epoch_batches = epoch_batches
        self.order = TrainOrder(self.reader.sizes, config.seed, shuffle_window)
        self._window = (-1, -1)
        self.position = torch.zeros(2, dtype=torch.int64).share_memory_()

    def num_batches(self, workers: int) -> int:
        return self.epoch_batches

    def chunks(self, worker: int, workers: int) -> Iterator[Chunk]:
        """Chunks are dealt to the workers in turn; the loader takes them in turn, too."""
        epoch, first = self.position.tolist()
        size = self.config.batch_size
        step = max(1, ROWS_AT_ONCE // size)
        for start in range(first + worker * step, self.epoch_batches, workers * step):
            numbers = range(start, min(start + step, self.epoch_batches))
            tokens_NL, labels_N = self._read([epoch * self.epoch_batches + number for number in numbers])
            yield _chunk(tokens_NL, labels_N, [size * (place + 1) for place in range(len(numbers))])

    def _read(self, batches: list[int]) -> Arrays:
        """Rows of this rank's share of several batches, one after the other."""
        size = self.config.batch_size
        firsts = [(batch * self.config.world_size + self.config.rank) * size for batch in batches]
        pieces = [piece for first in firsts for piece in self.order.take(first, size)]
        windows = groupby(pieces, key=lambda piece: (piece.number, piece.window))
        arrays = [self._of_window(*key, np.concatenate([p.numbers_N for p in group])) for key, group in windows]
        return np.concatenate([tokens for tokens, _ in arrays]), np.concatenate([labels for _, labels in arrays])

    def _of_window(self, number: int, window: int, numbers_N: np.ndarray) -> Arrays:
        if self._window != (number, window):
            self._window = (number, window)
            self.reader.forget()
        return self.reader.read(numbers_N, number)


class TokenValidationStream(TokenStream):
    """Every sample once over all ranks and workers, in the order of the cache."""

    def __init__(self, config: TokenConfig, split: str = "val") -> None:
        super().__init__(config, split)

    def blocks(self, worker: int, workers: int) -> list[range]:
        """Sample numbers of each batch of one worker."""
        consumer, consumers = self.config.rank * workers + worker, self.config.world_size * workers
        return validation_blocks(sum(self.reader.sizes), self.config.batch_size, consumer, consumers)

    def num_batches(self, workers: int) -> int:
        return sum(len(self.blocks(worker, workers)) for worker in range(workers))

    def chunks(self, worker: int, workers: int) -> Iterator[Chunk]:
        blocks = self.blocks(worker, workers)
        step = max(1, ROWS_AT_ONCE // self.config.batch_size)
        for start in range(0, len(blocks), step):
            group = blocks[start : start + step]
            first = group[0].start
            tokens_NL, labels_N = self.reader.read(np.arange(first, group[-1].stop), 0)
            yield _chunk(tokens_NL, labels_N, [block.stop - first for block in group])
        self.reader.forget()


def _chunk(tokens_NL: np.ndarray, labels_N: np.ndarray, ends: list[int]) -> Chunk:
    return Chunk(torch.from_numpy(tokens_NL), torch.from_numpy(labels_N), ends)


class TokenLoader(StreamLoader):
    """Rows come from the workers as they lie in the cache, a fourth of the bytes, and become batches here."""

    def _unwrapped(self, batches: Iterator[Any]) -> Iterator[TokenBatch]:
        chunks: Iterator[Any] = super()._unwrapped(batches)
        for tokens_NL, labels_N, ends in chunks:
            for start, end in pairwise([0, *ends]):
                yield {"tokens": tokens_NL[start:end].long(), "label": labels_N[start:end].clone()}


class TokenTrainLoader(TokenLoader, TrainLoader):
    """The same, with a place that checkpoints keep."""
