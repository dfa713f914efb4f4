"""Starting from the weights of another model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mvar_lightning.attention import AdjacentAttention, SlidingWindowAttention, SpatialAttention
from mvar_lightning.checkpoints import load_initial_weights, save
from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.transformer import LlamaBlocks, NextScaleTransformer, SlidingWindowHistory

Pairs = dict[str, tuple[NextScaleTransformer, MultiScaleTokenizer]]
Files = dict[str, tuple[Path, Path]]

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "code_dim": 32,
    "num_classes": 10,
    "depth": 2,
    "width": 128,
    "heads": 2,
}
SCALES = [1, 2, 3, 4]


@pytest.mark.parametrize("attention", [SpatialAttention(3), AdjacentAttention(), SlidingWindowAttention(2)])
@pytest.mark.parametrize("form", ["file", "folder", "run"])
def test_any_strategy_starts_from_var(attention: Any, form: str, released: Files, pairs: Pairs, tmp_path: Path) -> None:
    source = released["var_tiny"][0]
    if form != "file":
        source = tmp_path / "var"
        save(source / "model" if form == "run" else source, *pairs["var_tiny"])
    model = NextScaleTransformer(SCALES, **SIZES, attention=attention)
    load_initial_weights(model, source)
    for key, tensor in pairs["var_tiny"][0].state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_markov_var_does_not_start_from_var(released: Files, pairs: Pairs, tmp_path: Path) -> None:
    axes: dict[str, Any] = {"history": SlidingWindowHistory(), "blocks": LlamaBlocks()}
    model = NextScaleTransformer(SCALES, **SIZES, attention=AdjacentAttention(), **axes)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    save(tmp_path / "var", *pairs["var_tiny"])
    for source in (released["var_tiny"][0], tmp_path / "var"):
        with pytest.raises(UserError, match=r"LlamaBlocks.* here, VARBlocks.*positions.*history") as error:
            load_initial_weights(model, source)
        assert "\n" not in str(error.value)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_markov_var_starts_from_markov_var(released: Files, pairs: Pairs) -> None:
    """That the released sampler fuses another class is no difference of weights."""
    axes: dict[str, Any] = {"history": SlidingWindowHistory(3), "blocks": LlamaBlocks()}
    model = NextScaleTransformer([1, 2, 3, 4, 5, 6], **SIZES, attention=AdjacentAttention(), **axes)
    load_initial_weights(model, released["markov_var_tiny"][0])
    assert torch.equal(model.head.linear.weight, pairs["markov_var_tiny"][0].head.linear.weight)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"depth": 3}, r"depth \(3 here, 2 there\)"),
        ({"heads": 4}, r"heads \(4 here, 2 there\)"),
    ],
)
def test_other_sizes(change: dict[str, Any], told: str, released: Files) -> None:
    with pytest.raises(UserError, match=told):
        load_initial_weights(NextScaleTransformer(SCALES, **{**SIZES, **change}), released["var_tiny"][0])


def test_other_scales_and_other_files(released: Files, pairs: Pairs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="14 tokens, the weights have 30"):
        load_initial_weights(NextScaleTransformer([1, 2, 3], **SIZES), released["var_tiny"][0])
    model = NextScaleTransformer(SCALES, **SIZES)
    with pytest.raises(UserError, match="tokenizer"):
        load_initial_weights(model, released["var_tiny"][1])
    save(tmp_path / "t", None, pairs["var_tiny"][1])
    with pytest.raises(UserError, match="tokenizer alone"):
        load_initial_weights(model, tmp_path / "t")
    with pytest.raises(UserError, match="no such checkpoint"):
        load_initial_weights(model, tmp_path / "none.pth")
    save(tmp_path / "v", *pairs["var_tiny"])
    with pytest.raises(UserError, match=r"model\.safetensors: is one file of a saved folder.*; give .*v$"):
        load_initial_weights(model, tmp_path / "v" / "model.safetensors")
