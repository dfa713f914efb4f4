"""Schedules, and that no unconditional row is run that guidance does not need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mvar_lightning import (
    AdjacentAttention,
    FullAttention,
    MultiScaleTokenizer,
    NextScaleTransformer,
    SlidingWindowAttention,
    SlidingWindowHistory,
)
from mvar_lightning.errors import UserError
from mvar_lightning.sampling import ConstantGuidance, CutoffGuidance, GuidanceSchedule, LinearGuidance, generate
from mvar_lightning.sampling.guidance import GuidedRows, as_schedule, unconditional_scales

MakeModel = Callable[..., NextScaleTransformer]


def strengths(schedule: GuidanceSchedule, num_scales: int = 5) -> list[float]:
    return [schedule.strength(scale, num_scales) for scale in range(num_scales)]


def test_schedules() -> None:
    assert strengths(LinearGuidance(2.0)) == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert strengths(ConstantGuidance(2.0)) == [2.0] * 5
    assert strengths(CutoffGuidance(2.0, 1, 3)) == [0.0, 0.5, 1.0, 1.5, 0.0]
    assert strengths(CutoffGuidance(2.0, 2, linear=False)) == [0.0, 0.0, 2.0, 2.0, 2.0]
    assert LinearGuidance(1.0).strength(0, 1) == 0.0
    assert as_schedule(1.5) == LinearGuidance(1.5) and as_schedule(None) == LinearGuidance(0)
    schedule = CutoffGuidance(2.0, 1, 3)
    assert GuidanceSchedule.from_config(schedule.config()) == schedule


def test_unconditional_scales() -> None:
    assert unconditional_scales([0, 0, 0], crosses_scales=True) == range(0)
    assert unconditional_scales([0, 0, 1, 0, 1, 0], crosses_scales=True) == range(5)
    assert unconditional_scales([0, 0, 1, 0, 1, 0], crosses_scales=False) == range(2, 5)
    assert unconditional_scales([0, 1, 1], crosses_scales=False) == range(3)


def watch_rows(model: NextScaleTransformer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    rows: list[int] = []
    step = model.step_features

    def watched(*arguments: Any) -> Tensor:
        h_RlC = step(*arguments)
        rows.append(len(h_RlC))
        return h_RlC

    monkeypatch.setattr(model, "step_features", watched)
    return rows


@pytest.mark.parametrize(
    ("crosses", "cfg", "expected"),
    [
        (True, 0, [2, 2, 2, 2]),
        (True, None, [2, 2, 2, 2]),
        (True, 1.5, [4, 4, 4, 4]),
        (True, CutoffGuidance(1.5, 2, 2), [4, 4, 4, 2]),
        (False, CutoffGuidance(1.5, 2, 2), [2, 2, 4, 2]),
        (False, CutoffGuidance(1.5, last_scale=1), [4, 4, 2, 2]),
        (False, CutoffGuidance(0.0, 1, 2), [2, 2, 2, 2]),
    ],
)
def test_rows_that_are_run(
    crosses: bool,
    cfg: Any,
    expected: list[int],
    make_model: MakeModel,
    tokenizer: MultiScaleTokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(attention=FullAttention() if crosses else AdjacentAttention())
    rows = watch_rows(model, monkeypatch)
    generate(model, tokenizer, [0, 1], cfg=cfg, seeds=[0, 1])
    assert rows == expected


@pytest.mark.parametrize("attention", [FullAttention(), SlidingWindowAttention(2), AdjacentAttention()], ids=repr)
@pytest.mark.parametrize("history", [None, SlidingWindowHistory(2)], ids=repr)
@pytest.mark.parametrize("fuse_conditional", [False, True])
def test_rows_left_out_change_nothing(
    attention: Any, history: Any, fuse_conditional: bool, make_model: MakeModel, tokenizer: MultiScaleTokenizer
) -> None:
    """A cut-off in the middle gives the logits of a run that computes both halves throughout."""
    if history is not None:
        history = SlidingWindowHistory(2, conditional_class_when_guided=fuse_conditional)
    model = make_model(attention=attention, history=history)
    label_B, schedule = torch.tensor([0, 3]), CutoffGuidance(1.5, 2, 2, linear=False)
    rows, everything = GuidedRows(model, label_B, schedule), GuidedRows(model, label_B, ConstantGuidance(1.0))
    quantizer = tokenizer.quantizer
    f_hat, x_BlZ = quantizer.empty_f_hat(2), None
    with torch.no_grad():
        for scale in range(model.pyramid.num_scales):
            both = model.step(everything.state, scale, x_BlZ)
            t = schedule.strength(scale, model.pyramid.num_scales)
            logits_BlV = rows.step(scale, x_BlZ)
            torch.testing.assert_close(logits_BlV, (1 + t) * both[:2] - t * both[2:], atol=1e-4, rtol=1e-4)
            f_hat = quantizer.accumulate(f_hat, quantizer.lookup(logits_BlV.argmax(-1)), scale)
            if scale + 1 < model.pyramid.num_scales:
                x_BlZ = quantizer.next_input(f_hat, scale + 1)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LinearGuidance(-1), "cfg -1"),
        (lambda: ConstantGuidance(float("nan")), "cfg nan"),
        (lambda: CutoffGuidance(1.0, 3, 2), "last_scale=2"),
        (lambda: CutoffGuidance(1.0, 0, 9).check(4), "scales 0 to 3"),
    ],
)
def test_schedules_that_mean_nothing(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()
