"""Any attention strategy runs with any history and any block: two steps of each in the product of the axes."""

from __future__ import annotations

import itertools

import pytest
import torch

from mvar_lightning import (
    AdjacentAttention,
    AttentionStrategy,
    BlockDesign,
    FullAttention,
    GlobalHistory,
    History,
    LlamaBlocks,
    MixedHistory,
    NextScaleTransformer,
    NoHistory,
    SlidingWindowAttention,
    SlidingWindowHistory,
    SpatialAttention,
    VARBlocks,
)
from mvar_lightning.training.optimizers import parameter_groups
from mvar_lightning.training.token_loss import token_loss

SCALES, VOCAB, CODE_DIM, CLASSES = (1, 2, 3, 4), 24, 6, 3
ATTENTION = (FullAttention(), AdjacentAttention(), SlidingWindowAttention(2), SpatialAttention(3, scales=1))
HISTORIES = (NoHistory(), SlidingWindowHistory(2), GlobalHistory(queries=2), MixedHistory(2))
BLOCKS = (VARBlocks(), VARBlocks(shared_adaln=True), LlamaBlocks())
PRODUCT = list(itertools.product(ATTENTION, HISTORIES, BLOCKS))


def name_of(member: object) -> str:
    return repr(member).replace("()", "")


def make(attention: AttentionStrategy, history: History, blocks: BlockDesign) -> NextScaleTransformer:
    torch.manual_seed(0)
    return NextScaleTransformer(
        SCALES,
        vocab_size=VOCAB,
        code_dim=CODE_DIM,
        num_classes=CLASSES,
        depth=2,
        width=16,
        heads=2,
        attention=attention,
        history=history,
        blocks=blocks,
        gamma_init=0.5,
    )


@pytest.mark.parametrize(("attention", "history", "blocks"), PRODUCT, ids=name_of)
def test_two_steps_reach_every_parameter_and_lower_the_loss(
    attention: AttentionStrategy, history: History, blocks: BlockDesign
) -> None:
    model = make(attention, history, blocks).train()
    model.label_drop = 0.0
    tokens = model.pyramid.num_tokens
    idx_BL = torch.randint(VOCAB, (6, tokens))
    x_BLZ, label_B = torch.randn(6, tokens - 1, CODE_DIM), torch.arange(6) % CLASSES
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-2)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = token_loss(model(x_BLZ, label_B), idx_BL, model.pyramid).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not without, f"no gradient reaches {without}"
    assert all(torch.isfinite(torch.tensor(losses))) and losses[1] < losses[0]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize(("attention", "history", "blocks"), PRODUCT, ids=name_of)
def test_the_configuration_builds_the_same_member_of_the_product(
    attention: AttentionStrategy, history: History, blocks: BlockDesign
) -> None:
    model = make(attention, history, blocks).eval()
    again = NextScaleTransformer.from_config(model.config).eval()
    assert (again.strategy, again.history_design, again.block_design) == (attention, history, blocks)
    again.load_state_dict(model.state_dict())
    x_BLZ = torch.randn(2, model.pyramid.num_tokens - 1, CODE_DIM)
    assert torch.equal(again(x_BLZ, torch.tensor([0, CLASSES])), model(x_BLZ, torch.tensor([0, CLASSES])))
