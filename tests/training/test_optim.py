from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from mvar_lightning.training.optimizers import HalfCosine, HeldLine, ScheduledAdamW, half_cosine, parameter_groups
from mvar_lightning.transformer import LlamaBlocks, NextScaleTransformer, SlidingWindowHistory, VARBlocks


def published(total: int = 1000, final: float = 0.1) -> HeldLine:
    return HeldLine(total, warmup_steps=total // 50, final_ratio=final)


def weight_decay_at(step: int, end: float, total: int = 1000) -> float:
    return half_cosine(0.05, end, step / (total - 1))


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.005),  # start of the warm-up
        (10, 0.005 + 0.995 / 2),  # halfway
        (20, 1.0),  # end of the warm-up
        (68, 1.0),  # first 5% of the rest
        (999, 0.1),  # last step
    ],
)
def test_learning_rate_curve(step: int, factor: float) -> None:
    assert published().factor(step) == pytest.approx(factor)


def test_learning_rate_falls_in_a_straight_line() -> None:
    curve = [published().factor(step) for step in range(100, 1000)]
    falls = {round(a - b, 9) for a, b in itertools.pairwise(curve)}
    assert len(falls) == 1
    assert falls.pop() == pytest.approx(0.9 / 0.95 / 979, rel=1e-4)


def test_weight_decay_is_half_a_cosine_to_its_end() -> None:
    assert weight_decay_at(0, end=0.08) == pytest.approx(0.05)
    assert weight_decay_at(999, end=0.08) == weight_decay_at(1500, end=0.08) == pytest.approx(0.08)
    assert weight_decay_at(250, end=0.08) == pytest.approx(0.08 - 0.03 * (0.5 + 0.5 * math.cos(math.pi * 250 / 999)))
    assert weight_decay_at(500, end=0.05) == pytest.approx(0.05)


def test_schedules_of_tokenizer_checkpoints_from_before_load() -> None:
    """They were written by torch's `LambdaLR`."""
    model = nn.Linear(2, 2)
    ours, theirs = (torch.optim.AdamW(model.parameters(), lr=2.0) for _ in range(2))
    curve = HalfCosine(100, 10, 0.1)
    earlier = torch.optim.lr_scheduler.LambdaLR(theirs, curve.factor)
    for _ in range(30):
        theirs.step()
        earlier.step()
    scheduler = ScheduledAdamW(ours, curve)
    ours.load_state_dict(theirs.state_dict())
    scheduler.load_state_dict(earlier.state_dict())
    for optimizer, each in ((ours, scheduler), (theirs, earlier)):
        optimizer.step()
        each.step()
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"] == 2.0 * curve.factor(31)


def test_the_scheduler_sets_both_and_resumes_on_the_curve() -> None:
    def make() -> tuple[torch.optim.AdamW, ScheduledAdamW]:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(parameter_groups(model), lr=2.0)
        return optimizer, ScheduledAdamW(optimizer, published(), (0.05, 0.08))

    optimizer, scheduler = make()
    for _ in range(300):
        optimizer.step()
        scheduler.step()
    decay, no_decay = optimizer.param_groups
    assert decay["lr"] == no_decay["lr"] == pytest.approx(2 * published().factor(300))
    assert decay["weight_decay"] == pytest.approx(weight_decay_at(300, end=0.08))
    assert no_decay["weight_decay"] == 0.0

    resumed, again = make()
    resumed.load_state_dict(optimizer.state_dict())
    again.load_state_dict(scheduler.state_dict())
    resumed.step()
    again.step()
    optimizer.step()
    scheduler.step()
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert resumed.param_groups[0]["weight_decay"] == optimizer.param_groups[0]["weight_decay"]


def names_by_decay(model: nn.Module) -> list[set[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [{names[parameter] for parameter in group["params"]} for group in parameter_groups(model)]


def test_groups_of_var() -> None:
    model = NextScaleTransformer(
        [1, 2], vocab_size=8, code_dim=4, num_classes=3, depth=1, blocks=VARBlocks(shared_adaln=True)
    )
    decay, no_decay = names_by_decay(model)
    assert {"word_embedding.weight", "class_embedding.weight", "head.linear.weight"} <= decay
    assert {"positions.start", "positions.token", "positions.level.weight"} <= no_decay
    assert {"blocks.0.modulation.offset", "blocks.0.attention.log_scale", "blocks.0.attention.q_bias"} <= no_decay
    groups = parameter_groups(model)
    assert [len(group["params"]) for group in groups] == [len(decay), len(no_decay)]


def test_groups_of_markov_var() -> None:
    model = NextScaleTransformer(
        [1, 2],
        vocab_size=8,
        code_dim=4,
        num_classes=3,
        depth=2,
        blocks=LlamaBlocks(),
        history=SlidingWindowHistory(),
    )
    decay, no_decay = names_by_decay(model)
    assert {"history.pools.0.query", "history.fuse.weight", "blocks.0.mlp.gate.weight"} <= decay
    # the release matches `lvl_embed` by name, so its MLP does not decay either
    assert {"positions.up.weight", "positions.down.weight", "blocks.0.norm.weight"} <= no_decay
