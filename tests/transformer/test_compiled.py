from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from mvar_lightning import (
    AdjacentAttention,
    FullAttention,
    LlamaBlocks,
    NextScaleTransformer,
    SlidingWindowAttention,
    SlidingWindowHistory,
    SpatialAttention,
    VARBlocks,
)
from mvar_lightning.transformer.acceleration import compile_blocks

SCALES = list(range(1, 11))


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(SpatialAttention(3), LlamaBlocks()), (FullAttention(), VARBlocks())], ids=repr)
def test_compiled_blocks_give_the_same_at_every_one_of_ten_scales(axes: Any) -> None:
    """Ten scales are more variants than torch allows by default; whole graphs fail where it would give up."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = NextScaleTransformer(
        SCALES,
        vocab_size=12,
        code_dim=4,
        num_classes=3,
        depth=1,
        width=16,
        heads=2,
        gamma_init=1.0,
        attention=axes[0],
        history=SlidingWindowHistory(2),
        blocks=axes[1],
    ).eval()
    inputs = [None, *(torch.randn(1, side * side, 4) for side in SCALES[1:])]

    def run() -> list[torch.Tensor]:
        state = model.begin(torch.tensor([0, 3]), images=1)
        with torch.no_grad():
            return [model.step(state, scale, x_BlZ) for scale, x_BlZ in enumerate(inputs)]

    expected = run()
    compile_blocks(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(), expected)


def test_blocks_of_different_drop_rates_are_compiled_once() -> None:
    torch._dynamo.reset()
    sizes = dict(vocab_size=12, code_dim=4, num_classes=3, depth=3, width=16, heads=2, drop_path=0.3)
    model, compiled = NextScaleTransformer([1, 2], **sizes).train(), CompileCounter()
    compile_blocks(model, backend=compiled)
    model(torch.randn(2, 4, 4), torch.tensor([0, 1])).sum().backward()
    assert compiled.frame_count == 1


@pytest.mark.parametrize(
    "attention",
    [FullAttention(), SlidingWindowAttention(2), AdjacentAttention(), SpatialAttention(3, scales=1)],
    ids=repr,
)
def test_gradients_of_compiled_blocks_are_those_of_plain_ones(attention: Any) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    sizes = dict(vocab_size=12, code_dim=4, num_classes=3, depth=2, width=32, heads=2, gamma_init=1.0, drop_path=0.0)
    model = NextScaleTransformer([1, 2, 3], **sizes, attention=attention, label_drop=0.0).train()
    x_BLZ, label_B = torch.randn(2, 13, 4), torch.tensor([0, 1])

    def gradients() -> dict[str, torch.Tensor | None]:
        model.zero_grad()
        model(x_BLZ, label_B).square().mean().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients()
    compile_blocks(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(), expected)
