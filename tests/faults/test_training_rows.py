"""Rows of training and resume: accumulation, rates after a resume, modules without a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from small_run import BATCH, MODEL_SIZES, TOKENIZER_SIZES, data_module, plain, trainer

from mvar_lightning import AdjacentAttention, MarkovVARModule, MVARModule, SpatialAttention, TokenizerModule, VARModule
from mvar_lightning.callbacks import LastCheckpoint
from mvar_lightning.errors import UserError
from mvar_lightning.training import optimizers
from mvar_lightning.training.optimizers import HeldLine, ScheduledAdamW

SETTINGS: dict[str, Any] = {**MODEL_SIZES, "label_drop": 0.0, "drop_path": 0.0, "warmup": 0.0}


def module_of(tokenizer: Path, **changes: Any) -> VARModule:
    torch.manual_seed(0)
    return VARModule(str(tokenizer), **{**SETTINGS, "attention": AdjacentAttention(), **changes})


class Gradients(L.Callback):
    """The whole gradient of every step."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        grads = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.seen.append(torch.cat(grads).clone())


def gradients(
    tokenizer: Path, shards: Path, folder: Path, batches: int, accumulate: int, rate: float = 0.0, **changes: Any
) -> list[torch.Tensor]:
    seen = Gradients()
    run = trainer(
        folder,
        seen,
        max_epochs=1,
        limit_train_batches=batches,
        limit_val_batches=0,
        accumulate_grad_batches=accumulate,
    )
    run.fit(module_of(tokenizer, base_lr=rate, **changes), data_module(shards))
    return seen.seen


