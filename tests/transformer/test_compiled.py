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
from mvar_lightning.attention.backends import FlexBackend
from mvar_lightning.transformer.acceleration import compile_blocks
from tests.group_of_one import group_of_one

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


@pytest.mark.parametrize("attention", [AdjacentAttention(), FullAttention()], ids=repr)
def test_a_last_smaller_chunk_of_rows_is_not_compiled_anew(attention: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    sizes = dict(vocab_size=12, code_dim=4, num_classes=3, depth=2, width=16, heads=2, gamma_init=1.0)
    model, compiled = NextScaleTransformer([1, 2, 3], **sizes, attention=attention).eval(), CompileCounter()
    inputs = [None, *(torch.randn(5, side * side, 4) for side in (2, 3))]

    @torch.no_grad()
    def run() -> list[torch.Tensor]:
        state = model.begin(torch.tensor([0, 3, 1, 1, 2]), images=5)
        return [model.step(state, scale, x_BlZ) for scale, x_BlZ in enumerate(inputs)]

    expected = run()
    compile_blocks(model, backend=compiled)
    monkeypatch.setattr("mvar_lightning.transformer.transformer.TOKENS_AT_ONCE", 18)  # rows at a time: 5, 4, 2
    torch.testing.assert_close(run(), expected)
    assert compiled.frame_count == 3, "one for each scale"


def test_flex_attention_is_one_graph_with_its_block() -> None:
    torch._dynamo.reset()
    sizes = dict(vocab_size=12, code_dim=4, num_classes=3, depth=1, width=32, heads=2, gamma_init=1.0)
    model = NextScaleTransformer([1, 2, 3], **sizes, attention=SpatialAttention(3, scales=1)).eval()
    expected = model(x_BLZ := torch.randn(2, 13, 4), label_B := torch.tensor([0, 1])).detach()
    flex = FlexBackend(model.strategy, model.pyramid, forward_only=True)
    model.backend = model.blocks[0].attention.backend = flex
    compile_blocks(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(model(x_BLZ, label_B), expected)


@torch._dynamo.config.patch(optimize_ddp=True)
def test_two_blocks_under_ddp_are_one_graph_each(tmp_path: Any) -> None:
    """By default the compiler cuts a block where it takes DDP's buckets to end: three graphs."""
    torch._dynamo.reset()
    sizes = dict(vocab_size=12, code_dim=4, num_classes=3, depth=2, width=16, heads=2, drop_path=0.0)
    model, compiled = NextScaleTransformer([1, 2], **sizes).train(), CompileCounter()
    with group_of_one(tmp_path):
        parallel = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.001)
        compile_blocks(model, backend=compiled)
        parallel(torch.randn(2, 4, 4), torch.tensor([0, 1])).sum().backward()
    assert compiled.frame_count == 1, "the same for both blocks"
