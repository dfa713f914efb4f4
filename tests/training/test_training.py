"""A fit of a next-scale module on real digits: its numbers, what it leaves alone, and what it refuses."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from small_run import BATCH, MODEL_SIZES, TRAIN, Record, copy_of, data_module, trainer
from torch import Tensor

from mvar_lightning import FullAttention, MVARModule, SpatialAttention, UserError, VARModule, load
from mvar_lightning.callbacks import EMA
from mvar_lightning.tokenizer import fingerprint

EPOCH = TRAIN // BATCH

# torch 2.13 on an x86 CPU with one thread; other machines and versions stay within the tolerance
TEN_LOSSES = (
    3.466941,
    3.371476,
    3.283003,
    3.177975,
    3.088907,
    3.020384,
    2.936698,
    2.874983,
    2.833752,
    2.783765,
)


def module(tokenizer: Path, **changes: Any) -> VARModule:
    L.seed_everything(0, verbose=False)
    return VARModule(str(tokenizer), **{**MODEL_SIZES, "base_lr": 0.05, **changes})


class Steps(L.Callback):
    """What each optimizer step worked with."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.norms: list[float] = []
        self.modes: set[tuple[bool, bool]] = set()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.optimizers[0].register_step_post_hook(self._after)

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.modes.add((pl_module.model.training, pl_module.tokenizer.training))


def test_ten_step_loss_is_the_recorded_one(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    record = Record()
    fitted = module(tokenizer, drop_path=0.1, label_drop=0.2)
    trainer(tmp_path, record, max_steps=10, max_epochs=-1).fit(fitted, datamodule=data_module(shards))
    assert list(record.train.values()) == pytest.approx(TEN_LOSSES, abs=1e-4)
    assert list(record.train) == [(0, n) for n in range(EPOCH)] + [(1, n) for n in range(10 - EPOCH)]


def test_the_tokenizer_stays_frozen_and_in_eval_mode(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    fitted, steps = module(tokenizer), Steps()
    before, start = copy_of(fitted.tokenizer), copy_of(fitted.model)
    fitted.train()
    assert fitted.model.training and not any(part.training for part in fitted.tokenizer.modules())
    trainer(tmp_path, steps, EMA(0.9), max_steps=2).fit(fitted, datamodule=data_module(shards))
    assert steps.modes == {(True, False)}
    after = copy_of(fitted.tokenizer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert fingerprint(fitted.tokenizer) == fitted.tokenizer_hash
    assert any(not torch.equal(start[name], value) for name, value in fitted.model.state_dict().items())


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 6), (2, 3), (4, 2)])
def test_accumulation_counts_steps_and_scales_the_learning_rate(
    accumulate: int, steps: int, shards: Path, tokenizer: Path, tmp_path: Path
) -> None:
    seen = Steps()
    run = trainer(tmp_path, seen, max_epochs=1, accumulate_grad_batches=accumulate, limit_val_batches=0)
    run.fit(module(tokenizer, warmup=0.0), datamodule=data_module(shards))
    assert run.global_step == steps == len(seen.rates)
    assert seen.rates[0] == pytest.approx(0.05 * BATCH * accumulate / 256)


