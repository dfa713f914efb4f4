"""Initialization as published (`init_weights` of VAR's models/var.py and Markov-VAR's models/markovvar.py)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from mvar_lightning.transformer.blocks import AdaLNBlock, ModulatedHead, Modulation, ModulationOffset
from mvar_lightning.transformer.history import AttentivePool
from mvar_lightning.transformer.positions import LearnedPositions

HEAD_SCALE = 0.02
ADALN_SCALE = 0.5


@torch.no_grad()
def init_weights(
    model: nn.Module, blocks: Iterable[AdaLNBlock], head: ModulatedHead, *, width: int, gamma_init: float
) -> None:
    """Initialize a transformer in place.

    Args:
        model: everything, the blocks and the head included.
        blocks: outputs into the residual stream are divided by sqrt(2 x their number).
        head: starts near zero.
        width: C; the base deviation is sqrt(1 / 3C).
        gamma_init: factor on the AdaLN rows that gate the branches (1e-3 at d16 to 5e-6 at d36).
    """
    std = math.sqrt(1 / width / 3)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, LearnedPositions):
            nn.init.trunc_normal_(module.start, std=std)
            nn.init.trunc_normal_(module.token, std=std)
        elif isinstance(module, AttentivePool):
            nn.init.trunc_normal_(module.query, std=std)
        elif isinstance(module, ModulationOffset):
            nn.init.normal_(module.offset, std=width**-0.5)
    # second pass: factors on what the first one drew
    head.linear.weight.mul_(HEAD_SCALE)
    head.modulation.linear.weight.mul_(ADALN_SCALE)
    blocks = list(blocks)
    for block in blocks:
        _scale_block(block, width, len(blocks), gamma_init)


def _scale_block(block: AdaLNBlock, width: int, depth: int, gamma_init: float) -> None:
    block.attention.proj.weight.div_(math.sqrt(2 * depth))
    block.mlp.down.weight.div_(math.sqrt(2 * depth))
    if isinstance(block.modulation, Modulation):
        rows = block.modulation.linear.weight
        rows[: 2 * width].mul_(gamma_init)
        rows[2 * width :].mul_(ADALN_SCALE)
    elif isinstance(block.modulation, ModulationOffset):
        block.modulation.offset[:, :, :2].mul_(gamma_init)
        block.modulation.offset[:, :, 2:].mul_(ADALN_SCALE)
