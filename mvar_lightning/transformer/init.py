"""Initialization as published (`init_weights` of VAR's models/var.py and Markov-VAR's models/markovvar.py).

A module may bring two methods, as timm's layers do; one that brings neither keeps the default:
- ``init_weights(std)`` draws the parameters that are its own, not those of its submodules;
- ``scale_weights(depth, gamma_init)`` puts factors on what has been drawn, its submodules' included.

A third, ``no_weight_decay()``, names the parameters (its own or its submodules') that an optimizer must not let decay.
"""

from __future__ import annotations

import math

import torch
from torch import nn


@torch.no_grad()
def init_weights(model: nn.Module, *, width: int, depth: int, gamma_init: float) -> None:
    """Initialize a transformer in place. By default weights are drawn with the base deviation and biases are zero.

    Args:
        model: everything, the blocks and the head included.
        width: C; the base deviation is sqrt(1 / 3C).
        depth: number of blocks; outputs into the residual stream are divided by sqrt(2 depth).
        gamma_init: factor on the AdaLN rows that gate the branches (1e-3 at d16 to 5e-6 at d36).
    """
    std = math.sqrt(1 / width / 3)
    # what a seed means depends on the order of the draws: a module's own parameters come before its submodules'
    for module in model.modules():
        if draw := getattr(module, "init_weights", None):
            draw(std)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
    # only now: what a module scales, its submodules have drawn after it
    for module in model.modules():
        if scale := getattr(module, "scale_weights", None):
            scale(depth, gamma_init)


def without_decay(model: nn.Module) -> set[str]:
    """Names, as in `named_parameters`, of the parameters that modules want left out of weight decay."""
    return {
        f"{prefix}.{name}".removeprefix(".")
        for prefix, module in model.named_modules()
        if hasattr(module, "no_weight_decay")
        for name in module.no_weight_decay()
    }
