"""Training with networks that are used but not trained: perceptual loss and frozen-feature discriminator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from small_run import TOKENIZER_SIZES, copy_of, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mvar_lightning import (
    AdversarialLoss,
    FrozenFeatureDiscriminator,
    L1Loss,
    PerceptualLoss,
    QuantizerLoss,
    TokenizerModule,
    UserError,
)
from mvar_lightning.callbacks import EMA
from mvar_lightning.tokenizer import LPIPS
from mvar_lightning.tokenizer.perceptual import Frozen


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Random weights of VGG16, and a scripted network."""
    folder, state = tmp_path_factory.mktemp("networks"), {}
    places = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256)}
    places |= {17: (256, 512), **dict.fromkeys((19, 21, 24, 26, 28), (512, 512))}
    for place, (taken, given) in places.items():
        state[f"{place}.weight"], state[f"{place}.bias"] = torch.randn(given, taken, 3, 3) * 0.03, torch.zeros(given)
    torch.save(state, folder / "vgg.pth")
    torch.jit.save(torch.jit.script(Patches()), str(folder / "patches.pt"))
    return str(folder / "vgg.pth"), str(folder / "patches.pt")


def module(vgg: str, network: str) -> TokenizerModule:
    L.seed_everything(0, verbose=False)
    discriminator = FrozenFeatureDiscriminator(network, [8], size=None, kernel=3)
    losses = [L1Loss(), PerceptualLoss(vgg, weight=0.5), QuantizerLoss()]
    return TokenizerModule(**TOKENIZER_SIZES, losses=losses, adversarial=AdversarialLoss(discriminator, start=1))


def loader() -> DataLoader[Any]:
    images = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return DataLoader([{"image": image} for image in images], batch_size=4)


def test_a_fit_uses_both_and_keeps_neither(files: tuple[str, str], tmp_path: Path) -> None:
    """Validation comes first: what it loads must serve training too."""
    fitted = module(*files)
    before = copy_of(fitted)
    run = trainer(tmp_path, EMA(0.5), max_epochs=1, num_sanity_val_steps=1, precision="bf16-mixed")
    run.fit(fitted, loader(), loader())
    assert {"train/lpips", "train/adversarial", "train/discriminator"} <= set(run.callback_metrics)
    changed = {name for name, value in copy_of(fitted).items() if not torch.equal(value, before[name])}
    assert any("heads" in name for name in changed) and any("decoder" in name for name in changed)
    run.save_checkpoint(tmp_path / "a.ckpt")
    names = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"].keys()
    assert names == before.keys() and not any("vgg" in name or "network" in name for name in names)
    assert (tmp_path / "a.ckpt").stat().st_size < 10e6 < Path(files[0]).stat().st_size


@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_file_is_told_before_the_first_batch(missing: int, files: tuple[str, str], tmp_path: Path) -> None:
    paths = list(files)
    paths[missing] = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere: no such file"):
        trainer(tmp_path, max_steps=1).fit(module(*paths), loader())


@pytest.mark.parametrize("inference", [False, True])
def test_a_frozen_network_is_loaded_once_and_passes_gradients(inference: bool, files: tuple[str, str]) -> None:
    calls: list[int] = []

    def load() -> nn.Module:
        calls.append(1)
        return nn.Linear(2, 2)

    make: Callable[[], nn.Module] = load
    frozen = Frozen(make)
    assert not calls
    with torch.inference_mode(inference):
        network = frozen.on(torch.device("cpu"))
    x = torch.ones(1, 2, requires_grad=True)
    frozen.on(torch.device("cpu"))(x).sum().backward()
    assert x.grad is not None and x.grad.any() and calls == [1]
    assert not network.training and not any(p.requires_grad or p.is_inference() for p in network.parameters())


def test_lpips_is_vgg16_and_a_weight_for_each_channel(files: tuple[str, str]) -> None:
    network = LPIPS(files[0])
    assert sum(p.numel() for p in network.parameters()) == 14_714_688 + 1472
