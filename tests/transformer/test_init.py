"""Initialization as published: each statistic of the releases' `init_weights`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mvar_lightning.transformer import LlamaBlocks, NextScaleTransformer, SlidingWindowHistory, VARBlocks
from mvar_lightning.transformer.blocks import BlockDesign
from mvar_lightning.transformer.transformer import without_decay

WIDTH, DEPTH, GAMMA = 256, 4, 1e-3
STD = math.sqrt(1 / WIDTH / 3)


def make(blocks: BlockDesign) -> NextScaleTransformer:
    torch.manual_seed(0)
    return NextScaleTransformer(
        [1, 2, 3, 4, 6],
        vocab_size=512,
        code_dim=32,
        num_classes=100,
        depth=DEPTH,
        width=WIDTH,
        heads=4,
        blocks=blocks,
        history=SlidingWindowHistory() if isinstance(blocks, LlamaBlocks) else None,
        gamma_init=GAMMA,
    )


def deviation(tensor: torch.Tensor) -> float:
    return tensor.std().item()


@pytest.mark.parametrize("blocks", [VARBlocks(), LlamaBlocks()], ids=repr)
def test_deviations(blocks: BlockDesign) -> None:
    model = make(blocks)
    block = model.blocks[2]
    near = {"rel": 0.05}
    assert deviation(model.word_embedding.weight) == pytest.approx(STD, **near)
    assert deviation(model.class_embedding.weight) == pytest.approx(STD, **near)
    assert deviation(model.head.linear.weight) == pytest.approx(0.02 * STD, **near)
    assert deviation(model.head.modulation.linear.weight) == pytest.approx(0.5 * STD, **near)
    assert deviation(block.attention.qkv.weight) == pytest.approx(STD, **near)
    assert deviation(block.attention.proj.weight) == pytest.approx(STD / math.sqrt(2 * DEPTH), **near)
    assert deviation(block.mlp.down.weight) == pytest.approx(STD / math.sqrt(2 * DEPTH), **near)
    rows = block.modulation.linear.weight
    assert deviation(rows[: 2 * WIDTH]) == pytest.approx(GAMMA * STD, **near)
    assert deviation(rows[2 * WIDTH :]) == pytest.approx(0.5 * STD, **near)
    assert block.attention.log_scale.flatten().tolist() == pytest.approx([math.log(4)] * 4)
    zero = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert zero
    assert all(not p.any() for p in zero)


def test_deviations_of_positions() -> None:
    positions = make(VARBlocks()).positions
    for tensor in (positions.start, positions.token, positions.level.weight):
        assert deviation(tensor) == pytest.approx(STD, rel=0.15)


def test_deviations_of_markov_var() -> None:
    model = make(LlamaBlocks())
    pool = model.history.pools[0]
    for tensor in (pool.query, pool.kv.weight, pool.proj.weight, model.history.fuse.weight):
        assert deviation(tensor) == pytest.approx(STD, rel=0.15)
    for tensor in (model.positions.up.weight, model.positions.down.weight, model.blocks[2].mlp.gate.weight):
        assert deviation(tensor) == pytest.approx(STD, rel=0.05)
    norms = (model.history.norm_words, model.history.norm_context, model.blocks[2].norm, model.head.norm)
    assert all((norm.weight == 1).all() for norm in norms)


def test_deviations_of_shared_adaln() -> None:
    model = make(VARBlocks(shared_adaln=True))
    offsets = torch.cat([block.modulation.offset for block in model.blocks])
    assert deviation(offsets[:, :, :2]) == pytest.approx(GAMMA * WIDTH**-0.5, rel=0.1)
    assert deviation(offsets[:, :, 2:]) == pytest.approx(0.5 * WIDTH**-0.5, rel=0.1)
    assert deviation(model.condition.linear.weight) == pytest.approx(STD, rel=0.05)


class TunedNorm(nn.Module):
    """A part that brings its own start and its own exception; its gain has two dimensions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(1, width))
        self.unsaid = nn.Linear(width, width)

    def init_weights(self, std: float) -> None:
        nn.init.constant_(self.gain, std)

    def scale_weights(self, depth: int, gamma_init: float) -> None:
        self.unsaid.weight.zero_()

    def no_weight_decay(self) -> set[str]:
        return {"gain"}

    def forward(self, x_BlC: torch.Tensor) -> torch.Tensor:
        return x_BlC * self.gain


class TunedBlocks(VARBlocks):
    def make_norm(self, width: int) -> nn.Module:
        return TunedNorm(width)


def test_a_part_of_ones_own_brings_its_start_and_its_weight_decay_and_else_gets_the_default() -> None:
    model = make(TunedBlocks())
    norm = model.blocks[0].norm
    assert norm.gain.flatten().tolist() == pytest.approx([STD] * WIDTH)
    assert not norm.unsaid.weight.any() and not norm.unsaid.bias.any()
    assert {"blocks.0.norm.gain", "head.norm.gain", "positions.token"} <= without_decay(model)
    assert "blocks.0.norm.unsaid.weight" not in without_decay(model)


def test_drop_path_rises_with_depth() -> None:
    with torch.device("meta"):
        model = NextScaleTransformer([1, 2], vocab_size=8, code_dim=4, num_classes=2, depth=24)
    rates = [block.drop_path.probability for block in model.blocks]
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0.1)
    assert rates == sorted(rates)
