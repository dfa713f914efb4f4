"""Compiled blocks: every scale has its own shapes, and each is compiled once for all blocks."""

from __future__ import annotations

from typing import Any

import torch

from mvar_lightning.transformer.transformer import NextScaleTransformer

SHAPES_OF_A_SCALE = 4
"""Allowed variants of a block at one scale: with and without guidance, a last chunk of rows, and one to spare."""


def compile_blocks(model: NextScaleTransformer, **options: Any) -> NextScaleTransformer:
    """`torch.compile` every block, in place; the first run of each scale and batch size compiles.

    torch gives up on a function after 8 variants, fewer than there are scales, so that limit is raised.

    Args:
        options: of `torch.compile`; shapes are static by default (``dynamic=False``).
    """
    needed = SHAPES_OF_A_SCALE * model.pyramid.num_scales
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, needed)
    for block in model.blocks:
        block.compile(**{"dynamic": False, **options})
    return model
