"""Adversarial training of the tokenizer (Esser et al. 2021, arXiv 2012.09841, and what later tokenizers added).

Both losses of a batch join one backward pass: the tokenizer's goes through a discriminator whose parameters are held
still, the discriminator's sees a detached reconstruction. So under DDP every parameter has its gradient in the one
pass that is reduced, and no search for unused ones is needed.

Shapes: B batch, n logits of an image, HW pixels.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer.diff_augment import Augmentation
from mvar_lightning.tokenizer.discriminator import Discriminator
from mvar_lightning.tokenizer.gan_losses import GANLoss, HingeLoss
from mvar_lightning.tokenizer.lecam import LeCam
from mvar_lightning.tokenizer.ranks import sum_over_ranks, world_size

SMALL = 1e-4
"""Added to the norm that divides in the adaptive weight, as in VQGAN."""


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
        _check_time("start", start)
        _check_time("ramp", ramp)
        self.discriminator = discriminator
        self.loss = loss or HingeLoss()
        self.weight, self.adaptive, self.max_adaptive = weight, adaptive, max_adaptive
        self.start, self.ramp = start, ramp
        self.lecam = LeCam(lecam, lecam_decay)
        self.augment = augment
        self.lr, self.betas = lr, betas
        self.start_step, self.ramp_steps = 0, 0

    def plan(self, total_steps: float) -> None:
        """Turn shares of the run into steps. Raises `UserError` where its length is not known (infinite)."""
        self.start_step = _steps("start", self.start, total_steps)
        self.ramp_steps = _steps("ramp", self.ramp, total_steps)

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
            # a gradient of zero, so that DDP finds every parameter in every backward pass
            idle = torch.stack([parameter.sum() for parameter in self.discriminator.parameters()]).sum() * 0
            return AdversarialTerms(rest.new_zeros(()), idle, {})
        reconstruction_B3HW = reconstruction_B3HW.float()
        with _held_still(self.discriminator):
            generator = self.loss.generator(self._logits(reconstruction_B3HW))
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
        log = {"discriminator": loss.detach(), "logits_real": real_Bn.detach().mean()}
        log["logits_fake"] = fake_Bn.detach().mean()
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
            [gradient] = torch.autograd.grad(loss, last_layer, retain_graph=True, allow_unused=True)
            if gradient is None:
                raise UserError(
                    "AdversarialLoss: the adaptive weight compares with the other losses of the reconstruction, and "
                    "there is none; add L1Loss or L2Loss, or set adaptive: false"
                )
            norms.append((sum_over_ranks(gradient.float()) / world_size()).norm())
        return (norms[0] / (norms[1] + SMALL)).clamp(max=self.max_adaptive)


@contextlib.contextmanager
def _held_still(module: nn.Module) -> Iterator[None]:
    """Gradients pass through the module but not to its parameters."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _check_time(name: str, value: int | float) -> None:
    if value < 0 or (isinstance(value, float) and value > 1):
        raise UserError(
            f"AdversarialLoss: {name} {value}: give a number of steps (a whole number) or a share of the run in [0, 1]"
        )


def _steps(name: str, value: int | float, total_steps: float) -> int:
    if isinstance(value, int):
        return value
    if math.isinf(total_steps):
        raise UserError(
            f"AdversarialLoss: {name} {value} is a share of the run, but the run has no end; "
            "set trainer.max_steps or give a number of steps"
        )
    return round(value * total_steps)