class Spoiled(L.Callback):
    """The last step's weights are no numbers: its loss was one."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        with torch.no_grad():
            for parameter in getattr(pl_module, "model", pl_module).parameters():
                parameter.fill_(torch.nan)


def test_a_validation_loss_that_is_no_number_is_told(tokenizer: Path, shards: Path, tmp_path: Path) -> None:
    """Also where no callback looks at it, and in a validation alone."""
    words = r"val/loss at step 2: not finite; a checkpoint of this step holds the same weights; lower the learning rate"
    short = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1}
    with pytest.raises(UserError, match=words):
        trainer(tmp_path, Spoiled(), **short).fit(module_of(tokenizer), data_module(shards))
    with pytest.raises(UserError, match="val/loss at step 0: not finite"):
        trainer(tmp_path, Spoiled(), **short).validate(module_of(tokenizer), data_module(shards), verbose=False)
    of_tokenizer = TokenizerModule(**TOKENIZER_SIZES, **plain())
    with pytest.raises(UserError, match=r"loss term .* is nan at step 2; a checkpoint of this step holds"):
        trainer(tmp_path, Spoiled(), **short).fit(of_tokenizer, data_module(shards))


@pytest.mark.parametrize("groups", [None, [[0, 1], [2]]])
def test_the_last_step_of_an_epoch_is_the_mean_of_the_batches_it_has(
    groups: Any, tokenizer: Path, shards: Path, tmp_path: Path
) -> None:
    """Three batches, two a step: with a rate of zero the second step has the gradient of the third batch alone."""
    single = gradients(tokenizer, shards, tmp_path, 3, 1)
    steps = gradients(tokenizer, shards, tmp_path, 3, 2, scale_groups=groups)
    assert len(single) == 3 and len(steps) == 2
    torch.testing.assert_close(steps[0], (single[0] + single[1]) / 2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(steps[1], single[2], rtol=1e-4, atol=1e-6)


# The rate after a resume


def rates_after(tokenizer: Path, shards: Path, folder: Path, before: dict[str, Any], after: dict[str, Any]) -> Any:
    """Rates of the steps of a second epoch, resumed from the first with other settings."""

    class Rates(L.Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    def run(changes: dict[str, Any], *callbacks: L.Callback, **more: Any) -> L.Trainer:
        batch, rate = changes.get("batch_size", BATCH), changes.get("base_lr", 1e-3)
        done = trainer(
            folder, *callbacks, LastCheckpoint(), max_epochs=2, limit_val_batches=0, enable_checkpointing=True
        )
        done.fit(module_of(tokenizer, base_lr=rate), data_module(shards, batch_size=batch), **more)
        return done

    class OneEpoch(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.should_stop = True

    run(before, OneEpoch())
    rates = Rates()
    path = folder / "checkpoints" / "last.ckpt"
    assert torch.load(path, weights_only=True)["epoch"] == 0
    run(after, rates, ckpt_path=path, weights_only=True)
    return rates.seen


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"batch_size": 16}, {"batch_size": 8}),
        ({"batch_size": 8}, {"batch_size": 16}),
        ({}, {"base_lr": 4e-3}),
        ({}, {}),
    ],
)
def test_a_resumed_run_has_its_recipes_rate(
    before: dict[str, Any],
    after: dict[str, Any],
    tokenizer: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # not by the log: whether Lightning's reaches pytest depends on which test imported it first
    said: list[str] = []
    monkeypatch.setattr(optimizers, "rank_zero_info", said.append)
    batch, rate = after.get("batch_size", BATCH), after.get("base_lr", 1e-3)
    found = rates_after(tokenizer, shards, tmp_path, before, after)
    peak, steps = rate * batch / 256, 96 // batch
    schedule = HeldLine(2 * steps, 0, 0.1)
    # the second of two epochs, wherever the first one's count of steps has come to; each rate is the next step's
    assert found == pytest.approx([peak * schedule.factor(step) for step in range(steps + 1, 2 * steps + 1)])
    assert ("learning rate: the peak of the checkpoint was" in "".join(said)) == (before != after)


def test_settings_of_an_optimizer_are_the_recipes_after_a_resume() -> None:
    def made(rate: float, decay: float) -> tuple[torch.optim.Optimizer, ScheduledAdamW]:
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=rate, weight_decay=decay)
        return optimizer, ScheduledAdamW(optimizer, HeldLine(10, 0, 0.1))

    (old, old_course), (new, course) = made(1.0, 0.1), made(2.0, 0.3)
    new.load_state_dict(old.state_dict())
    course.load_state_dict(old_course.state_dict())
    group = new.param_groups[0]
    assert (group["lr"], group["initial_lr"], group["weight_decay"]) == (2.0, 2.0, 0.3)


# A module of a checkpoint alone


@pytest.mark.parametrize("family", [VARModule, MVARModule, MarkovVARModule])
def test_a_module_is_loaded_from_its_checkpoint_alone(
    family: type[VARModule], tokenizer: Path, shards: Path, tmp_path: Path
) -> None:
    attention = {"attention": SpatialAttention(kernel_size=3, scales=1)} if family is MVARModule else {}
    made = family(str(tokenizer), **MODEL_SIZES, cfg=3.0, top_k=5, base_lr=1e-3, **attention)
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(made, data_module(shards))
    run.save_checkpoint(tmp_path / "last.ckpt")
    found = family.load_from_checkpoint(tmp_path / "last.ckpt")
    assert all(torch.equal(tensor, made.state_dict()[name]) for name, tensor in found.state_dict().items())
    assert (found.cfg, found.top_k, found.base_lr) == (3.0, 5, 1e-3)
    assert found.model.config == made.model.config
    labels = torch.tensor([1, 2])
    assert torch.equal(found.generate(labels, [0, 1]).tokens, made.eval().generate(labels, [0, 1]).tokens)
    assert family.load_from_checkpoint(tmp_path / "last.ckpt", cfg=1.0, backend="dense").cfg == 1.0


def test_a_tokenizers_module_is_loaded_from_its_checkpoint_alone(shards: Path, tmp_path: Path) -> None:
    made = TokenizerModule(**TOKENIZER_SIZES, **plain())
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(made, data_module(shards))
    run.save_checkpoint(tmp_path / "last.ckpt")
    found = TokenizerModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert all(torch.equal(tensor, made.state_dict()[name]) for name, tensor in found.state_dict().items())
    with pytest.raises(UserError, match="holds a tokenizer alone"):
        VARModule.load_from_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_weights_that_are_not_float32_are_one_line(
    precision: Any, tokenizer: Path, shards: Path, tmp_path: Path
) -> None:
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0, precision=precision)
    with pytest.raises(UserError, match=f"trainer.precision {precision}: the frozen tokenizer needs float32 weights"):
        run.fit(module_of(tokenizer), data_module(shards))
