"""What a discriminator and the tokenizer want of logits: the loss axis of adversarial training.

Shapes: B batch, n logits of an image, HW pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mvar_lightning.axis import AxisMember
from mvar_lightning.errors import UserError


class GANLoss(AxisMember):
    """Two losses of logits that are high for real images.

    Args:
        gradient_penalty: weight of R1 (Mescheder et al. 2018, arXiv 1801.04406): half the squared gradient of an
            image's mean logit in its pixels, at real images as they are, not augmented; 0 leaves it out.
        penalty_every: steps between two penalties; each counts for the steps in between.
    """

    def __init__(self, gradient_penalty: float = 0.0, penalty_every: int = 16) -> None:
        if gradient_penalty < 0 or penalty_every < 1:
            raise UserError(
                f"{type(self).__name__}: gradient_penalty {gradient_penalty}, penalty_every {penalty_every}: "
                "give a weight of 0 or more and at least 1 step"
            )
        self.gradient_penalty, self.penalty_every = gradient_penalty, penalty_every

    def discriminator(self, real_Bn: Tensor, fake_Bn: Tensor) -> Tensor:
        """What the discriminator minimizes, a scalar."""
        raise NotImplementedError

    def generator(self, fake_Bn: Tensor) -> Tensor:
        """What the tokenizer minimizes, a scalar."""
        raise NotImplementedError

    def penalty_due(self, step: int) -> bool:
        """Whether the discriminator pays the gradient penalty at this step."""
        return self.gradient_penalty > 0 and step % self.penalty_every == 0

    def penalty(self, discriminator: nn.Module, image_B3HW: Tensor) -> Tensor:
        """The gradient penalty at real images, its weight and the steps it stands for included; float32."""
        # of torch's attention kernels only the plain one can be differentiated twice
        with torch.autocast(image_B3HW.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
            image_B3HW = image_B3HW.detach().float().requires_grad_()
            score = discriminator(image_B3HW).mean(1).sum()
            [gradient] = torch.autograd.grad(score, image_B3HW, create_graph=True)
        return gradient.square().sum((1, 2, 3)).mean() * (self.gradient_penalty / 2 * self.penalty_every)


class HingeLoss(GANLoss):
    """Real logits above 1, others below -1 (as in VQGAN)."""

    def discriminator(self, real_Bn: Tensor, fake_Bn: Tensor) -> Tensor:
        return 0.5 * (F.relu(1 - real_Bn).mean() + F.relu(1 + fake_Bn).mean())

    def generator(self, fake_Bn: Tensor) -> Tensor:
        return -fake_Bn.mean()


class NonSaturatingLoss(GANLoss):
    """Cross-entropy; the tokenizer maximizes log D instead of minimizing log (1 - D). It wants the gradient penalty."""

    def __init__(self, gradient_penalty: float = 1.0, penalty_every: int = 16) -> None:
        super().__init__(gradient_penalty, penalty_every)

    def discriminator(self, real_Bn: Tensor, fake_Bn: Tensor) -> Tensor:
        return 0.5 * (F.softplus(-real_Bn).mean() + F.softplus(fake_Bn).mean())

    def generator(self, fake_Bn: Tensor) -> Tensor:
        return F.softplus(-fake_Bn).mean()
