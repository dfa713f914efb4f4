"""Which samples of a token cache come when, as arrays: an endless seeded row of passes over the cache.

Pass after pass holds every sample once. In each, the parts are permuted and drawn from in windows: samples come in
any order within a window of parts, which keeps the pages that a worker reads, and has mapped, together. A cache that
is smaller than a window is permuted whole. The row is a function of the seed alone, and every batch is a slice of it,
so nothing is lost or doubled between ranks or workers.

Legend: P parts, N samples (their numbers run through the parts).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mvar_lightning.errors import UserError


class Piece(NamedTuple):
    """Consecutive samples of the row that belong to one window."""

    number: int
    """The pass over the cache, counted from 0."""
    window: int
    """Of that pass."""
    numbers_N: np.ndarray


class _Pass(NamedTuple):
    number: int
    parts_P: np.ndarray
    """Parts in the order of this pass."""
    first_P: np.ndarray
    """Place of each one's first sample."""
    bounds_W: np.ndarray
    """Where windows begin in `parts_P`, and its end."""


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
        self._pass: _Pass | None = None
        self._window: tuple[int, int, int, np.ndarray] | None = None

    def take(self, first: int, count: int) -> Iterator[Piece]:
        """Samples first .. first + count - 1 of the row, cut where passes and windows end."""
        while count > 0:
            number, place = divmod(first, self.samples)
            window, start, numbers_N = self._window_at(number, place)
            piece_N = numbers_N[place - start : place - start + count]
            yield Piece(number, window, piece_N)
            first, count = first + len(piece_N), count - len(piece_N)

    def _window_at(self, number: int, place: int) -> tuple[int, int, np.ndarray]:
        """The window that holds `place` of a pass, the place where it begins, and all its samples in their order."""
        layout = self._layout(number)
        part = int(np.searchsorted(layout.first_P, place, side="right")) - 1
        window = int(np.searchsorted(layout.bounds_W, part, side="right")) - 1
        if self._window is None or self._window[:2] != (number, window):
            low, high = layout.bounds_W[window : window + 2]
            parts = layout.parts_P[low:high]
            numbers_N = np.concatenate([np.arange(self.sizes_P[p]) + self.starts_P[p] for p in parts])
            rng = np.random.default_rng([self.seed, number, window])
            self._window = (number, window, int(layout.first_P[low]), rng.permutation(numbers_N))
        return self._window[1:]

    def _layout(self, number: int) -> _Pass:
        if self._pass is None or self._pass.number != number:
            parts_P = np.random.default_rng([self.seed, number]).permutation(len(self.sizes_P))
            first_P = np.cumsum(self.sizes_P[parts_P]) - self.sizes_P[parts_P]
            bounds = np.flatnonzero(np.diff(first_P // self.window, prepend=-1))
            self._pass = _Pass(number, parts_P, first_P, np.append(bounds, len(parts_P)))
        return self._pass


def validation_blocks(samples: int, batch_size: int, consumer: int, consumers: int) -> list[range]:
    """Batches of one consumer: every sample once over all of them, and equally many batches for each that has any.

    Consumers differ by one sample at most; only with a batch size of 1, or fewer samples than consumers, do they
    differ by a batch.
    """
    first, end = samples * consumer // consumers, samples * (consumer + 1) // consumers
    largest = -(-samples // consumers)
    batches = min(-(-largest // batch_size), end - first)
    cuts = [first + (end - first) * batch // batches for batch in range(batches + 1)] if batches else []
    return [range(low, high) for low, high in pairwise(cuts)]
