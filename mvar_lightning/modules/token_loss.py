"""The training objective: cross-entropy of the next scale's tokens, with its share by scale.

B batch, L tokens of the pyramid, K scales, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar_lightning.pyramid import ScalePyramid


@dataclass(frozen=True)
class TokenLoss:
    """Mean cross-entropy (with gradient), and losses and accuracies by scale (without).

    Accuracy is the share of tokens whose most likely code is the right one; 4-6% is normal at V = 4096.
    """

    loss: Tensor
    accuracy: Tensor
    loss_K: Tensor
    accuracy_K: Tensor

    def named(self) -> dict[str, Tensor]:
        """Figures to log: overall, last scale, each scale."""
        figures = {
            "loss": self.loss.detach(),
            "accuracy": self.accuracy,
            "loss_last": self.loss_K[-1],
            "accuracy_last": self.accuracy_K[-1],
        }
        for scale in range(len(self.loss_K)):
            figures[f"loss_scale_{scale}"] = self.loss_K[scale]
            figures[f"accuracy_scale_{scale}"] = self.accuracy_K[scale]
        return figures


def token_loss(logits_BLV: Tensor, idx_BL: Tensor, pyramid: ScalePyramid) -> TokenLoss:
    """Mean cross-entropy over all B x L tokens, as VAR weighs them (`trainer.py`: every token the same)."""
    loss_BL = F.cross_entropy(logits_BLV.flatten(0, 1), idx_BL.flatten(), reduction="none").view_as(idx_BL)
    with torch.no_grad():
        correct_BL = (logits_BLV.argmax(dim=-1) == idx_BL).float()
        loss_K = torch.stack([part.mean() for part in pyramid.split(loss_BL.detach())])
        accuracy_K = torch.stack([part.mean() for part in pyramid.split(correct_BL)])
    return TokenLoss(loss_BL.mean(), correct_BL.mean(), loss_K, accuracy_K)
