from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mvar_lightning.attention import (
    AdjacentAttention,
    AttentionStrategy,
    FullAttention,
    SlidingWindowAttention,
    SpatialAttention,
)
from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import PUBLISHED_SIDES, ScalePyramid

PYRAMID = ScalePyramid([1, 2, 3, 4, 6])
sides = st.sets(st.integers(1, 6), min_size=1, max_size=4).map(sorted)


def mask_from_definition(strategy: AttentionStrategy, pyramid: ScalePyramid) -> torch.Tensor:
    """Visibility token pair by token pair, from the plan."""
    scale_L, yx_L2 = pyramid.scale_of_tokens().tolist(), pyramid.coordinates().tolist()
    mask = torch.zeros(pyramid.num_tokens, pyramid.num_tokens, dtype=torch.bool)
    for q in range(pyramid.num_tokens):
        read = strategy.plan(pyramid).reads[scale_L[q]]
        for kv in range(pyramid.num_tokens):
            seen = read.first_key_scale <= scale_L[kv] <= scale_L[q]
            if seen and read.kernel_size is not None:
                for axis, side in enumerate(read.shape):
                    kernel = min(read.kernel_size, side)
                    start = min(max(yx_L2[q][axis] - kernel // 2, 0), side - kernel)
                    seen = seen and start <= yx_L2[kv][axis] < start + kernel
            mask[q, kv] = seen
    return mask


@settings(max_examples=15)
@given(sides, st.integers(0, 2), st.integers(1, 6), st.sampled_from([1, 3, 5]), st.integers(1, 3))
def test_mask_and_plan_say_the_same(side_list: list[int], wider: int, window: int, kernel: int, scales: int) -> None:
    pyramid = ScalePyramid([[side, side + wider] for side in side_list])
    strategies: list[AttentionStrategy] = [FullAttention(), AdjacentAttention(), SlidingWindowAttention(window)]
    if kernel <= max(pyramid.last_shape):
        strategies.append(SpatialAttention(kernel, scales))
    for strategy in strategies:
        mask = strategy.mask(pyramid)
        assert torch.equal(mask, mask_from_definition(strategy, pyramid)), strategy
        assert int(mask.sum()) == strategy.plan(pyramid).num_pairs, strategy


@given(sides)
def test_window_of_one_is_adjacent_and_of_all_is_full(side_list: list[int]) -> None:
    pyramid = ScalePyramid(side_list)
    assert torch.equal(SlidingWindowAttention(1).mask(pyramid), AdjacentAttention().mask(pyramid))
    assert torch.equal(SlidingWindowAttention(len(pyramid)).mask(pyramid), FullAttention().mask(pyramid))


def test_published_pair_counts() -> None:
    pairs = {
        size: (AdjacentAttention().plan(ScalePyramid(s)).num_pairs, FullAttention().plan(ScalePyramid(s)).num_pairs)
        for size, s in PUBLISHED_SIDES.items()
    }
    assert pairs[256] == (110_468, 286_434)
    assert [round(pairs[size][0] / 1e6, 2) for size in (512, 1024)] == [1.52, 24.59]
    assert [round(pairs[size][1] / 1e6, 2) for size in (512, 1024)] == [3.27, 56.95]


def test_every_neighborhood_query_has_all_its_keys() -> None:
    pyramid = ScalePyramid(PUBLISHED_SIDES[256])
    mask = SpatialAttention(7, scales=2).mask(pyramid)
    for scale in (8, 9):
        assert set(mask[pyramid.slice_of(scale)].sum(dim=1).tolist()) == {49}
    assert set(mask[pyramid.slice_of(7)].sum(dim=1).tolist()) == {100}


def test_kernels_can_differ_by_scale() -> None:
    plan = SpatialAttention([3, 5], scales=[3, 4]).plan(PYRAMID)
    assert [read.kernel_size for read in plan.reads] == [None, None, None, 3, 5]


def test_cache_policy() -> None:
    tokens = {
        FullAttention(): 66,
        AdjacentAttention(): 0,
        SpatialAttention(3): 0,
        SlidingWindowAttention(2): 16 + 36,
        SlidingWindowAttention(3): 9 + 16 + 36,
    }
    assert {strategy: strategy.plan(PYRAMID).cache_tokens for strategy in tokens} == tokens


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SpatialAttention(4), "odd"),
        (lambda: SpatialAttention(-3), "odd"),
        (lambda: SpatialAttention(3, scales=0), "scales=0"),
        (lambda: SpatialAttention([3, 5], scales=3), "2 kernel sizes for 3"),
        (lambda: SlidingWindowAttention(0), "scales=0"),
        (lambda: SpatialAttention(7).plan(PYRAMID), "larger than every map"),
        (lambda: SpatialAttention(3, scales=[7]).plan(PYRAMID), "scale 7"),
    ],
)
def test_bad_values_are_named(make, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


@pytest.mark.parametrize("strategy", [FullAttention(), SlidingWindowAttention(3), SpatialAttention([3, 5], [3, 4])])
def test_strategies_survive_their_config(strategy: AttentionStrategy) -> None:
    assert AttentionStrategy.from_config(strategy.config()) == strategy


class FromElsewhere(AdjacentAttention):
    """Stands for a user's own class."""


def test_a_class_from_elsewhere_names_its_module() -> None:
    config = FromElsewhere().config()
    assert AttentionStrategy.from_config(config) == FromElsewhere()
    with pytest.raises(UserError, match="mvar --import their_module"):
        AttentionStrategy.from_config({"class": "NotHere", "module": "their_module"})


def test_unknown_strategy_lists_the_known() -> None:
    with pytest.raises(UserError, match="AdjacentAttention"):
        AttentionStrategy.from_config({"class": "NoSuch"})
    with pytest.raises(UserError, match="windows"):
        AttentionStrategy.from_config({"class": "SlidingWindowAttention", "windows": 3})
