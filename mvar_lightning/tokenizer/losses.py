"""Parts of the tokenizer's training loss: a recipe lists the ones it wants, each with its weight.

A new part is one more class: it reads what it needs from the training forward and the image, and gives a scalar.

Shapes: B batch, l tokens of one scale, N rows, V vocabulary, Z code dim, HW pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import Size
from mvar_lightning.tokenizer.tokenizer import TokenizerOutput
from mvar_lightning.tools.compute import exact_float32
from mvar_lightning.tools.processes import mean_over_ranks


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

    def prepare(self, device: torch.device, image_size: Size) -> None:
        """Called once before training or validation: load and check what the term needs. ``image_size`` is a side, or
        (height, width).

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


class EntropyLoss(LossPart):
    """Mean over scales of: mean entropy of a token's soft assignment - ``diversity`` x entropy of the mean assignment.

    Each token becomes sure of its code, and all codes come into use, as in MaskGIT-like tokenizers after Jansen et al.
    2020 and Yu et al. 2023 (arXiv 2310.05737, equation 5). A token's soft assignment is a softmax over the codes of -
    distance^2 / temperature. Distances are measured as the quantizer measures them and in units of a scale's mean
    ``|row|^2 + |code|^2``, so one temperature fits all scales.

    The entropy of a mean depends on the batch it is taken over: validation losses compare at one batch size for each
    process and one number of processes.

    Args:
        weight: factor of this term in the total.
        temperature: of the soft assignment; lower is closer to the nearest code.
        diversity: weight of the entropy of the mean, taken over the rows of all processes. Above 1 it also moves rows
            that are sure of their code, and fills coarse scales further.
        max_rows: rows of a scale that each process uses, drawn anew at each step; bounds the memory at large
            vocabularies. Where it cuts, several processes are not one with their joined batch: each draws its own.
    """

    name = "entropy"

    def __init__(
        self, weight: float = 0.1, temperature: float = 0.05, diversity: float = 1.5, max_rows: int = 2048
    ) -> None:
        super().__init__(weight)
        if temperature <= 0:
            raise UserError(f"EntropyLoss: temperature {temperature}: must be positive")
        if diversity < 0:
            raise UserError(f"EntropyLoss: diversity {diversity}: must be 0 or more")
        if max_rows < 1:
            raise UserError(f"EntropyLoss: max_rows {max_rows}: must be at least 1")
        self.temperature, self.diversity, self.max_rows = temperature, diversity, max_rows

    def forward(self, output: TokenizerOutput, image_B3HW: Tensor) -> Tensor:
        with exact_float32(image_B3HW.device):
            terms = [self._scale(rows_BlZ.flatten(0, 1).float(), output) for rows_BlZ in output.residuals_BlZ]
        return torch.stack(terms).mean()

    def _scale(self, rows_NZ: Tensor, output: TokenizerOutput) -> Tensor:
        if self.training and len(rows_NZ) > self.max_rows:
            rows_NZ = rows_NZ[torch.randperm(len(rows_NZ), device=rows_NZ.device)[: self.max_rows]]
        rows_NZ = output.metric.prepare(rows_NZ)
        bias_V, weight_VZ = output.metric.scores(output.codes_VZ.float())
        # of the two terms the second has the weights, which are twice the codes
        unit = self._shared(rows_NZ.square().sum(1).mean()) + weight_VZ.square().sum(1).mean() / 4
        logits_NV = torch.addmm(bias_V, rows_NZ, weight_VZ.t()) / -(self.temperature * unit.clamp_min(1e-12))
        log_share_NV = logits_NV.log_softmax(dim=1)
        share_NV = log_share_NV.exp()
        each = -(share_NV * log_share_NV).sum(dim=1).mean()
        # the slope of the entropy is infinite at 0
        mean_V = self._shared(share_NV.mean(dim=0)).clamp_min(1e-12)
        return each - self.diversity * torch.special.entr(mean_V).sum()

    def _shared(self, mean: Tensor) -> Tensor:
        """Over all processes, in training only: validation batches may differ in number between processes."""
        return mean_over_ranks(mean) if self.training else mean


class WeightedLoss(nn.Module):
    """A list of parts as one loss.

    Raises:
        UserError: no part, or two parts of one name.
    """

    def __init__(self, parts: Iterable[LossPart]) -> None:
        super().__init__()
        self.parts = cast(Sequence[LossPart], nn.ModuleList(parts))
        names = [part.name for part in self.parts]
        if not names:
            raise UserError("losses: the list is empty; give at least one part such as L1Loss")
        if len(set(names)) < len(names):
            raise UserError(f"losses {names}: the same part twice; give each once and set its weight")

    def forward(self, output: TokenizerOutput, image_B3HW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and every term before its weight by name."""
        terms = {part.name: part(output, image_B3HW) for part in self.parts}
        total = torch.stack([part.weight * terms[part.name] for part in self.parts]).sum()
        return total, terms
