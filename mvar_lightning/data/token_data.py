"""A token cache to batches: training without images, without decoding, without the encoder.

The cache is read by slicing arrays; nothing is done for each sample. `TokenShardsDataModule` is the LightningDataModule
over it.

Legend: B batch, L tokens, P parts, N samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mvar_lightning.data.image_data import ShardsDataModule, TrainingData
from mvar_lightning.data.index import presence_problem
from mvar_lightning.data.reading.loader import StreamLoader, TrainLoader
from mvar_lightning.data.reading.order import EpochStream, OnceStream, StreamConfig
from mvar_lightning.data.tokens.cache import REPAIR, CacheSettings, TokenCache, open_part, part_files, read_cache
from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import ScalePyramid

if TYPE_CHECKING:
    from mvar_lightning.pyramid import Size
    from mvar_lightning.tokenizer import MultiScaleTokenizer

TokenBatch = dict[str, Tensor]
"""`tokens` int64 (B, L) and `label` int64 (B,)."""

Arrays = tuple[np.ndarray, np.ndarray]
"""Tokens (N, L) and labels (N,)."""

ROWS_AT_ONCE = 2048
"""Rows that a worker reads, and sends, together: each part is asked once for them, however small the batches."""


class Chunk(NamedTuple):
    """Consecutive batches of a worker, in the cache's type; `ends` says where each ends.

    Tensors, not arrays: these go from process to process in shared memory, a fourth of the bytes of int64.
    """

    tokens_NL: Tensor
    labels_N: Tensor
    ends: list[int]

    @classmethod
    def of(cls, arrays: Arrays, ends: list[int]) -> Chunk:
        return cls(torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1]), ends)

    def batches(self) -> Iterator[TokenBatch]:
        for start, end in pairwise([0, *self.ends]):
            yield {"tokens": self.tokens_NL[start:end].long(), "label": self.labels_N[start:end].clone()}


# Which samples of a token cache come when, as arrays: an endless seeded row of passes over the cache. N samples: their
# numbers run through the parts.
#
# Pass after pass holds every sample once. In each, the parts are permuted and drawn from in windows: samples come in
# any order within a window of parts, which keeps the pages that a worker reads, and has mapped, together. A cache
# that is smaller than a window is permuted whole. The row is a function of the seed alone, and every batch is a slice
# of it, so nothing is lost or doubled between ranks or workers.


class Piece(NamedTuple):
    """Consecutive samples of the row that belong to one window."""

    number: int
    """The pass over the cache, counted from 0."""
    window: int
    """Of that pass."""
    numbers_N: np.ndarray


class TrainOrder:
    """The endless row over parts of `sizes` samples; `window` is about how many samples are mixed with one another."""

    def __init__(self, sizes: Sequence[int], seed: int, window: int) -> None:
        if seed < 0:
            raise UserError(f"seed {seed}: must be 0 or more")
        if window < 1:
            raise UserError(f"shuffle_window {window}: must be 1 or more")
        self.sizes_P = np.asarray(sizes, dtype=np.int64)
        self.starts_P = np.cumsum(self.sizes_P) - self.sizes_P
        self.samples = int(self.sizes_P.sum())
        self.seed, self.window = seed, window
        self._kept = (-1, 0, 0, np.empty(0, np.int64))  # pass, window, index of its first sample, all of them in order

    def take(self, first: int, count: int) -> Iterator[Piece]:
        """Samples first .. first + count - 1 of the row, cut where passes and windows end."""
        while count > 0:
            number, index = divmod(first, self.samples)
            window, start, numbers_N = self._window_at(number, index)
            piece_N = numbers_N[index - start : index - start + count]
            yield Piece(number, window, piece_N)
            first, count = first + len(piece_N), count - len(piece_N)

    def _window_at(self, number: int, index: int) -> tuple[int, int, np.ndarray]:
        """The window that holds sample `index` of a pass, the index of its first one, and all its samples in order."""
        kept, _, start, numbers_N = self._kept
        if kept != number or not start <= index < start + len(numbers_N):
            parts_P = np.random.default_rng([self.seed, number]).permutation(len(self.sizes_P))
            first_P = np.cumsum(self.sizes_P[parts_P]) - self.sizes_P[parts_P]
            # a part belongs to the window in which its first sample lies: parts are never cut in two
            begins_W = np.flatnonzero(np.diff(first_P // self.window, prepend=-1))
            part = int(np.searchsorted(first_P, index, side="right")) - 1
            window = int(np.searchsorted(begins_W, part, side="right")) - 1
            low, high = [*begins_W, len(parts_P)][window : window + 2]
            numbers_N = np.concatenate([np.arange(self.sizes_P[p]) + self.starts_P[p] for p in parts_P[low:high]])
            rng = np.random.default_rng([self.seed, number, window])
            self._kept = (number, window, int(first_P[low]), rng.permutation(numbers_N))
        return self._kept[1:]


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
        # part by part: each is one slice of its map, however the samples are mixed
        for index_n in np.split(order_N, cuts):
            part = int(part_N[index_n[0]])
            if part not in self._mapped:
                # plain views of the maps: slicing a subclass costs more
                tokens_vnL, labels_n = open_part(self.cache, self.parts[part])
                self._mapped[part] = tokens_vnL.view(np.ndarray), labels_n.view(np.ndarray)
            tokens_vnL, labels_n = self._mapped[part]
            rows = numbers_N[index_n] - (self.ends_P[part] - self.sizes[part])
            # parts differ in their view, so that any stretch of training sees all of them
            tokens_NL[index_n] = tokens_vnL[(number + part) % self.views][rows]
            labels_N[index_n] = labels_n[rows]
        # on a device such an index would end the process without a word about its origin
        codes, classes = self.cache.settings.vocab_size, len(self.cache.class_names)
        if tokens_NL.max() >= codes or labels_N.min() < 0 or labels_N.max() >= classes:
            raise UserError(
                f"token cache {self.cache.folder}: tokens up to {tokens_NL.max()} of {codes} codes and labels up to "
                f"{labels_N.max()} of {classes} classes: it is damaged; {REPAIR}"
            )
        return tokens_NL, labels_N


class TokenTrainStream(EpochStream):
    """Chunks of training batches: batch n of epoch e is a function of (seed, e, n, rank, ranks, batch size); the number
    of workers has no part in it."""

    def __init__(
        self, cache: TokenCache, config: StreamConfig, epoch_batches: int, shuffle_window: int = 100_000
    ) -> None:
        super().__init__(config, epoch_batches)
        self.reader = TokenReader(cache, "train")
        self.order = TrainOrder(self.reader.sizes, config.seed, shuffle_window)
        self._window = (-1, -1)

    def batches(self, worker: int, workers: int) -> Iterator[Chunk]:
        """Chunks are dealt to the workers in turn, from the first batch of the pass on; the loader takes them in turn,
        too. A resumed pass is dealt otherwise, which changes nothing: the row of samples is no worker's own."""
        epoch, first = self.position.tolist()
        size = self.config.batch_size
        step = max(1, ROWS_AT_ONCE // size)
        for start in range(first + worker * step, self.epoch_batches, workers * step):
            numbers = range(start, min(start + step, self.epoch_batches))
            arrays = self._read([epoch * self.epoch_batches + number for number in numbers])
            yield Chunk.of(arrays, [size * (index + 1) for index in range(len(numbers))])

    def unpack(self, item: Chunk) -> Iterator[TokenBatch]:
        return item.batches()

    def _read(self, batches: list[int]) -> Arrays:
        """Rows of this rank's share of several batches, one after the other.

        Pieces of one window are read together, which asks each part once; windows one after the other, so that parts of
        the one before can be unmapped.
        """
        size = self.config.batch_size
        firsts = [(batch * self.config.world_size + self.config.rank) * size for batch in batches]
        pieces = [piece for first in firsts for piece in self.order.take(first, size)]
        windows = groupby(pieces, key=lambda piece: (piece.number, piece.window))
        arrays = []
        for window, group in windows:
            if self._window != window:
                self._window = window
                self.reader.forget()
            arrays.append(self.reader.read(np.concatenate([piece.numbers_N for piece in group]), window[0]))
        return np.concatenate([tokens for tokens, _ in arrays]), np.concatenate([labels for _, labels in arrays])


class TokenValidationStream(OnceStream):
    """Every sample once over all ranks and workers, in the order of the cache."""

    def __init__(self, cache: TokenCache, config: StreamConfig, split: str = "val") -> None:
        self.reader = TokenReader(cache, split)
        super().__init__(config, sum(self.reader.sizes))

    def batches(self, worker: int, workers: int) -> Iterator[Chunk]:
        blocks = self.blocks(worker, workers)
        step = max(1, ROWS_AT_ONCE // self.config.batch_size)
        for start in range(0, len(blocks), step):
            group = blocks[start : start + step]
            first = group[0].start
            arrays = self.reader.read(np.arange(first, group[-1].stop), 0)
            yield Chunk.of(arrays, [block.stop - first for block in group])
        self.reader.forget()

    def unpack(self, item: Chunk) -> Iterator[TokenBatch]:
        return item.batches()


class TokenShardsDataModule(TrainingData):
    """Tokens of a cache: batches {"tokens": int64 (B, L), "label": int64 (B,)}.

    Each pass over the cache takes another view of every image; an epoch that is no whole pass goes on where the one
    before it ended.

    Args:
        path: folder written by `mvar tokens make`, or an address of one, whose parts are copied as they are needed.
        batch_size: samples a step on one process; a global batch is batch_size x processes x accumulation.
        num_workers: loading processes for each training process; 0 loads in the training process.
        epoch_samples: samples that make an epoch over all processes; default all of the training split.
        shuffle_window: samples that are mixed with one another, in whole parts of the cache.
        seed: of the order of samples.
        images: folder of the image shards that the cache was made of, for what looks at real images at validation
            (sample metrics, reconstructions, the data set's classifier). Training does not read it.
    """

    holds_images = False

    def __init__(
        self,
        path: str,
        batch_size: int = 64,
        num_workers: int = 2,
        epoch_samples: int | None = None,
        shuffle_window: int = 100_000,
        seed: int = 0,
        images: str | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, epoch_samples, seed)
        self.path, self.shuffle_window, self.images = path, shuffle_window, images

    @cached_property
    def cache(self) -> TokenCache:
        """The index, read on first use. Raises UserError where there is none."""
        return read_cache(self.path)

    @property
    def settings(self) -> CacheSettings:
        return self.cache.settings

    @property
    def num_classes(self) -> int:
        return len(self.cache.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.cache.class_names

    @property
    def tokenizer_hash(self) -> str:
        """Fingerprint of the tokenizer that the tokens belong to."""
        return self.settings.tokenizer_hash

    @property
    def image_size(self) -> Size:
        """Of the images that were encoded."""
        return self.settings.image_size

    @property
    def train_samples(self) -> int:
        return self.cache.samples("train")

    @property
    def val_samples(self) -> int:
        return self.cache.samples("val")

    def check_model(self, tokenizer: MultiScaleTokenizer, tokenizer_hash: str | None = None) -> None:
        """Raise UserError unless the cache was made of images, with this tokenizer."""
        if tokenizer_hash is None:
            raise UserError("data TokenShards: a tokenizer is trained on images; give ShardsDataModule")
        if (ours := self.settings).drawn:
            raise UserError(
                f"token cache {self.path}: holds tokens that a model drew, for a scorer's model.drawn; train on one of "
                "images (mvar tokens make)"
            )
        for name, cached, given in (
            ("scales", ScalePyramid(ours.scales).scales, tokenizer.pyramid.scales),
            ("vocab_size", ours.vocab_size, tokenizer.vocab_size),
            ("hash", ours.tokenizer_hash[:12], tokenizer_hash[:12]),
        ):
            if cached != given:
                raise UserError(
                    f"token cache {self.path}: made by a tokenizer of {name} {cached}, model.tokenizer has {given}; "
                    "point model.tokenizer to the one it was made with, or make another cache (mvar tokens make)"
                )

    def image_data(self, who: str) -> ShardsDataModule:
        """The image shards behind the cache, cropped as they were for it. Raises UserError without `images`."""
        if self.images is None:
            raise UserError(
                f"{who}: needs real images, and token cache {self.path} holds none; set data.images to the shard "
                "folder that it was made of, or remove this callback from the recipe"
            )
        self._images.trainer = self.trainer
        return self._images

    @cached_property
    def _images(self) -> ShardsDataModule:
        crops = {name: getattr(self.settings, name) for name in ("image_size", "resize_ratio", "crop", "val_crop")}
        data = ShardsDataModule(
            self.images, batch_size=self.batch_size, num_workers=self.num_workers, seed=self.seed, **crops
        )
        if data.class_names != self.class_names:
            raise UserError(
                f"data.images {self.images}: has other classes than token cache {self.path} "
                f"({data.num_classes} and {self.num_classes}); give the shards that the cache was made of"
            )
        return data

    def prepare_data(self) -> None:
        _ = self.cache

    def setup(self, stage: str) -> None:
        """Every part must be there in full length before the first step, not hours into the run."""
        super().setup(stage)
        for part in () if self.cache.remote else self.cache.parts:
            if problem := presence_problem(part, part_files(self.cache.folder, part.name)):
                raise UserError(f"token cache {self.path}: {problem}; copy it again or run `mvar tokens make` again")
        if self.images is not None:
            self._images.prepare_data()
            self._images.setup(stage)

    def train_dataloader(self) -> TrainLoader:
        config, batches = self.stream_config(), self.epoch_batches()
        return self.train_loader(TokenTrainStream(self.cache, config, batches, self.shuffle_window))

    def val_dataloader(self) -> StreamLoader:
        self.check_validation()
        return StreamLoader(TokenValidationStream(self.cache, self.stream_config()), self.num_workers)


TokenShards = TokenShardsDataModule
"""The name for recipes."""
