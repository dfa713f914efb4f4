from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import PUBLISHED_SIDES, ScalePyramid

increasing_sides = st.sets(st.integers(1, 12), min_size=1, max_size=6).map(sorted)


@given(increasing_sides)
def test_every_token_has_one_place(sides: list[int]) -> None:
    pyramid = ScalePyramid(sides)
    places = list(zip(pyramid.scale_of_tokens().tolist(), map(tuple, pyramid.coordinates().tolist()), strict=True))
    expected = [(k, (y, x)) for k, side in enumerate(sides) for y in range(side) for x in range(side)]
    assert places == expected
    assert pyramid.num_tokens == len(expected)


@given(increasing_sides)
def test_slices_and_spans_agree(sides: list[int]) -> None:
    pyramid = ScalePyramid(sides)
    tokens = torch.arange(pyramid.num_tokens)
    parts = pyramid.split(tokens[None])
    for scale, part in enumerate(parts):
        assert torch.equal(part[0], tokens[pyramid.slice_of(scale)])
        assert len(part[0]) == pyramid.tokens_of(scale)
    assert torch.equal(tokens[pyramid.span(range(len(pyramid)))], tokens)


def test_published_sizes() -> None:
    assert {size: ScalePyramid(sides).num_tokens for size, sides in PUBLISHED_SIDES.items()} == {
        256: 680,
        512: 2240,
        1024: 9451,
    }
    assert ScalePyramid.from_num_tokens(680).sides == PUBLISHED_SIDES[256]
    with pytest.raises(UserError, match="patch_nums"):
        ScalePyramid.from_num_tokens(681)


@pytest.mark.parametrize("sides", [[], [0, 1], [1, 1], [2, 1], [-1]])
def test_bad_sides_are_refused(sides: list[int]) -> None:
    with pytest.raises(UserError):
        ScalePyramid(sides)


def test_split_names_both_lengths() -> None:
    with pytest.raises(UserError, match=r"length 4.*have 5"):
        ScalePyramid([1, 2]).split(torch.zeros(1, 4))