def test_two_small_batches_accumulate_to_one_large(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    weights = []
    for size, accumulate in ((16, 1), (8, 2)):
        fitted = module(tokenizer, drop_path=0.0, label_drop=0.0)
        run = trainer(tmp_path, max_steps=2, accumulate_grad_batches=accumulate, limit_val_batches=0)
        run.fit(fitted, datamodule=data_module(shards, batch_size=size, resize_ratio=1.0))
        weights.append(copy_of(fitted.model))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_before_the_step(precision: str, shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    free, clipped = Steps(), Steps()
    for steps, value in ((free, None), (clipped, 0.05)):
        settings = {"gradient_clip_val": value, "precision": precision, "limit_val_batches": 0}
        run = trainer(tmp_path, steps, max_steps=2, **settings)
        run.fit(module(tokenizer), datamodule=data_module(shards))
    assert min(free.norms) > 0.1
    assert clipped.norms == pytest.approx([0.05, 0.05], rel=1e-3)


def test_bf16_computes_tokens_in_float32(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    tokens: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for precision in ("32-true", "bf16-mixed"):
        fitted, record = module(tokenizer), Record()
        made = tokens.setdefault(precision, [])
        plain = fitted.tokens

        def watched(image: Tensor, plain: Any = plain, made: Any = made) -> tuple[Tensor, Tensor]:
            made.append(plain(image))
            return made[-1]

        fitted.tokens = watched  # type: ignore[method-assign]
        run = trainer(tmp_path, record, max_steps=1, precision=precision, limit_val_batches=0)
        run.fit(fitted, datamodule=data_module(shards))
        assert all(map(math.isfinite, record.train.values())) and run.global_step == 1
        assert {parameter.dtype for parameter in fitted.model.parameters()} == {torch.float32}
    for ours, theirs in zip(tokens["bf16-mixed"], tokens["32-true"], strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        assert ours[1].dtype == torch.float32


def test_a_checkpoint_holds_plain_values_and_loads_as_a_model(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    fitted = module(tokenizer, attention=SpatialAttention(3, scales=1))
    run = trainer(tmp_path, EMA(0.5), max_steps=3)
    run.fit(fitted, datamodule=data_module(shards))
    run.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["mvar_lightning"]["tokenizer_hash"] == fitted.tokenizer_hash
    model, loaded = load(tmp_path / "a.ckpt")
    assert model is not None and model.strategy == SpatialAttention(3, scales=1)
    x_BLZ, label_B = torch.randn(2, 20, 8), torch.tensor([1, 7])
    assert torch.equal(model(x_BLZ, label_B), fitted.model.eval()(x_BLZ, label_B))
    assert fingerprint(loaded) == fitted.tokenizer_hash


@pytest.mark.parametrize(
    ("settings", "data", "said"),
    [
        ({}, {"image_size": 8}, "data.image_size 8: the tokenizer makes images of 16 pixels"),
        ({"max_epochs": -1}, {}, "trainer.max_steps: -1 never ends"),
        ({}, {"batch_size": 200}, "less than one batch of 200"),
    ],
)
def test_settings_that_cannot_train_are_refused(
    settings: dict[str, Any], data: dict[str, Any], said: str, shards: Path, tokenizer: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        trainer(tmp_path, **settings).fit(module(tokenizer), datamodule=data_module(shards, **data))


def test_lists_of_batches_have_no_batch_size_to_scale_by(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    batches = [next(iter(data_module(shards).train_dataloader()))]
    with pytest.raises(UserError, match="give a datamodule or a loader that has one"):
        trainer(tmp_path).fit(module(tokenizer), batches)


def test_a_checkpoint_of_another_tokenizer_is_refused_by_both_hashes(
    shards: Path, tokenizer: Path, other_tokenizer: Path, tmp_path: Path
) -> None:
    checkpoint = saved(module(tokenizer), shards, tmp_path)
    fitted = module(other_tokenizer)
    before, theirs = copy_of(fitted), module(tokenizer).tokenizer_hash
    with pytest.raises(UserError) as error:
        trainer(tmp_path).fit(fitted, datamodule=data_module(shards), ckpt_path=checkpoint, weights_only=True)
    assert theirs[:12] in str(error.value) and fitted.tokenizer_hash[:12] in str(error.value)
    assert "\n" not in str(error.value) and "model.tokenizer" in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in fitted.state_dict().items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"depth": 3}, r"depth 2, but the run has 3"),
        ({"num_classes": 7}, r"num_classes 10, but the run has 7"),
        ({"attention": SpatialAttention(3, scales=1)}, r"attention .*FullAttention.*SpatialAttention"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused_by_its_field(
    change: dict[str, Any], said: str, shards: Path, tokenizer: Path, tmp_path: Path
) -> None:
    checkpoint = saved(module(tokenizer, attention=FullAttention()), shards, tmp_path)
    with pytest.raises(UserError, match=said):
        trainer(tmp_path).fit(
            module(tokenizer, **change), datamodule=data_module(shards), ckpt_path=checkpoint, weights_only=True
        )


def test_a_kernel_larger_than_every_map_of_the_tokenizer_is_refused(tokenizer: Path) -> None:
    with pytest.raises(UserError, match="kernel_size=7 is larger than every map"):
        MVARModule(str(tokenizer), **MODEL_SIZES)


def saved(fitted: VARModule, shards: Path, folder: Path) -> str:
    """A checkpoint of a run of one step."""
    run = trainer(folder, max_steps=1, limit_val_batches=0)
    run.fit(fitted, datamodule=data_module(shards))
    run.save_checkpoint(folder / "one.ckpt")
    return str(folder / "one.ckpt")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_blocks_take_the_same_step(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    losses, weights = [], []
    for compiled in (False, True):
        fitted, record = module(tokenizer, depth=1, compile_blocks=compiled, label_drop=0.0, drop_path=0.0), Record()
        run = trainer(tmp_path, record, max_steps=1, limit_val_batches=0)
        run.fit(fitted, datamodule=data_module(shards))
        losses.append(list(record.train.values()))
        weights.append(copy_of(fitted.model))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert weights[0].keys() == weights[1].keys()
    # the first step of Adam is the sign of the gradient: where that is almost zero it may differ
    for name, value in weights[0].items():
        assert (weights[1][name] - value).abs().mean() < 1e-5, name
