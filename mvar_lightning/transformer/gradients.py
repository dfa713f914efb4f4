"""Small functions of a block with gradients written by hand: autograd's own bits in fewer passes over memory, or less
kept for the backward pass.

B batch, l tokens of the scales at hand, C width, H heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NORM_FLOOR = 1e-12  # shortest length a query or key is divided by (that of `F.normalize`)


def of_length(x_Bl2HD: Tensor, length_2H1: Tensor) -> Tensor:
    """Queries and keys with the lengths of their heads, in float32."""
    exact = x_Bl2HD.dtype == torch.float32
    if exact and torch.compiler.is_compiling():  # a compiler fuses the passes itself
        return _of_length(x_Bl2HD, length_2H1)
    function = _OfLength if exact else _HalfOfLength
    result: Tensor = function.apply(x_Bl2HD, length_2H1)
    return result


def _of_length(x_Bl2HD: Tensor, length_2H1: Tensor) -> Tensor:
    norm_Bl2H1 = torch.linalg.vector_norm(x_Bl2HD, dim=-1, keepdim=True)
    return x_Bl2HD * (length_2H1 / norm_Bl2H1.clamp_min(NORM_FLOOR))


class _OfLength(torch.autograd.Function):
    """`_of_length` in float32. The gradient has autograd's own bits, in fewer passes over memory."""

    @staticmethod
    def forward(ctx: Any, x_Bl2HD: Tensor, length_2H1: Tensor) -> Tensor:
        ctx.save_for_backward(x_Bl2HD, length_2H1)
        return _of_length(x_Bl2HD, length_2H1)

    @staticmethod
    def backward(ctx: Any, grad_Bl2HD: Tensor) -> tuple[Tensor, Tensor]:
        x, length_2H1 = ctx.saved_tensors
        norm_Bl2H1 = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        floored_Bl2H1 = norm_Bl2H1.clamp_min(NORM_FLOOR)
        factor_Bl2H1 = length_2H1 / floored_Bl2H1
        along_Bl2H1 = (grad_Bl2HD * x).sum(dim=-1, keepdim=True)
        # too short a vector is divided by the floor, whatever its length
        of_norm_Bl2H1 = -along_Bl2H1 * (factor_Bl2H1 / floored_Bl2H1) * (norm_Bl2H1 >= NORM_FLOOR)
        grad_x = (x / floored_Bl2H1).mul_(of_norm_Bl2H1).add_(grad_Bl2HD * factor_Bl2H1)
        return grad_x, (along_Bl2H1 / floored_Bl2H1).sum(dim=(0, 1))


class _HalfOfLength(torch.autograd.Function):
    """`_of_length` in float32 of half-precision vectors. Kept for the backward pass are the vectors as they came, a
    part of what the values keep anyway, and not their float32 copy: 8 bytes a token and channel."""

    @staticmethod
    def forward(ctx: Any, x_Bl2HD: Tensor, length_2H1: Tensor) -> Tensor:
        ctx.save_for_backward(x_Bl2HD, length_2H1)
        return _of_length(x_Bl2HD.float(), length_2H1)

    @staticmethod
    def backward(ctx: Any, grad_Bl2HD: Tensor) -> tuple[Tensor, Tensor]:
        half_Bl2HD, length_2H1 = ctx.saved_tensors
        x, grad = half_Bl2HD.float(), grad_Bl2HD.float()
        norm_Bl2H1 = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = 1 / norm_Bl2H1.clamp_min(NORM_FLOOR)
        unit = x * inverse
        along_Bl2H1 = (grad * unit).sum(dim=-1, keepdim=True)
        # a change along the vector changes nothing, unless it is too short to be normalized
        across = grad - unit * torch.where(norm_Bl2H1 >= NORM_FLOOR, along_Bl2H1, 0.0)
        return (across * (length_2H1 * inverse)).to(half_Bl2HD.dtype), along_Bl2H1.sum(dim=(0, 1))


def added(base: Tensor, x_BlC: Tensor, factor_B1C: Tensor) -> Tensor:
    """base + x factor; the base is (B, l, C) or (B, 1, C)."""
    plain = base.dtype == x_BlC.dtype == factor_B1C.dtype == torch.float32
    if not plain or torch.compiler.is_compiling():
        return torch.addcmul(base, x_BlC, factor_B1C)
    result: Tensor = _Added.apply(base, x_BlC, factor_B1C)
    return result


class _Added(torch.autograd.Function):
    """`torch.addcmul`, in whose own backward pass ``x`` is first copied, times its argument `value`, which is 1."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, x_BlC: Tensor, factor_B1C: Tensor) -> Tensor:
        ctx.save_for_backward(x_BlC, factor_B1C)
        ctx.of_image = base.shape[1] == 1
        return torch.addcmul(base, x_BlC, factor_B1C)

    @staticmethod
    def backward(ctx: Any, grad_BlC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_BlC, factor_B1C = ctx.saved_tensors
        base = grad_BlC.sum(dim=1, keepdim=True) if ctx.of_image else grad_BlC
        return base, grad_BlC * factor_B1C, (grad_BlC * x_BlC).sum(dim=1, keepdim=True)
