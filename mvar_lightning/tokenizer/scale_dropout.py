"""Scale dropout: some images of a batch are rebuilt from their first scales alone, so these must carry an image.

Shapes: B batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mvar_lightning.errors import UserError

FIRST_KEPT = 3
"""Fewest scales an image keeps, where nothing else is said."""


def check_scale_dropout(probability: float, num_scales: int, first: int = FIRST_KEPT) -> None:
    """Raise UserError where dropping scales makes no sense."""
    if not 0 <= probability <= 1:
        raise UserError(f"scale_dropout {probability}: must be in [0, 1]; 0.1 is usual, 0 switches it off")
    if first < 1:
        raise UserError(f"scale_dropout_keeps {first}: an image needs at least 1 scale; {FIRST_KEPT} is usual")
    if probability and num_scales <= first:
        raise UserError(
            f"scale_dropout {probability}: keeps at least {first} scales and the pyramid has {num_scales}; lower "
            "scale_dropout_keeps, or set scale_dropout to 0"
        )


def draw_kept_scales(
    batch: int,
    num_scales: int,
    probability: float,
    first: int = FIRST_KEPT,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Tensor | None:
    """How many scales each image keeps, int64 (B,): with ``probability`` any number from ``first`` to all but one.

    None where nothing is dropped. Draws on the CPU, from torch's own generator if none is given.
    """
    if not probability:
        return None
    dropped_B = torch.rand(batch, generator=generator) < probability
    fewer_B = torch.randint(first, num_scales, (batch,), generator=generator)
    return torch.where(dropped_B, fewer_B, num_scales).to(device)
