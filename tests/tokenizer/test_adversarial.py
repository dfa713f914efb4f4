"""Adversarial losses against formulas written out: both sides, penalty, LeCam, adaptive weight, start and ramp."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer import AdversarialLoss, DiffAugment, Discriminator, GANLoss, HingeLoss, NonSaturatingLoss
from mvar_lightning.tokenizer.adversarial import LeCam
from mvar_lightning.tokenizer.discriminator import change_color, cut_out, translate


class LinearDiscriminator(Discriminator):
    """Two logits, linear in the pixels: the gradient in an image is its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 2)
        self.steps = 0

    def forward(self, image_B3HW: Tensor) -> Tensor:
        return self.linear(image_B3HW.flatten(1))

    def after_step(self) -> None:
        self.steps += 1


class Setting:
    """A decoder of one layer, a batch, and the losses."""

    def __init__(self, **changes: Any) -> None:
        torch.manual_seed(0)
        self.last_layer = nn.Conv2d(3, 3, 1)
        self.image, before = torch.rand(2, 4, 3, 8, 8) * 2 - 1
        self.fake = self.last_layer(before)
        self.rest = (self.fake - self.image).abs().mean() * 3
        self.network = LinearDiscriminator()
        self.loss = AdversarialLoss(self.network, **{"start": 0, "adaptive": False, "weight": 0.5, **changes})
        self.loss.plan(100)

    def __call__(self, step: int = 0) -> Any:
        return self.loss(self.fake, self.image, self.rest, self.last_layer.weight, step)


def test_hinge_and_cross_entropy_on_given_logits() -> None:
    real, fake = torch.tensor([[2.0, 0.5]]), torch.tensor([[-3.0, 0.5]])
    assert HingeLoss().discriminator(real, fake) == pytest.approx(0.5 * (0.5 / 2 + 1.5 / 2))
    assert HingeLoss().generator(fake) == pytest.approx(1.25)
    two = (
        F.binary_cross_entropy_with_logits(real, torch.ones(1, 2)),
        F.binary_cross_entropy_with_logits(fake, torch.zeros(1, 2)),
    )
    torch.testing.assert_close(NonSaturatingLoss().discriminator(real, fake), (two[0] + two[1]) / 2)
    expected = F.binary_cross_entropy_with_logits(fake, torch.ones(1, 2))
    torch.testing.assert_close(NonSaturatingLoss().generator(fake), expected)


def test_each_side_pays_for_itself_in_one_backward_pass() -> None:
    setting = Setting()
    terms = setting()
    torch.testing.assert_close(terms.generator, -0.5 * setting.network(setting.fake).mean())
    expected = HingeLoss().discriminator(setting.network(setting.image), setting.network(setting.fake.detach()))
    torch.testing.assert_close(terms.discriminator, expected)
    [theirs] = torch.autograd.grad(expected, setting.network.linear.weight, retain_graph=True)
    wanted = -0.5 * setting.network(setting.fake).mean()
    [ours] = torch.autograd.grad(wanted, setting.last_layer.weight, retain_graph=True)
    (terms.generator + terms.discriminator).backward()
    torch.testing.assert_close(setting.network.linear.weight.grad, theirs)
    torch.testing.assert_close(setting.last_layer.weight.grad, ours)
    assert set(terms.log) == {"adversarial", "adversarial_weight", "discriminator", "logits_real", "logits_fake"}


@pytest.mark.parametrize("step", [0, 1, 4])
def test_gradient_penalty_counts_for_the_steps_in_between(step: int) -> None:
    plain, paying = Setting(), Setting(loss=HingeLoss(gradient_penalty=3.0, penalty_every=4))
    squared = plain.network.linear.weight.mean(0).square().sum()
    expected = 3.0 / 2 * squared * 4 if step % 4 == 0 else torch.zeros(())
    torch.testing.assert_close(paying(step).discriminator - plain(step).discriminator, expected, atol=1e-6, rtol=1e-4)
    assert ("gradient_penalty" in paying(step).log) == (step % 4 == 0)
    if step % 4 == 0:
        parameter = paying.network.linear.weight
        [gradient] = torch.autograd.grad(paying.loss.loss.penalty(paying.network, paying.image), parameter)
        torch.testing.assert_close(gradient, (12 * parameter.detach().mean(0) / 2).expand(2, -1))


