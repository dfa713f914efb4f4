"""Gradients written by hand are autograd's own, to the last bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mvar_lightning.transformer.gradients import NORM_FLOOR, _of_length, added, of_length

Function = Callable[..., Tensor]


def gradients(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    """Results and gradients, of weights that no sum hides."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    result = function(*inputs)
    weight = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    return [result.detach(), *torch.autograd.grad((result * weight).sum(), inputs)]


def vectors() -> list[Tensor]:
    torch.manual_seed(0)
    x_Bl2HD, length_2H1 = torch.randn(3, 5, 2, 4, 8), torch.rand(2, 4, 1) + 1
    x_Bl2HD[0, 0], x_Bl2HD[0, 1] = 0.0, NORM_FLOOR / 100  # shorter than what is divided by
    return [x_Bl2HD, length_2H1]


def images(base: tuple[int, int, int]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(base), torch.randn(3, 5, 8), torch.randn(3, 1, 8)]


@pytest.mark.parametrize(
    ("ours", "theirs", "inputs"),
    [
        (of_length, _of_length, vectors()),
        (added, torch.addcmul, images((3, 5, 8))),
        (added, torch.addcmul, images((3, 1, 8))),
    ],
    ids=["lengths", "a residual", "a shift"],
)
def test_they_are_autograds(ours: Function, theirs: Function, inputs: list[Tensor]) -> None:
    for one, other in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        assert torch.equal(one, other) and one.isfinite().all()
