"""Starting on other scales: what is found again by the side of a map, what is fresh, and what is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from faults.small_models import CONVOLUTIONS, SIZES, small_model, small_tokenizer

from mvar_lightning import LlamaBlocks, NextScaleTransformer, ScalePyramid, UserError, VARModule
from mvar_lightning.checkpoints import load_initial_weights, save
from mvar_lightning.checkpoints.rescale import LEVEL, START, TOKEN, for_scales, resized
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.training.loading import start_from

SIZE: dict[str, Any] = {"num_classes": 3, "depth": 1, "width": 16, "heads": 2}
HERE = [1, 2, 3, 4, 6]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Scales 1, 2, 3."""
    save(tmp_path / "source", small_model(), small_tokenizer())
    return tmp_path / "source"


def test_maps_are_found_again_by_their_side(source: Path) -> None:
    torch.manual_seed(7)
    model, trained = NextScaleTransformer(HERE, **SIZES, **SIZE), small_model()
    words = load_initial_weights(model, source, init_scales="resize")
    assert "scales 1 2 3 to 1 2 3 4 6: positions and levels resized" in words
    ours, theirs = model.state_dict(), trained.state_dict()
    for name in ours:
        if name not in (START, TOKEN, LEVEL):
            assert torch.equal(ours[name], theirs[name]), name
    assert torch.equal(ours[START], theirs[START])
    assert torch.equal(ours[TOKEN][:, :14], theirs[TOKEN])  # 1 x 1 to 3 x 3 as they were
    assert torch.equal(ours[LEVEL][:3], theirs[LEVEL]) and torch.equal(ours[LEVEL][3:], theirs[LEVEL][2:].expand(2, -1))
    last = theirs[TOKEN][:, 5:].unflatten(1, (3, 3))
    torch.testing.assert_close(ours[TOKEN][:, 14:30].unflatten(1, (4, 4)), resized(last, (4, 4)))
    torch.testing.assert_close(ours[TOKEN][:, 30:].mean(), last.mean(), atol=0.01, rtol=0.3)


def test_a_picture_stays_what_it_is_on_another_map() -> None:
    """A plane through the map, away from its border, where bicubic weights reach beyond."""
    y, x = torch.meshgrid((torch.arange(8) + 0.5) / 8, (torch.arange(8) + 0.5) / 8, indexing="ij")
    plane = torch.stack([y, x], dim=-1)[None]
    for side in (4, 16):
        places = (torch.arange(side) + 0.5) / side
        inner = slice(side // 4, side - side // 4)
        made = resized(plane, (side, side))[0, inner, inner]
        torch.testing.assert_close(made[..., 0], places[inner, None].expand(-1, made.shape[1]), atol=0.01, rtol=0)
        torch.testing.assert_close(made[..., 1], places[None, inner].expand(made.shape[0], -1), atol=0.01, rtol=0)


def test_a_level_between_two_lies_between_them() -> None:
    state = {
        START: torch.zeros(1, 1, 2),
        TOKEN: torch.zeros(1, 17, 2),
        LEVEL: torch.tensor([[0.0, 1.0], [4.0, 3.0]]),
    }
    moved, _ = for_scales(state, ScalePyramid([1, 4]), ScalePyramid([1, 2, 4]), state, "resize")
    assert torch.allclose(moved[LEVEL], torch.tensor([[0.0, 1.0], [2.0, 2.0], [4.0, 3.0]]))


def test_square_maps_become_wide_ones() -> None:
    """A level's side is that of a square of equal area; a map comes from the one that is nearest in both axes."""
    state = {
        START: torch.zeros(1, 1, 2),
        TOKEN: torch.cat([torch.full((1, 1, 2), 5.0), torch.arange(16.0).repeat_interleave(2).view(1, 16, 2)], dim=1),
        LEVEL: torch.tensor([[0.0, 1.0], [4.0, 3.0]]),
    }
    here = ScalePyramid([1, [1, 4], [3, 6], [4, 8]])
    moved, words = for_scales(state, ScalePyramid([1, 4]), here, state, "resize")
    assert "1 4 to 1 1x4 3x6 4x8" in words and moved[TOKEN].shape == (1, here.num_tokens, 2)
    assert torch.allclose(moved[LEVEL][1], torch.tensor([2.0, 2.0]))  # 1 x 4 is as large as 2 x 2
    rows = moved[TOKEN][:, here.slice_of(3)].unflatten(1, (4, 8))[0, :, 2:6, 0]
    assert torch.allclose(rows.diff(dim=0), torch.tensor(4.0)) and torch.allclose(
        rows.diff(dim=1), torch.tensor(0.5), atol=0.05
    )


def test_fresh_ones_and_rotary_ones(source: Path, tmp_path: Path) -> None:
    model = NextScaleTransformer(HERE, **SIZES, **SIZE)
    own = model.state_dict()[TOKEN].clone()
    assert "fresh" in load_initial_weights(model, source, init_scales="fresh")
    assert torch.equal(model.state_dict()[TOKEN], own)
    rotary = NextScaleTransformer([1, 2, 3], **SIZES, **SIZE, blocks=LlamaBlocks())
    save(tmp_path / "rotary", rotary, small_tokenizer())
    model = NextScaleTransformer(HERE, **SIZES, **SIZE, blocks=LlamaBlocks())
    own = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("positions.")}
    assert "fresh" in load_initial_weights(model, tmp_path / "rotary", init_scales="fresh")
    assert own and all(torch.equal(model.state_dict()[name], value) for name, value in own.items())
    words = load_initial_weights(model, tmp_path / "rotary", init_scales="resize")
    assert "made anew, levels by a scale's number" in words
    assert all(torch.equal(value, rotary.state_dict()[name]) for name, value in model.state_dict().items())


def test_without_a_rule_nothing_starts(source: Path) -> None:
    for rule, words in (
        (None, r"scales \(\[1, 2, 3, 4, 6\] here, \[1, 2, 3\] there\)"),
        ("stretch", "resize or fresh"),
    ):
        with pytest.raises(UserError, match=words):
            load_initial_weights(NextScaleTransformer(HERE, **SIZES, **SIZE), source, init_scales=rule)


def test_a_rule_that_means_nothing_is_told_where_the_scales_agree_too(source: Path) -> None:
    with pytest.raises(UserError, match="init_scales 'strech': unknown"):
        load_initial_weights(small_model(), source, init_scales="strech")
    with pytest.raises(UserError, match="needs init_from"):
        VARModule(str(source), 3, depth=1, width=16, heads=2, init_scales="resize")


def test_a_tokenizer_goes_on_with_other_scales(source: Path) -> None:
    torch.manual_seed(9)
    tokenizer, trained = MultiScaleTokenizer(HERE, **SIZES, **CONVOLUTIONS), small_tokenizer()
    start_from(tokenizer, str(source))
    for name, value in trained.named_parameters():
        assert torch.equal(tokenizer.get_parameter(name), value), name
    assert tokenizer.encode(torch.rand(1, 3, 12, 12) * 2 - 1).shape == (1, 66)
    with pytest.raises(UserError, match="scales"):  # each scale has its own phi
        start_from(MultiScaleTokenizer(HERE, **SIZES, **CONVOLUTIONS, phi_layers=0), str(source))
