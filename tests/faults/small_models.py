"""Models of a few hundred weights, and what Lightning would write of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mvar_lightning.attention import AdjacentAttention, FullAttention
from mvar_lightning.tokenizer import MultiScaleTokenizer, fingerprint
from mvar_lightning.transformer import NextScaleTransformer

SCALES = [1, 2, 3]
SIZES: dict[str, Any] = {"vocab_size": 16, "code_dim": 4}
CONVOLUTIONS: dict[str, Any] = {"channels": 8, "norm_groups": 4, "num_res_blocks": 1, "channel_multipliers": [1, 1]}


def small_tokenizer() -> MultiScaleTokenizer:
    """6 x 6 pixels, 14 tokens."""
    torch.manual_seed(0)
    return MultiScaleTokenizer(SCALES, **SIZES, **CONVOLUTIONS).eval()


def small_model(adjacent: bool = False) -> NextScaleTransformer:
    torch.manual_seed(1)
    attention = AdjacentAttention() if adjacent else FullAttention()
    return NextScaleTransformer(
        SCALES, **SIZES, num_classes=3, depth=1, width=16, heads=2, gamma_init=0.1, attention=attention
    ).eval()


def published_pair() -> tuple[NextScaleTransformer, MultiScaleTokenizer]:
    """One that `mvar export` takes: 32 norm groups."""
    torch.manual_seed(2)
    tokenizer = MultiScaleTokenizer(SCALES, **SIZES, channels=32, num_res_blocks=1, channel_multipliers=[1, 1]).eval()
    return small_model(), tokenizer


def lightning_content(model: nn.Module, tokenizer: MultiScaleTokenizer) -> dict[str, Any]:
    state = {f"tokenizer.{key}": value for key, value in tokenizer.state_dict().items()}
    state |= {f"model.{key}": value for key, value in model.state_dict().items()}
    record = {
        "format": 1,
        "kind": "next_scale",
        "tokenizer": tokenizer.config,
        "tokenizer_hash": fingerprint(tokenizer),
        "model": model.config,
    }
    return {"state_dict": state, "mvar_lightning": record, "epoch": 2, "global_step": 7}
