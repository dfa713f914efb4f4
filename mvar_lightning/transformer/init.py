"""Initialization as published (`init_weights` of VAR's models/var.py and Markov-VAR's models/markovvar.py)."""

from __future__ import annotations

import math

import torch
from torch import nn

from mvar_lightning.transformer.blocks import AdaLNBlock
from mvar_lightning.transformer.history import AttentivePool
from mvar_lightning.transformer.layers import Modulation, ModulationOffset, SelfAttention
from mvar_lightning.transformer.positions import LearnedPositions

HEAD_SCALE = 0.02
ADALN_SCALE = 0.5


@torch.no_grad()
def init_weights(model: nn.Module, *, width: int, depth: int, gamma_init: float) -> None:
    """Initialize a `NextScaleTransformer` in place.

    Args:
        width: C; the base deviation is sqrt(1 / 3C).
        depth: number of blocks; outputs into the residual stream are divided by sqrt(2 depth).
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
    model.head.linear.weight.mul_(HEAD_SCALE)
    model.head.modulation.linear.weight.mul_(ADALN_SCALE)
    for block in model.blocks:
        _scale_block(block, width, depth, gamma_init)


def _scale_block(block: AdaLNBlock, width: int, depth: int, gamma_init: float) -> None:
    assert isinstance(block.attention, SelfAttention)
    block.attention.proj.weight.div_(math.sqrt(2 * depth))
    block.mlp.down.weight.div_(math.sqrt(2 * depth))
    if isinstance(block.modulation, Modulation):
        rows = block.modulation.linear.weight
        rows[: 2 * width].mul_(gamma_init)
        rows[2 * width :].mul_(ADALN_SCALE)
    else:
        block.modulation.offset[:, :, :2].mul_(gamma_init)
        block.modulation.offset[:, :, 2:].mul_(ADALN_SCALE)
