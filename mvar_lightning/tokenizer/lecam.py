"""LeCam regularization of a discriminator (Tseng et al. 2021, arXiv 2104.03310).

Shapes: B batch, n logits of an image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer.ranks import sum_over_ranks, world_size


class LeCam(nn.Module):
    """Keeps logits of real images from rising above the running mean of the others, and the other way round.

    One-sided, as in the paper's code. The means are those of whole steps, over all batches and processes of a step, and
    lie in buffers.

    Args:
        weight: of the regularization; 0 leaves it out.
        decay: of the running means.
    """

    means_2: Tensor
    updates: Tensor

    def __init__(self, weight: float = 0.0, decay: float = 0.999) -> None:
        super().__init__()
        if weight < 0 or not 0 <= decay < 1:
            raise UserError(f"lecam {weight}, lecam_decay {decay}: give a weight of 0 or more and a decay in [0, 1)")
        self.weight, self.decay = weight, decay
        self.register_buffer("means_2", torch.zeros(2))
        self.register_buffer("updates", torch.tensor(0))
        self._seen: list[Tensor] = []

    def forward(self, real_Bn: Tensor, fake_Bn: Tensor) -> Tensor:
        """The term before its weight, a scalar; 0 before the first step."""
        self._seen.append(torch.stack([real_Bn.detach().mean(), fake_Bn.detach().mean()]).float())
        # a copy: the buffer changes before others may look at this graph
        real_mean, fake_mean = self.means_2.clone()
        term = F.relu(real_Bn - fake_mean).square().mean() + F.relu(real_mean - fake_Bn).square().mean()
        return term * (self.updates > 0)

    @torch.no_grad()
    def after_step(self) -> None:
        """Take this step's logits into the running means; the first ones become them."""
        if not self._seen:
            return
        step_2 = sum_over_ranks(torch.stack(self._seen).mean(0)) / world_size()
        self._seen = []
        self.means_2.lerp_(step_2, torch.where(self.updates > 0, 1 - self.decay, 1.0))
        self.updates += 1
