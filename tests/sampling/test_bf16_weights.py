"""Weights kept in bf16 sample what autocast samples."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from mvar_lightning import (
    AdjacentAttention,
    LlamaBlocks,
    MultiScaleTokenizer,
    NextScaleTransformer,
    SlidingWindowHistory,
    VARBlocks,
)
from mvar_lightning.sampling import ImageNoise, LinearGuidance, SamplingSettings, sample_pyramid
from mvar_lightning.transformer.acceleration import weights_in_bf16

AXES: dict[str, dict[str, Any]] = {
    "var": {},
    "shared modulation": {"blocks": VARBlocks(shared_adaln=True)},
    "markov_var": {
        "attention": AdjacentAttention(),
        "history": SlidingWindowHistory(2),
        "blocks": LlamaBlocks(),
    },
}


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_logits_are_those_of_autocast(
    axes: dict[str, Any], make_model: Callable[..., NextScaleTransformer], tokenizer: MultiScaleTokenizer
) -> None:
    def logits(model: NextScaleTransformer) -> list[Tensor]:
        seen: list[Tensor] = []
        noise = ImageNoise([1, 2, 3], model.pyramid, torch.device("cpu"))
        settings = SamplingSettings(LinearGuidance(1.5))
        label_B = torch.tensor([0, 3, 4])

        def observe(scale: int, logits_BlV: Tensor) -> None:
            seen.append(logits_BlV.clone())

        with torch.autocast("cpu", dtype=torch.bfloat16):
            sample_pyramid(model, tokenizer, label_B, settings, noise, observe=observe)
        return seen

    model = make_model(**axes)
    narrow = weights_in_bf16(deepcopy(model))
    expected = logits(model)
    spread = max(float(each.std()) for each in expected)
    for ours, theirs in zip(logits(narrow), expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-2 * spread


def test_products_take_half_the_memory_and_the_rest_keeps_its_precision(
    make_model: Callable[..., NextScaleTransformer],
) -> None:
    model = weights_in_bf16(make_model(**AXES["markov_var"]))
    kept = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    block = "blocks.0."
    assert {name for name in kept if name.startswith(block)} == {
        f"{block}norm.weight",
        f"{block}attention.q_bias",
        f"{block}attention.v_bias",
        f"{block}attention.log_scale",
    }
    assert not any(name.startswith("head.linear") for name in kept) and "head.norm.weight" in kept
    assert "history.fuse.weight" in kept and "word_embedding.weight" in kept
