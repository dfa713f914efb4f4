"""Recorded scales give the same tokens; on a CPU a recording is a function that is run again on the same tensors."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mvar_lightning import (
    AdjacentAttention,
    FullAttention,
    LlamaBlocks,
    MultiScaleTokenizer,
    NextScaleTransformer,
    SlidingWindowAttention,
    SlidingWindowHistory,
    SpatialAttention,
    UserError,
    VARBlocks,
    generate,
)
from mvar_lightning.sampling import CutoffGuidance
from mvar_lightning.transformer import acceleration as scale_graphs
from mvar_lightning.transformer.acceleration import record_scales

SCALES = [1, 2, 4]
AXES = [
    dict(attention=AdjacentAttention(), history=SlidingWindowHistory(2), blocks=LlamaBlocks()),
    dict(attention=SpatialAttention(3, scales=1), blocks=VARBlocks()),
]


def pair(axes: dict[str, Any]) -> tuple[NextScaleTransformer, MultiScaleTokenizer]:
    torch.manual_seed(0)
    tokenizer = MultiScaleTokenizer(
        SCALES, vocab_size=24, code_dim=4, channels=8, channel_multipliers=[1, 2], num_res_blocks=1, norm_groups=4
    )
    torch.nn.init.normal_(tokenizer.quantizer.codebook.weight)
    sizes = dict(vocab_size=24, code_dim=4, num_classes=3, depth=2, width=32, heads=2, gamma_init=1.0)
    model = NextScaleTransformer(SCALES, **sizes, **axes)
    torch.nn.init.normal_(model.head.linear.weight, std=0.2)
    return model.eval(), tokenizer.eval()


class Recorded:
    """Stands for a CUDA graph: reads and writes the tensors that it was recorded with."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.recordings += 1
        result = run()

        def again() -> None:
            self.replays += 1
            result.copy_(run())

        return again, result


def sampled(model: NextScaleTransformer, tokenizer: MultiScaleTokenizer, count: int, cfg: Any) -> Tensor:
    labels = [label % 3 for label in range(count)]
    return generate(model, tokenizer, labels, cfg=cfg, top_k=None, top_p=None, seeds=range(7, 7 + count))[1]


@pytest.mark.parametrize("axes", AXES, ids=repr)
def test_tokens_are_those_of_the_plain_run(axes: dict[str, Any]) -> None:
    model, tokenizer = pair(axes)
    cases = [(4, 1.5), (3, 1.5), (4, 0.0), (4, CutoffGuidance(2.0, last_scale=1)), (4, 1.5)]
    expected = [sampled(model, tokenizer, *case) for case in cases]
    record_scales(model, recorded := Recorded())
    for case, tokens in zip(cases, expected, strict=True):
        assert torch.equal(sampled(model, tokenizer, *case), tokens), case
    # rows by scale: 8, 6 and 4; the cutoff and the repetition find theirs recorded
    assert (recorded.recordings, recorded.replays) == (9, 15)


def test_rows_in_chunks_do_not_write_over_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = pair(AXES[0])
    expected = sampled(model, tokenizer, 4, 1.5)
    monkeypatch.setattr("mvar_lightning.transformer.transformer.TOKENS_AT_ONCE", 32)
    record_scales(model, recorded := Recorded())
    assert torch.equal(sampled(model, tokenizer, 4, 1.5), expected)
    assert (recorded.recordings, recorded.replays) == (3, 1 + 1 + 4), "the last scale: two of eight rows at a time"


def test_large_steps_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = pair(AXES[0])
    expected = sampled(model, tokenizer, 4, 1.5)
    monkeypatch.setattr(scale_graphs, "RECORDED_TOKENS", 8 * 4)
    record_scales(model, recorded := Recorded())
    assert torch.equal(sampled(model, tokenizer, 4, 1.5), expected)
    assert recorded.recordings == 2


@pytest.mark.parametrize("attention", [FullAttention(), SlidingWindowAttention(2)], ids=repr)
def test_a_cache_is_refused(attention: Any) -> None:
    model, _ = pair(dict(attention=attention))
    with pytest.raises(UserError, match="keeps keys and values between scales"):
        record_scales(model, Recorded())


def test_a_model_on_no_gpu_is_told() -> None:
    with pytest.raises(UserError, match="the model is on no GPU"):
        record_scales(pair(AXES[0])[0])


def test_under_autocast_scales_are_recorded_anew_and_without_its_cache() -> None:
    model, tokenizer = pair(AXES[0])
    caching: list[bool] = []
    expected = sampled(model, tokenizer, 2, 0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected_in_bf16 = sampled(model, tokenizer, 2, 0.0)
    record_scales(model, recorded := Recorded())
    model.blocks[0].register_forward_pre_hook(lambda *_: caching.append(torch.is_autocast_cache_enabled()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sampled(model, tokenizer, 2, 0.0), expected_in_bf16)
        assert torch.is_autocast_cache_enabled() and not any(caching)
    assert torch.equal(sampled(model, tokenizer, 2, 0.0), expected)
    assert recorded.recordings == 6


def recorder(device: str) -> Recorded | None:
    return Recorded() if device == "cpu" else None


@pytest.mark.gpu
@pytest.mark.parametrize("axes", AXES, ids=repr)
def test_on_a_gpu(axes: dict[str, Any]) -> None:
    model, tokenizer = (part.cuda() for part in pair(axes))
    cases = [(4, 1.5), (3, 1.5), (4, CutoffGuidance(2.0, last_scale=1)), (4, 1.5)]
    expected = [sampled(model, tokenizer, *case) for case in cases]
    record_scales(model)
    for case, tokens in zip(cases, expected, strict=True):
        assert torch.equal(sampled(model, tokenizer, *case), tokens), case


@pytest.mark.parametrize(
    ("device", "compiled"), [("cpu", False), *(pytest.param("cuda", on, marks=pytest.mark.gpu) for on in (False, True))]
)
def test_two_recordings_in_bf16_live_and_one_goes(device: str, compiled: bool) -> None:
    """A recording that another one's end took the workspace from replays other numbers (pytorch 193402)."""
    with torch.autocast(device, dtype=torch.bfloat16):
        model, tokenizer = (part.to(device) for part in pair(AXES[0]))
        if compiled:
            scale_graphs.compile_blocks(model)
        expected = sampled(model, tokenizer, 4, 1.5)
        record_scales(model, recorder(device))
        assert torch.equal(sampled(model, tokenizer, 4, 1.5), expected)
        other, other_tokenizer = (part.to(device) for part in pair(AXES[1]))
        record_scales(other, recorder(device))
        sampled(other, other_tokenizer, 4, 1.5)
        del other, other_tokenizer
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        for _ in range(20 if device == "cuda" else 2):
            assert torch.equal(sampled(model, tokenizer, 4, 1.5), expected)
