"""Weights in bf16 for sampling under autocast: what autocast would make of them at every call, made once."""

from __future__ import annotations

import torch
from torch import nn

from mvar_lightning.transformer.transformer import NextScaleTransformer


def weights_in_bf16(model: NextScaleTransformer) -> NextScaleTransformer:
    """Keep the weights of the products in bf16, in place: half the memory, and under autocast the same numbers.

    Without gradients autocast converts every weight anew at every call. What it leaves in float32 stays so: query
    scales and norms, whose rounding would shift every score, and the inputs' embeddings, positions and history, which
    a step makes with autocast off. To be run under autocast; the weights that were in float32 are gone.
    """
    for part in (model.condition, model.blocks, model.head):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)
    return model
