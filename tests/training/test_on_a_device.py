"""Whole ways on a device: a fit in bf16-mixed with what a recipe puts beside it, and tokens that are the CPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import DEVICES, MODEL_SIZES, TOKENIZER_SIZES, Record, data_module, trainer
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from mvar_lightning import AdversarialLoss, MarkovVARModule, PatchDiscriminator, TokenizerModule
from mvar_lightning.callbacks import (
    EMA,
    GradientNorm,
    LastCheckpoint,
    NonFiniteLossGuard,
    ReconstructionGrid,
    SampleGrid,
    SampleMetrics,
)
from mvar_lightning.checkpoints import load_tokenizer
from mvar_lightning.metrics.features import FeatureExtractor
from mvar_lightning.tools.compute import exact_float32


class Pixels(FeatureExtractor):
    """Mean colors of four quarters."""

    def __init__(self) -> None:
        super().__init__("pixels", 12)

    def extract(self, image_B3HW: Tensor) -> Tensor:
        return adaptive_avg_pool2d(image_B3HW, 2)


SHORT: dict[str, Any] = {"limit_train_batches": 2, "limit_val_batches": 1, "log_every_n_steps": 1}


def fit(module: Any, shards: Path, folder: Path, device: str, *callbacks: Any, resume: Path | None = None) -> Record:
    record, beside = Record(), (EMA(0.5), GradientNorm(), NonFiniteLossGuard(), LastCheckpoint())
    settings: dict[str, Any] = {"accelerator": device, "precision": "bf16-mixed", "enable_checkpointing": True}
    settings |= {**SHORT, "max_epochs": 2 if resume else 1}
    run = trainer(folder, record, *beside, *callbacks, **settings)
    run.fit(module, datamodule=data_module(shards), ckpt_path=resume, weights_only=True)
    return record


@pytest.mark.parametrize("device", DEVICES)
def test_a_transformer_in_bf16_with_callbacks_and_a_resume(
    device: str, shards: Path, tokenizer: Path, tmp_path: Path
) -> None:
    def callbacks() -> list[Any]:
        metrics = SampleMetrics(Pixels(), consistency=False, num_images=4, batch_size=4)
        return [SampleGrid(labels=[0, 1], rows=1), ReconstructionGrid(num_images=4), metrics]

    def module() -> MarkovVARModule:
        torch.manual_seed(0)
        settings: dict[str, Any] = {"base_lr": 0.05, "compile_blocks": device == "cuda"}
        return MarkovVARModule(str(tokenizer), **MODEL_SIZES, **settings, scale_groups=[["0..1"], [2]])

    first = fit(module(), shards, tmp_path, device, *callbacks())
    resumed = fit(
        module(), shards, tmp_path, device, *callbacks(), resume=next((tmp_path / "checkpoints").glob("last*.ckpt"))
    )
    assert list(first.train) == [(0, 0), (0, 1)] and list(resumed.train) == [(1, 0), (1, 1)]
    losses = [*first.train.values(), *resumed.train.values(), *resumed.val.values()]
    assert all(0 < loss < 4.5 for loss in losses) and losses[-2] < losses[0], losses
    assert (tmp_path / "samples.png").is_file() and (tmp_path / "reconstructions.png").is_file()


@pytest.mark.parametrize("device", DEVICES)
def test_a_tokenizer_in_bf16_with_a_discriminator(device: str, shards: Path, tmp_path: Path) -> None:
    adversarial = AdversarialLoss(PatchDiscriminator(channels=8, layers=1, norm_groups=4), start=0)
    module = TokenizerModule(**TOKENIZER_SIZES, adversarial=adversarial, accumulate_grad_batches=2)
    before = {name: tensor.clone() for name, tensor in adversarial.discriminator.state_dict().items()}
    record = fit(module, shards, tmp_path, device)
    assert all(torch.tensor(loss).isfinite() for loss in [*record.train.values(), *record.val.values()])
    assert any((tensor.cpu() != before[name]).any() for name, tensor in adversarial.discriminator.state_dict().items())


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_are_the_cpus(device: str, tokenizer: Path) -> None:
    """In exact float32 hardly one differs, and what is made of tokens is the same to rounding."""
    ours, image_B3HW = load_tokenizer(tokenizer), torch.rand(32, 3, 16, 16, generator=torch.manual_seed(0)) * 2 - 1
    with torch.no_grad():
        right_BL = ours.encode(image_B3HW)
        right = ours.teacher_input(right_BL), ours.decode(right_BL)
        ours.to(device)
        with exact_float32(torch.device(device)):
            found_BL = ours.encode(image_B3HW.to(device))
            found = ours.teacher_input(right_BL.to(device)), ours.decode(right_BL.to(device))
    assert (found_BL.cpu() != right_BL).float().mean() <= 2e-3
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-4)
