"""Discriminators: what they see, what they refuse, and that an image's logits are its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer import (
    AdversarialLoss,
    Discriminator,
    FrozenFeatureDiscriminator,
    NonSaturatingLoss,
    PatchDiscriminator,
)
from mvar_lightning.tokenizer.discriminator import change_color

CPU = torch.device("cpu")


def images(batch: int = 3, side: int = 32) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


class TwoLevels(nn.Module):
    """Stands for DINO: tokens of one layer, a map of another."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.wide = nn.Conv2d(8, 16, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patches(x).relu()
        return x.flatten(2).transpose(1, 2), self.wide(x)


class Attention(nn.Module):
    """A transformer layer's heart, as DINO calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.patches(x).flatten(2).transpose(1, 2)).unsqueeze(1).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v).squeeze(1)


class OneNumber(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2, 3))


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("network") / "two_levels.pt"
    torch.jit.save(torch.jit.script(TwoLevels()), str(file))
    return str(file)


@pytest.fixture(params=["patches", "frozen features"])
def discriminator(request: pytest.FixtureRequest, network: str) -> Discriminator:
    torch.manual_seed(0)
    if request.param == "patches":
        return PatchDiscriminator(8, layers=2, norm_groups=4)
    return FrozenFeatureDiscriminator(network, [8, 16], size=16)


def test_logits_of_an_image_do_not_depend_on_its_company(discriminator: Discriminator) -> None:
    discriminator.prepare(CPU, 32)
    discriminator.train()
    logits = discriminator(images())
    assert logits.shape[0] == 3 and logits.ndim == 2 and logits.dtype == torch.float32
    torch.testing.assert_close(discriminator(images()[1:2]), logits[1:2], atol=1e-5, rtol=1e-5)
    assert torch.equal(discriminator(images()), logits), "a forward must not change its state"


def test_every_parameter_and_the_image_have_a_gradient(discriminator: Discriminator) -> None:
    image = images().requires_grad_()
    discriminator(image).square().sum().backward()
    assert image.grad is not None and image.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


def test_a_constant_image_is_no_trouble(discriminator: Discriminator) -> None:
    image = torch.full((2, 3, 32, 32), -1.0, requires_grad=True)
    discriminator(image).sum().backward()
    assert image.grad is not None and image.grad.isfinite().all()


def test_under_autocast_logits_stay_float32(discriminator: Discriminator) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = discriminator(images())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, discriminator(images()), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(("layers", "sees"), [(1, 16), (2, 34), (3, 70)])
def test_receptive_field_of_a_patch(layers: int, sees: int) -> None:
    patches = PatchDiscriminator(2, layers=layers, norm_groups=0)
    image = torch.randn(1, 3, 96, 96, requires_grad=True)
    logits = patches(image)
    logits[0, logits.shape[1] // 2 + round(logits.shape[1] ** 0.5) // 2].backward()
    assert image.grad is not None
    rows = image.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert rows.max() - rows.min() + 1 == sees


def test_widths_double_up_to_eightfold() -> None:
    convolutions = [m for m in PatchDiscriminator(4, layers=5).modules() if isinstance(m, nn.Conv2d)]
    assert [conv.out_channels for conv in convolutions] == [4, 8, 16, 32, 32, 32, 1]
    assert [conv.stride[0] for conv in convolutions] == [2, 2, 2, 2, 2, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"channels": 0}, "at least 1 channel"),
        ({"layers": 0}, "at least 1 channel and 1 layer"),
        ({"channels": 6}, "norm_groups 8 does not divide the 12 channels"),
    ],
)
def test_patch_sizes_that_do_not_fit(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        PatchDiscriminator(**arguments)


def test_images_too_small_for_the_layers() -> None:
    PatchDiscriminator(8, layers=2).prepare(CPU, 12)
    with pytest.raises(UserError, match="images of 16 pixels are too small, it needs 24"):
        PatchDiscriminator(8, layers=3).prepare(CPU, 16)
    assert PatchDiscriminator(8, layers=2)(images(1, 12)).shape == (1, 1)


def test_spectral_norms_move_with_steps_only(network: str) -> None:
    torch.manual_seed(0)
    frozen = FrozenFeatureDiscriminator(network, [8, 16], size=16)
    for _ in range(20):
        frozen.after_step()
    conv = next(module for module in frozen.modules() if isinstance(module, nn.Conv1d))
    assert float(torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2)) == pytest.approx(1.0, abs=1e-3)
    with torch.no_grad():
        conv.parametrizations.weight.original.mul_(3).add_(torch.randn(conv.weight.shape))  # type: ignore[union-attr]
    state = {name: value.clone() for name, value in frozen.state_dict().items()}
    frozen.train()
    frozen(images())
    assert all(torch.equal(state[name], value) for name, value in frozen.state_dict().items())
    frozen.after_step()
    assert any(not torch.equal(state[name], value) for name, value in frozen.state_dict().items())


def test_the_frozen_network_is_in_no_state_dict_and_resized_to(network: str) -> None:
    frozen = FrozenFeatureDiscriminator(network, [8, 16], size=16)
    assert not any("network" in name for name in frozen.state_dict())
    # 16 / 4 = 4 a side, so 16 positions a level
    assert frozen(images()).shape == (3, 32)
    assert FrozenFeatureDiscriminator(network, [8, 16], size=None)(images()).shape == (3, 128)


def test_normalization_is_the_networks(network: str) -> None:
    frozen = FrozenFeatureDiscriminator(network, [8, 16], size=None, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    plain = torch.jit.load(network)
    tokens, maps = plain(images())  # (x + 1) / 2 to [0, 1], then back by mean and std
    expected = torch.cat([frozen.heads[0](tokens.transpose(1, 2)), frozen.heads[1](maps.flatten(2))], dim=1)
    torch.testing.assert_close(frozen(images()), expected, atol=1e-5, rtol=1e-5)


def test_gray_and_transparent_images_of_any_shape(network: str) -> None:
    """The frozen network is given RGB; patches see all channels; color leaves alpha alone."""
    frozen, gray = FrozenFeatureDiscriminator(network, [8, 16], size=None), images()[:, :1, :16]
    frozen.prepare(CPU, (16, 32))
    torch.testing.assert_close(frozen(gray), frozen(gray.expand(-1, 3, -1, -1)))
    patches = PatchDiscriminator(8, layers=2)
    patches.take_channels(4)
    transparent = torch.cat([images(), images()[:, :1]], dim=1)[:, :, :12]
    patches.prepare(CPU, (12, 32))
    logits = patches(transparent)
    assert not torch.equal(logits, patches(torch.cat([transparent[:, :3], -transparent[:, 3:]], dim=1)))
    with pytest.raises(UserError, match="images of 8x32 pixels are too small"):
        patches.prepare(CPU, (8, 32))
    colored = change_color(transparent)
    assert torch.equal(colored[:, 3], transparent[:, 3]) and not torch.equal(colored[:, :3], transparent[:, :3])


def test_builds_on_the_meta_device_without_its_file() -> None:
    with torch.device("meta"):
        frozen = FrozenFeatureDiscriminator("nowhere.pt", [32] * 2)
        patches = PatchDiscriminator(16)
    assert {p.device.type for p in [*frozen.parameters(), *patches.parameters()]} == {"meta"}


def test_gradient_penalty_of_frozen_features(discriminator: Discriminator) -> None:
    """Against the definition by differences: half the squared slope of the mean logit, along its own gradient."""
    discriminator.prepare(CPU, 32)
    image = images(1).requires_grad_()
    [slope] = torch.autograd.grad(discriminator(image).mean(), image)
    direction = slope / slope.norm()
    with torch.no_grad():
        rise = discriminator(image + 0.01 * direction).mean() - discriminator(image - 0.01 * direction).mean()
    penalty = NonSaturatingLoss(2.0, penalty_every=1).penalty(discriminator, image)
    torch.testing.assert_close(penalty, (rise / 0.02) ** 2, rtol=0.02, atol=0)
    penalty.backward()
    trained = [parameter for parameter in discriminator.parameters() if parameter.ndim > 1]
    assert trained and all(parameter.grad is not None and parameter.grad.any() for parameter in trained)


def test_gradient_penalty_passes_through_attention(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(Attention()), str(tmp_path / "attention.pt"))
    discriminator = FrozenFeatureDiscriminator(str(tmp_path / "attention.pt"), [8], size=16)
    last_layer, image = nn.Conv2d(3, 3, 1), images(2, 16)
    loss = AdversarialLoss(discriminator, NonSaturatingLoss(), start=0, adaptive=False)
    terms = loss(last_layer(image), image, last_layer(image).mean(), last_layer.weight, 0)
    (terms.generator + terms.discriminator).backward()
    assert terms.log["gradient_penalty"] > 0
    assert all(parameter.grad.isfinite().all() for parameter in discriminator.parameters())


def test_frozen_features_are_float32_under_autocast(network: str) -> None:
    """Heads aside: they compute in what autocast says."""

    class Mean(nn.Module):
        def forward(self, x_BCN: Tensor) -> Tensor:
            return x_BCN.mean(1)

    discriminator = FrozenFeatureDiscriminator(network, [8, 16], size=16)
    discriminator.heads = nn.ModuleList([Mean(), Mean()])
    image = images().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = discriminator(image)
    assert torch.equal(found, discriminator(image.float()))


def test_networks_that_are_refused(network: str, tmp_path: Path) -> None:
    def refused(file: str, said: str, channels: list[int]) -> None:
        with pytest.raises(UserError, match=said) as error:
            FrozenFeatureDiscriminator(file, channels, size=16).prepare(CPU, 16)
        assert file in str(error.value)

    refused(str(tmp_path / "missing.pt"), "no such file", [8])
    (tmp_path / "text.pt").write_text("no network")
    refused(str(tmp_path / "text.pt"), "not a TorchScript file", [8])
    refused(network, r"gives levels of widths \[8, 16\] .* channels says \[8\]", [8])
    torch.jit.save(torch.jit.script(OneNumber()), str(tmp_path / "number.pt"))
    refused(str(tmp_path / "number.pt"), r"gives \[\(1,\)\]; it must give", [8])
    for change in ({"channels": []}, {"channels": [9]}, {"kernel": 2}):
        with pytest.raises(UserError, match="an odd kernel"):
            FrozenFeatureDiscriminator(network, **{"channels": [8, 16], **change})  # type: ignore[arg-type]
