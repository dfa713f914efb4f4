"""Sums, means and rows over all training processes; on one process they are what they are given.

Shapes: N rows, Z width of a row.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def tell(log: logging.Logger, message: str) -> None:
    """A warning, of the first process alone."""
    if world_size() == 1 or dist.get_rank() == 0:
        log.warning(message)


def gather_rows(rows_NZ: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks and without gradient. Each must bring equally many.

    So processes together see what one would whose batch is theirs one after the other.
    """
    rows_NZ = rows_NZ.detach().contiguous()
    if world_size() == 1:
        return rows_NZ
    parts = [torch.empty_like(rows_NZ) for _ in range(world_size())]
    dist.all_gather(parts, rows_NZ)
    return torch.cat(parts)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """A new tensor, without gradient."""
    total = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def take_from_first(tensor: Tensor) -> None:
    """Put rank zero's values into the tensor of every process."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean over the processes, differentiable with respect to each process' share.

    With gradients averaged over the processes (DDP), a loss of this mean trains as a loss of all rows at once would.
    """
    return tensor if world_size() == 1 else cast(Tensor, _Mean.apply(tensor))


class _Mean(torch.autograd.Function):
    """Every process' loss depends on every share: the gradients of all of them come back to it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return sum_over_ranks(tensor) / world_size()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient) / world_size()
