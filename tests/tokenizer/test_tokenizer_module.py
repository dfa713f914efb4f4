"""Fitting the tokenizer with Lightning on smooth random images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer import L1Loss, L2Loss, LossPart, MultiScaleTokenizer, QuantizerLoss, fingerprint
from mvar_lightning.tokenizer.autoencoder import GroupNorm
from mvar_lightning.tokenizer.losses import WeightedLoss
from mvar_lightning.tokenizer.tokenizer import TokenizerOutput
from mvar_lightning.training.optimizers import HalfCosine
from mvar_lightning.training.tokenizer import TokenizerModule


def module(**changes: Any) -> TokenizerModule:
    L.seed_everything(0, verbose=False)
    sizes: dict[str, Any] = {
        "scales": [1, 2, 4],
        "vocab_size": 32,
        "code_dim": 8,
        "channels": 8,
        "channel_multipliers": [1, 2],
        "num_res_blocks": 1,
        "norm_groups": 4,
        "lr": 5e-3,
    }
    return TokenizerModule(**{**sizes, **changes})


def loader(count: int = 64) -> DataLoader[dict[str, Tensor]]:
    coarse = torch.rand(count, 1, 2, 2, generator=torch.Generator().manual_seed(1)).expand(-1, 3, -1, -1) * 2 - 1
    smooth = F.interpolate(coarse, size=(8, 8), mode="bilinear")
    return DataLoader([{"image": image} for image in smooth], batch_size=16)


def trainer(tmp_path: Path, **changes: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "default_root_dir": tmp_path,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**{**quiet, **changes})


def test_fit_raises_psnr_and_logs_every_scale(tmp_path: Path) -> None:
    fitted, batches = module(), loader()
    [before] = trainer(tmp_path).validate(fitted, batches, verbose=False)
    run = trainer(tmp_path, max_steps=24, limit_val_batches=4)
    run.fit(fitted, batches, batches)
    after = run.callback_metrics
    assert after["val/psnr"] > before["val/psnr"] + 3
    assert after["val/ssim"] > before["val/ssim"]
    assert {"train/loss", "train/l1", "train/l2", "train/quantizer", "val/loss"} <= set(after)
    for scale in range(3):
        assert 0 < after[f"codebook/usage_scale_{scale}"] <= 1
        assert 1 <= after[f"codebook/perplexity_scale_{scale}"] <= 32


def test_checkpoint_rebuilds_the_tokenizer_without_pickled_objects(tmp_path: Path) -> None:
    fitted = module()
    run = trainer(tmp_path, max_steps=1)
    run.fit(fitted, loader(16))
    run.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    entry = checkpoint["mvar_lightning"]
    assert (entry["format"], entry["kind"]) == (1, "tokenizer")
    tokenizer = MultiScaleTokenizer(**entry["tokenizer"])
    prefix = "tokenizer."
    state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    tokenizer.load_state_dict(state)
    assert fingerprint(tokenizer) == entry["tokenizer_hash"] == fingerprint(fitted.tokenizer)


class BrokenLoss(LossPart):
    name = "broken"

    def forward(self, output: TokenizerOutput, image_B3HW: Tensor) -> Tensor:
        return output.quantizer_loss * torch.nan


def test_non_finite_loss_names_the_term_and_the_step(tmp_path: Path) -> None:
    broken = module(losses=[L1Loss(), BrokenLoss()])
    with pytest.raises(UserError, match="'broken' is nan at step 0"):
        trainer(tmp_path, max_steps=1).fit(broken, loader(16))


def test_weights_scale_the_terms() -> None:
    tokenizer = module().tokenizer
    image = torch.rand(2, 3, 8, 8)
    output = tokenizer(image)
    total, terms = WeightedLoss([L1Loss(0.5), L2Loss(2.0), QuantizerLoss(0.0)])(output, image)
    difference = output.reconstruction_B3HW - image
    torch.testing.assert_close(terms["l1"], difference.abs().mean())
    torch.testing.assert_close(terms["l2"], difference.square().mean())
    torch.testing.assert_close(total, 0.5 * terms["l1"] + 2 * terms["l2"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": []}, "empty"),
        ({"losses": [L1Loss(), L1Loss()]}, "twice"),
        ({"lr": 0.0}, "lr 0"),
        ({"warmup": 1.0}, "warmup 1"),
    ],
)
def test_bad_choices_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        module(**change)


@pytest.mark.parametrize("part", [L1Loss(), L2Loss()])
def test_terms_are_float32_of_bfloat16_images(part: LossPart) -> None:
    tokenizer = module().tokenizer
    output = tokenizer(torch.rand(2, 3, 8, 8))
    image, reconstruction = torch.rand(2, 3, 8, 8).bfloat16(), output.reconstruction_B3HW.bfloat16()
    expected = part(output._replace(reconstruction_B3HW=reconstruction.float()), image.float())
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = part(output._replace(reconstruction_B3HW=reconstruction), image)
        assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_group_norm_is_float32_under_autocast() -> None:
    norm, x = GroupNorm(2, 8), torch.randn(3, 8, 5, 5).bfloat16()
    expected = torch.nn.functional.group_norm(x.float(), 2, norm.weight, norm.bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x), expected)


def test_negative_weight_is_refused() -> None:
    with pytest.raises(UserError, match="-1"):
        L2Loss(-1)


def test_schedule_at_given_steps() -> None:
    curve = [HalfCosine(110, 10, 0.1).factor(step) for step in (0, 9, 10, 60, 110, 500)]
    assert curve == pytest.approx([0.1, 1.0, 1.0, 0.55, 0.1, 0.1])
    assert HalfCosine(float("inf"), 0, 0.1).factor(1000) == 1.0


def test_norms_biases_and_codes_do_not_decay(tmp_path: Path) -> None:
    fitted = module(weight_decay=0.1)
    run = trainer(tmp_path, max_steps=1)
    run.fit(fitted, loader(16))
    decayed, rest = run.optimizers[0].param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decayed["params"]} == {4}
    assert any(p is fitted.tokenizer.quantizer.codebook.weight for p in rest["params"])
