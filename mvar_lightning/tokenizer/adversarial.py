"""Adversarial training of the tokenizer (Esser et al. 2021, arXiv 2012.09841, and what later tokenizers added).

Both losses of a batch join one backward pass: the tokenizer's goes through a discriminator whose parameters are held
still, the discriminator's sees a detached reconstruction. So under DDP every parameter has its gradient in the one
pass that is reduced, and no search for unused ones is needed.

Shapes: B batch, n logits of an image, HW pixels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mvar_lightning.axis import AxisMember
from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer.discriminator import Augmentation, Discriminator
from mvar_lightning.tools.processes import sum_over_ranks, world_size

SMALL = 1e-4  # added to the norm that divides in the adaptive weight, as in VQGAN


class AdversarialTerms(NamedTuple):
    """What a batch adds: a weighted scalar for each side, and named values for the log."""

    generator: Tensor
    discriminator: Tensor
    log: dict[str, Tensor]


class AdversarialLoss(nn.Module):
    """A discriminator with its losses, and how much it has to say to the tokenizer.

    Args:
        discriminator: the network.
        loss: hinge or non-saturating, perhaps with a gradient penalty.
        weight: factor of the tokenizer's adversarial term.
        adaptive: also scale that term by the ratio of gradient norms at the decoder's last layer, of the other losses
            to it.
        max_adaptive: largest such ratio.
        start: when the discriminator starts to train and to be heard: a step (whole number) or a share of the run.
        ramp: how long from there on its weight rises in a straight line: steps or a share of the run.
        lecam, lecam_decay: weight of LeCam's regularization and decay of its means.
        augment: what images go through before the discriminator sees them.
        lr: peak learning rate of its AdamW; the tokenizer's if not given.
        betas: of its AdamW.

    Raises:
        UserError: a value out of its range.
    """

    def __init__(
        self,
        discriminator: Discriminator,
        loss: GANLoss | None = None,
        weight: float = 0.5,
        adaptive: bool = True,
        max_adaptive: float = 1e4,
        start: int | float = 0.25,
        ramp: int | float = 0,
        lecam: float = 0.0,
        lecam_decay: float = 0.999,
        augment: Augmentation | None = None,
        lr: float | None = None,
        betas: tuple[float, float] = (0.5, 0.9),
    ) -> None:
        super().__init__()
        if weight < 0 or max_adaptive <= 0 or (lr is not None and lr <= 0):
            raise UserError(
                f"AdversarialLoss: weight {weight}, max_adaptive {max_adaptive}, lr {lr}: "
                "a weight is 0 or more, the others are positive"
            )
        for name, value in (("start", start), ("ramp", ramp)):
            if value < 0 or (isinstance(value, float) and value > 1):
                raise UserError(
                    f"AdversarialLoss: {name} {value}: give a number of steps (a whole number) or a share of the run "
                    "in [0, 1]"
                )
        self.discriminator, self.loss, self.augment = discriminator, loss or HingeLoss(), augment
        self.weight, self.adaptive, self.max_adaptive = weight, adaptive, max_adaptive
        self.start, self.start_step, self.ramp, self.ramp_steps = start, 0, ramp, 0
        self.lecam = LeCam(lecam, lecam_decay)
        self.lr, self.betas = lr, betas

    def plan(self, total_steps: float) -> None:
        """Turn shares of the run into steps. Raises `UserError` where its length is not known (infinite)."""
        for name, value in (("start", self.start), ("ramp", self.ramp)):
            if isinstance(value, float) and math.isinf(total_steps):
                raise UserError(
                    f"AdversarialLoss: {name} {value} is a share of the run, but the run has no end; "
                    "set trainer.max_steps or give a number of steps"
                )
        self.start_step, self.ramp_steps = (
            value if isinstance(value, int) else round(value * total_steps) for value in (self.start, self.ramp)
        )

    def active(self, step: int) -> bool:
        """Whether the discriminator trains at this step."""
        return step >= self.start_step

    def strength(self, step: int) -> float:
        """Weight of the tokenizer's adversarial term at a step, before the adaptive factor."""
        passed = step - self.start_step
        return self.weight * (min(1.0, (passed + 1) / self.ramp_steps) if self.ramp_steps else 1.0)

    def forward(
        self, reconstruction_B3HW: Tensor, image_B3HW: Tensor, rest: Tensor, last_layer: Tensor, step: int
    ) -> AdversarialTerms:
        """Both sides' losses of a batch.

        Args:
            reconstruction_B3HW: with the tokenizer's gradient.
            image_B3HW: the real images.
            rest: the tokenizer's other losses, a scalar that the adaptive weight compares with.
            last_layer: weight of the decoder's last layer.
            step: optimizer steps of the tokenizer so far.
        """
        if not self.active(step):
            # idle, but with a gradient of zero: DDP waits for every parameter in every backward pass
            idle = torch.stack([parameter.sum() for parameter in self.discriminator.parameters()]).sum() * 0
            return AdversarialTerms(rest.new_zeros(()), idle, {})
        reconstruction_B3HW = reconstruction_B3HW.float()
        # gradients pass through the discriminator but not to its parameters
        trained = [parameter for parameter in self.discriminator.parameters() if parameter.requires_grad]
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            generator = self.loss.generator(self._logits(reconstruction_B3HW))
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
        factor = self._adaptive_factor(rest, generator, last_layer)
        discriminator, log = self._discriminator_loss(reconstruction_B3HW.detach(), image_B3HW.float(), step)
        log = {"adversarial": generator.detach(), "adversarial_weight": factor * self.strength(step), **log}
        return AdversarialTerms(generator * (factor * self.strength(step)), discriminator, log)

    def after_step(self) -> None:
        """Called after each optimizer step of the discriminator."""
        self.lecam.after_step()
        self.discriminator.after_step()

    def _discriminator_loss(self, fake_B3HW: Tensor, real_B3HW: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        real_Bn, fake_Bn = self._logits(real_B3HW), self._logits(fake_B3HW)
        loss = self.loss.discriminator(real_Bn, fake_Bn)
        means = {"logits_real": real_Bn.detach().mean(), "logits_fake": fake_Bn.detach().mean()}
        log = {"discriminator": loss.detach(), **means}
        if self.lecam.weight:
            term = self.lecam(real_Bn, fake_Bn)
            loss, log["lecam"] = loss + self.lecam.weight * term, term.detach()
        if self.loss.penalty_due(step):
            term = self.loss.penalty(self.discriminator, real_B3HW)
            loss, log["gradient_penalty"] = loss + term, term.detach()
        return loss, log

    def _logits(self, image_B3HW: Tensor) -> Tensor:
        return self.discriminator(self.augment(image_B3HW) if self.augment else image_B3HW)

    def _adaptive_factor(self, rest: Tensor, generator: Tensor, last_layer: Tensor) -> Tensor:
        """|gradient of rest| / |gradient of generator| at the last layer; gradients are means over the processes."""
        if not self.adaptive:
            return rest.new_ones(())
        norms = []
        for loss in (rest, generator):
            # the graph stays: the step's own backward pass goes through it again
            [gradient] = torch.autograd.grad(loss, last_layer, retain_graph=True, allow_unused=True)
            if gradient is None:
                raise UserError(
                    "AdversarialLoss: the adaptive weight compares with the other losses of the reconstruction, and "
                    "there is none; add L1Loss or L2Loss, or set adaptive: false"
                )
            norms.append((sum_over_ranks(gradient.float()) / world_size()).norm())
        return (norms[0] / (norms[1] + SMALL)).clamp(max=self.max_adaptive)


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


class LeCam(nn.Module):
    """Keeps logits of real images from rising above the running mean of the others, and the other way round.

    Regularizes a discriminator (Tseng et al. 2021, arXiv 2104.03310). One-sided, as in the paper's code. The means are
    those of whole steps, over all batches and processes of a step, and lie in buffers.

    Args:
        weight: of the regularization; 0 leaves it out.
        decay: of the running means.
    """

    def __init__(self, weight: float = 0.0, decay: float = 0.999) -> None:
        super().__init__()
        if weight < 0 or not 0 <= decay < 1:
            raise UserError(f"lecam {weight}, lecam_decay {decay}: give a weight of 0 or more and a decay in [0, 1)")
        self.weight, self.decay = weight, decay
        self.means_2, self.updates = nn.Buffer(torch.zeros(2)), nn.Buffer(torch.tensor(0))
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
        self.updates.add_(1)
