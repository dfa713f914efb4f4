from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from mvar_lightning.training.optimizers import Schedule, ScheduledAdamW, decays, parameter_groups
from mvar_lightning.transformer import LlamaBlocks, NextScaleTransformer, SlidingWindowHistory, VARBlocks


def published(total: int = 1000, final: float = 0.1, end: float = 0.05) -> Schedule:
    return Schedule(
        total_steps=total, warmup_steps=total // 50, final_ratio=final, weight_decay=0.05, weight_decay_end=end
    )


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
    assert published().learning_rate_factor(step) == pytest.approx(factor)


def test_learning_rate_falls_in_a_straight_line() -> None:
    curve = [published().learning_rate_factor(step) for step in range(100, 1000)]
    falls = {round(a - b, 9) for a, b in itertools.pairwise(curve)}
    assert len(falls) == 1
    assert falls.pop() == pytest.approx(0.9 / 0.95 / 979, rel=1e-4)


def test_weight_decay_is_half_a_cosine_to_its_end() -> None:
    schedule = published(end=0.08)
    assert schedule.weight_decay_at(0) == pytest.approx(0.05)
    assert schedule.weight_decay_at(999) == pytest.approx(0.08)
    assert schedule.weight_decay_at(250) == pytest.approx(0.08 - 0.03 * (0.5 + 0.5 * math.cos(math.pi * 250 / 999)))
    assert published().weight_decay_at(500) == pytest.approx(0.05)


def test_the_scheduler_sets_both_and_resumes_on_the_curve() -> None:
    def make() -> tuple[torch.optim.AdamW, ScheduledAdamW]:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(parameter_groups(model.named_parameters()), lr=2.0)
        return optimizer, ScheduledAdamW(optimizer, published(end=0.08))

    optimizer, scheduler = make()
    for _ in range(300):
        optimizer.step()
        scheduler.step()
    decay, no_decay = optimizer.param_groups
    assert decay["lr"] == no_decay["lr"] == pytest.approx(2 * published().learning_rate_factor(300))
    assert decay["weight_decay"] == pytest.approx(published(end=0.08).weight_decay_at(300))
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


def names_by_decay(model: nn.Module) -> tuple[set[str], set[str]]:
    named = dict(model.named_parameters())
    return {n for n, p in named.items() if decays(n, p)}, {n for n, p in named.items() if not decays(n, p)}


def test_groups_of_var() -> None:
    model = NextScaleTransformer(
        [1, 2], vocab_size=8, code_dim=4, num_classes=3, depth=1, blocks=VARBlocks(shared_adaln=True)
    )
    decay, no_decay = names_by_decay(model)
    assert {"word_embedding.weight", "class_embedding.weight", "head.linear.weight"} <= decay
    assert {"positions.start", "positions.token", "positions.level.weight"} <= no_decay
    assert {"blocks.0.modulation.offset", "blocks.0.attention.log_scale", "blocks.0.attention.q_bias"} <= no_decay
    groups = parameter_groups(model.named_parameters())
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
