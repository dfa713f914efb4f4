"""The entropy term: each token sure of its code, all codes in use, scale by scale.

(As in MaskGIT-like tokenizers after Jansen et al. 2020 and Yu et al. 2023, arXiv 2310.05737, equation 5.)

Shapes: B batch, l tokens of one scale, N rows, V vocabulary, Z code dim, HW pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer.losses import LossPart
from mvar_lightning.tokenizer.ranks import mean_over_ranks
from mvar_lightning.tokenizer.tokenizer import TokenizerOutput


class EntropyLoss(LossPart):
    """Mean over scales of: mean entropy of a token's soft assignment - ``diversity`` x entropy of the mean assignment.

    A token's soft assignment is a softmax over the codes of - distance^2 / temperature. Distances are measured as the
    quantizer measures them and in units of a scale's mean |row|^2 + |code|^2, so one temperature fits all scales.

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
        with torch.autocast(image_B3HW.device.type, enabled=False):
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
