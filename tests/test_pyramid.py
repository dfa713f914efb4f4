from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import PUBLISHED_SIDES, ScalePyramid

increasing_sides = st.sets(st.integers(1, 12), min_size=1, max_size=6).map(sorted)
growth = st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any)
growing_shapes = st.lists(growth, min_size=1, max_size=5).map(
    lambda steps: [list(map(sum, zip((1, 1), *steps[:count], strict=True))) for count in range(len(steps) + 1)]
)
any_scales = increasing_sides | growing_shapes


@given(any_scales)
def test_every_token_has_one_place(scales: list[int] | list[list[int]]) -> None:
    pyramid = ScalePyramid(scales)
    places = list(zip(pyramid.scale_of_tokens().tolist(), map(tuple, pyramid.coordinates().tolist()), strict=True))
    shapes = [scale if isinstance(scale, list) else (scale, scale) for scale in scales]
    expected = [(k, (y, x)) for k, (height, width) in enumerate(shapes) for y in range(height) for x in range(width)]
    assert places == expected
    assert pyramid.num_tokens == len(expected)


@given(any_scales)
def test_slices_and_spans_agree(scales: list[int] | list[list[int]]) -> None:
    pyramid = ScalePyramid(scales)
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


def test_what_is_written_is_what_is_read() -> None:
    """A square is a number, however it was given: files of square models stay as they were."""
    square = ScalePyramid([[1, 1], (2, 2), 4])
    assert square == ScalePyramid([1, 2, 4]) and square.scales == [1, 2, 4] and str(square) == "1 2 4"
    wide = ScalePyramid([[1, 1], [1, 2], [2, 4]])
    assert wide.scales == [1, [1, 2], [2, 4]] and str(wide) == "1 1x2 2x4" and wide.last_side == (2, 4)
    assert ScalePyramid(json.loads(json.dumps(wide.scales))) == wide and hash(ScalePyramid(wide.sides)) == hash(wide)
    assert [wide.tokens_of(scale) for scale in range(3)] == [1, 2, 8]


@pytest.mark.parametrize(
    ("scales", "words"),
    [
        ([[1, 2], [2, 1]], "neither may shrink"),
        ([[1, 2], [1, 2]], "one must grow"),
        ([[0, 1], [1, 1]], "must be positive"),
        ([[1, 2, 3]], "whole numbers"),
        ([[1, 1.5]], "whole numbers"),
        ([1, [1, 2000]], "at most 1024"),
        (["12"], "whole numbers"),
        ([[1]], "whole numbers"),
    ],
)
def test_bad_maps_are_refused(scales: list[Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ScalePyramid(scales)


def test_split_names_both_lengths() -> None:
    with pytest.raises(UserError, match=r"length 4.*have 5"):
        ScalePyramid([1, 2]).split(torch.zeros(1, 4))