def test_only_the_loss_that_wants_it_has_a_penalty() -> None:
    assert NonSaturatingLoss().penalty_due(0) and not NonSaturatingLoss().penalty_due(1)
    assert not HingeLoss().penalty_due(0)
    made = GANLoss.from_config(NonSaturatingLoss(2.0, 8).config())
    assert made == NonSaturatingLoss(2.0, 8) and made != HingeLoss(2.0, 8)


class Brightness(Discriminator):
    """Elementwise, so that it computes in whatever precision its images have."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, image_B3HW: Tensor) -> Tensor:
        return (image_B3HW * self.scale).sin().flatten(1)


@pytest.mark.parametrize("augment", [None, DiffAugment()])
def test_under_autocast_images_are_judged_in_float32(augment: DiffAugment | None) -> None:
    """A decoder under autocast gives bfloat16."""
    image, fake = torch.rand(2, 4, 3, 8, 8).bfloat16()
    loss, found = AdversarialLoss(Brightness(), start=0, adaptive=False, augment=augment), []
    for cast, autocast in ((Tensor.float, False), (Tensor.bfloat16, True)):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(loss(cast(fake), cast(image), fake.float().mean(), torch.ones(1), 0))
    assert torch.equal(found[0].generator, found[1].generator)
    assert torch.equal(found[0].discriminator, found[1].discriminator)


def test_under_autocast_the_penalty_is_that_of_float32() -> None:
    network, image = LinearDiscriminator(), torch.rand(4, 3, 8, 8)
    expected = HingeLoss(1.0, 1).penalty(network, image.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(HingeLoss(1.0, 1).penalty(network, image.bfloat16()), expected)


def test_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    plain, setting = Setting(), Setting(adaptive=True)
    [rest] = torch.autograd.grad(plain.rest, plain.last_layer.weight, retain_graph=True)
    [other] = torch.autograd.grad(-plain.network(plain.fake).mean(), plain.last_layer.weight, retain_graph=True)
    factor = rest.norm() / (other.norm() + 1e-4)
    terms = setting()
    torch.testing.assert_close(terms.log["adversarial_weight"], 0.5 * factor)
    torch.testing.assert_close(terms.generator, plain().generator * factor)
    clamped = Setting(adaptive=True, max_adaptive=float(factor) / 2)
    torch.testing.assert_close(clamped().log["adversarial_weight"], 0.25 * factor)


def test_adaptive_weight_needs_another_loss_of_the_reconstruction() -> None:
    setting = Setting(adaptive=True)
    setting.rest = torch.ones(1, requires_grad=True).sum()
    with pytest.raises(UserError, match=r"compares with the other losses .* set adaptive: false"):
        setting()


def test_before_the_start_there_is_a_gradient_of_zero() -> None:
    setting = Setting(start=10)
    terms = setting(9)
    assert terms.generator == 0 and not terms.log
    (setting.rest + terms.generator + terms.discriminator).backward()
    assert setting.network.linear.weight.grad is not None and not setting.network.linear.weight.grad.any()
    assert setting(10).log


@pytest.mark.parametrize(
    ("times", "step", "strength"),
    [
        ({"start": 0.25}, 25, 0.5),
        ({"start": 10, "ramp": 4}, 10, 0.125),
        ({"start": 10, "ramp": 4}, 13, 0.5),
        ({"start": 0.1, "ramp": 0.2}, 19, 0.25),
        ({"start": 0.1, "ramp": 0.2}, 99, 0.5),
    ],
)
def test_start_and_ramp_in_steps_or_shares(times: dict[str, Any], step: int, strength: float) -> None:
    loss = Setting(**times).loss
    assert loss.active(step) and not loss.active(loss.start_step - 1)
    assert loss.strength(step) == pytest.approx(strength)


def test_lecam_by_hand() -> None:
    lecam = LeCam(weight=1.0, decay=0.9)
    real, fake = torch.tensor([[1.0, 3.0]]), torch.tensor([[-1.0, 0.0]])
    assert lecam(real, fake) == 0, "no means yet"
    lecam(real + 2, fake)  # the second batch of the same step
    lecam.after_step()
    torch.testing.assert_close(lecam.means_2, torch.tensor([3.0, -0.5]))
    expected = ((1.5**2 + 3.5**2) + (4.0**2 + 3.0**2)) / 2
    assert lecam(real, fake) == pytest.approx(expected)
    lecam.after_step()
    torch.testing.assert_close(lecam.means_2, torch.tensor([0.9 * 3 + 0.1 * 2, -0.5]))
    before = lecam.means_2.clone()
    lecam.after_step()
    assert torch.equal(lecam.means_2, before), "a step without logits changes nothing"
    assert set(lecam.state_dict()) == {"means_2", "updates"}


def test_lecam_joins_the_discriminators_loss_and_follows_its_steps() -> None:
    setting, plain = Setting(lecam=0.1), Setting()
    setting()
    setting.loss.after_step()
    assert setting.network.steps == 1 and setting.loss.lecam.updates == 1
    terms = setting()
    added = terms.discriminator - plain().discriminator
    torch.testing.assert_close(added, 0.1 * terms.log["lecam"])
    assert terms.log["lecam"] > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight": -1.0}, "weight -1"),
        ({"lr": 0.0}, "lr 0"),
        ({"max_adaptive": 0.0}, "max_adaptive 0"),
        ({"start": -1}, "start -1"),
        ({"start": 1.5}, "start 1.5: give a number of steps"),
        ({"ramp": 2.0}, "ramp 2"),
        ({"lecam": -0.1}, "lecam -0.1"),
        ({"lecam_decay": 1.0}, "lecam_decay 1"),
        ({"loss": lambda: HingeLoss(-1.0)}, "gradient_penalty -1"),
        ({"loss": lambda: HingeLoss(penalty_every=0)}, "penalty_every 0"),
        ({"augment": lambda: DiffAugment(cutout=1.0)}, "cutout 1"),
        ({"augment": lambda: DiffAugment(translation=-0.5)}, "translation -0.5"),
    ],
)
def test_bad_choices_are_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Setting(**{name: value() if callable(value) else value for name, value in change.items()})


def test_a_share_of_a_run_without_end_is_refused() -> None:
    loss = Setting(start=0.5).loss
    with pytest.raises(UserError, match="the run has no end"):
        loss.plan(math.inf)
    Setting(start=5).loss.plan(math.inf)


# -- DiffAugment


def pictures(batch: int = 64, side: int = 16) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_augmentation_draws_from_the_global_generator_and_passes_gradients() -> None:
    image = pictures(4).requires_grad_()
    torch.manual_seed(1)
    first = DiffAugment()(image)
    torch.manual_seed(1)
    assert torch.equal(DiffAugment()(image), first) and not torch.equal(DiffAugment()(image), first)
    first.sum().backward()
    assert image.grad is not None and image.grad.any() and first.shape == image.shape
    assert torch.equal(DiffAugment(color=False, translation=0, cutout=0)(image), image)


def test_color_keeps_structure() -> None:
    torch.manual_seed(0)
    image = pictures()
    changed = change_color(image)
    # saturation and contrast scale the difference of two channels, brightness moves all alike
    ratio = (changed[:, 0] - changed[:, 1]) / (image[:, 0] - image[:, 1])
    factors = ratio.flatten(1).median(dim=1).values
    torch.testing.assert_close(ratio.flatten(1).quantile(0.2, dim=1), factors, rtol=1e-2, atol=1e-2)
    assert factors.min() >= 0 and factors.max() <= 3.01 and factors.std() > 0.2
    moved = (changed - image).mean((1, 2, 3))
    assert moved.abs().max() <= 0.5 and moved.std() > 0.2


def test_translation_is_a_shift_filled_with_gray() -> None:
    torch.manual_seed(0)
    image, shifts = pictures(), set()
    for ours, theirs in zip(translate(image, 0.125), image, strict=True):
        padded = F.pad(theirs, (2, 2, 2, 2))
        places = [(y, x) for y in range(5) for x in range(5) if torch.equal(padded[:, y : y + 16, x : x + 16], ours)]
        assert len(places) == 1
        shifts |= set(places)
    assert len(shifts) > 15


def test_cutout_is_a_square_of_gray() -> None:
    torch.manual_seed(0)
    image = torch.ones(64, 3, 16, 16)
    gone = (cut_out(image, 0.5) == 0).all(1)
    heights, widths = gone.any(2).sum(1), gone.any(1).sum(1)
    assert torch.equal(gone.sum((1, 2)), heights * widths), "a rectangle"
    assert heights.max() == widths.max() == 8 and heights.min() >= 4
    assert len({tuple(row.tolist()) for row in gone.any(2)}) > 8
