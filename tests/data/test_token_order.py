"""Which samples come when: nothing lost, nothing twice, for any ranks, workers and batch sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvar_lightning.data.reading.order import validation_blocks
from mvar_lightning.data.token_data import TrainOrder
from mvar_lightning.errors import UserError

sizes_of_parts = st.lists(st.integers(1, 12), min_size=1, max_size=8)


def row(order: TrainOrder, first: int, count: int) -> list[int]:
    return np.concatenate([piece.numbers_N for piece in order.take(first, count)]).tolist()


@given(sizes_of_parts, st.integers(1, 40), st.integers(1, 9), st.integers(0, 3))
def test_every_pass_holds_each_sample_once(sizes: list[int], window: int, batch: int, seed: int) -> None:
    order, samples = TrainOrder(sizes, seed, window), sum(sizes)
    taken = [number for first in range(0, 3 * samples, batch) for number in row(order, first, batch)]
    passes = [taken[n * samples : (n + 1) * samples] for n in range(3)]
    assert all(sorted(numbers) == list(range(samples)) for numbers in passes)


@given(sizes_of_parts, st.integers(1, 40), st.data())
def test_any_stretch_is_the_same_from_anywhere(sizes: list[int], window: int, data: st.DataObject) -> None:
    """What a resumed run, another rank or another worker asks for does not depend on what was asked before."""
    samples = sum(sizes)
    whole = row(TrainOrder(sizes, 0, window), 0, 2 * samples)
    first = data.draw(st.integers(0, 2 * samples - 1))
    count = data.draw(st.integers(1, 2 * samples - first))
    assert row(TrainOrder(sizes, 0, window), first, count) == whole[first : first + count]


def test_passes_and_seeds_differ_and_windows_keep_parts_together() -> None:
    sizes = [10] * 20
    passes = [row(TrainOrder(sizes, seed, 1000), first, 200) for seed, first in ((0, 0), (0, 200), (1, 0))]
    assert passes[0] != passes[1] != passes[2] != passes[0]
    narrow = row(TrainOrder(sizes, 0, 50), 0, 200)
    for first in range(0, 200, 50):
        assert len({number // 10 for number in narrow[first : first + 50]}) == 5
    # mixed within the window, not part by part
    assert len({number // 10 for number in narrow[:10]}) > 1


def test_bad_values_are_named() -> None:
    with pytest.raises(UserError, match="seed -1"):
        TrainOrder([3], -1, 10)
    with pytest.raises(UserError, match="shuffle_window 0"):
        TrainOrder([3], 0, 0)


@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 12))
def test_validation_has_each_sample_once(samples: int, batch: int, consumers: int) -> None:
    blocks = [validation_blocks(samples, batch, consumer, consumers) for consumer in range(consumers)]
    assert [number for part in blocks for block in part for number in block] == list(range(samples))
    assert all(0 < len(block) <= batch for part in blocks for block in part)
    if batch > 1 and samples >= consumers:
        assert len({len(part) for part in blocks}) == 1
