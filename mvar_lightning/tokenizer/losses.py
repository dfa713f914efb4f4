"""Parts of the tokenizer's training loss: a recipe lists the ones it wants, each with its weight.

A new part is one more class: it reads what it needs from the training forward and the image, and gives a scalar.

Shapes: B batch, HW pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer.tokenizer import TokenizerOutput


class LossPart(nn.Module, ABC):
    """One term of the loss.

    Args:
        weight: factor of this term in the total; 0 keeps it in the log only.
    """

    name: str
    """Name in the log and in error messages; one list of parts has each name once."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        if weight < 0:
            raise UserError(f"{type(self).__name__}: weight {weight} is negative; give 0 or more")
        self.weight = weight

    def prepare(self, device: torch.device, image_size: int) -> None:
        """Called once before training or validation: load and check what the term needs.

        Raises:
            UserError: a missing or wrong file, or images that the term cannot take.
        """

    @abstractmethod
    def forward(self, output: TokenizerOutput, image_B3HW: Tensor) -> Tensor:
        """The term before its weight, a scalar in float32."""


class L1Loss(LossPart):
    """Mean absolute difference between reconstruction and image."""

    name = "l1"

    def forward(self, output: TokenizerOutput, image_B3HW: Tensor) -> Tensor:
        return F.l1_loss(output.reconstruction_B3HW.float(), image_B3HW.float())


class L2Loss(LossPart):
    """Mean squared difference between reconstruction and image."""

    name = "l2"

    def forward(self, output: TokenizerOutput, image_B3HW: Tensor) -> Tensor:
        return F.mse_loss(output.reconstruction_B3HW.float(), image_B3HW.float())


class QuantizerLoss(LossPart):
    """The quantizer's own loss: codes towards latents, and latents towards codes (see ``MultiScaleQuantizer``)."""

    name = "quantizer"

    def forward(self, output: TokenizerOutput, image_B3HW: Tensor) -> Tensor:
        return output.quantizer_loss


class WeightedLoss(nn.Module):
    """A list of parts as one loss.

    Raises:
        UserError: no part, or two parts of one name.
    """

    def __init__(self, parts: Iterable[LossPart]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        names = [part.name for part in self.each()]
        if not names:
            raise UserError("losses: the list is empty; give at least one part such as L1Loss")
        if len(set(names)) < len(names):
            raise UserError(f"losses {names}: the same part twice; give each once and set its weight")

    def each(self) -> list[LossPart]:
        return [cast(LossPart, part) for part in self.parts]

    def forward(self, output: TokenizerOutput, image_B3HW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and every term before its weight by name."""
        terms = {part.name: part(output, image_B3HW) for part in self.each()}
        total = torch.stack([part.weight * terms[part.name] for part in self.each()]).sum()
        return total, terms
