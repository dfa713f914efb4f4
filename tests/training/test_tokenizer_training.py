"""Steps that the tokenizer module takes itself: as Lightning does without a discriminator, counted right with one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_run import TOKENIZER_SIZES, Record, copy_of, data_module, plain, trainer
from torch import Tensor
from torch.utils.data import DataLoader

from mvar_lightning import (
    AdversarialLoss,
    DiffAugment,
    NonSaturatingLoss,
    PatchDiscriminator,
    TokenizerModule,
    UserError,
)
from mvar_lightning.callbacks import EMA, GradientNorm, LastCheckpoint, NonFiniteLossGuard
from mvar_lightning.tokenizer import CodebookRemedy
from mvar_lightning.training.manual_steps import window_of

# by automatic optimization, torch 2.13 on an x86 CPU with one thread; kernels of other CPUs round to 1.2e-4 of them
TEN_LOSSES = (
    1.450505,
    1.436235,
    1.189370,
    1.180113,
    1.130537,
    1.059503,
    1.015731,
    0.987111,
    1.025688,
    0.991416,
)
BATCHES = 5


def adversarial(**changes: Any) -> AdversarialLoss:
    return AdversarialLoss(PatchDiscriminator(8, layers=2), **{"start": 0, **changes})


def module(kind: type[TokenizerModule] = TokenizerModule, **changes: Any) -> TokenizerModule:
    """Its discriminator is made after it, so that the tokenizer starts the same with and without one."""
    L.seed_everything(0, verbose=False)
    settings = {**TOKENIZER_SIZES, **plain(), "lr": 3e-3, **changes}
    made = kind(**{**settings, "adversarial": None})
    make: Any = changes.get("adversarial")
    made.adversarial = make() if make is not None else None
    return made


def loader(image: Tensor | None = None) -> DataLoader[Any]:
    """Five batches of four smooth images."""
    coarse = torch.rand(4 * BATCHES, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    smooth = torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear")
    return DataLoader([{"image": one} for one in (smooth if image is None else image)], batch_size=4)


class Automatic(TokenizerModule):
    """The same losses, with Lightning taking the steps."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.automatic_optimization = True

    def configure_callbacks(self) -> list[L.Callback]:
        return []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self._losses(self._reconstruct(batch["image"], batch_idx), batch["image"])[0]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clipping is the trainer's."""


class Steps(L.Callback):
    """What each step of each optimizer worked with."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.norms: list[list[float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for place, optimizer in enumerate(trainer.optimizers):
            self.rates.append([])
            self.norms.append([])
            optimizer.register_step_post_hook(lambda done, *_, place=place: self._after(place, done))

    def _after(self, place: int, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.norms[place].append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))
        self.rates[place].append(optimizer.param_groups[0]["lr"])


def test_ten_step_loss_is_the_recorded_one(shards: Path, tmp_path: Path) -> None:
    record = Record()
    fitted = module(weight_decay=0.05)
    trainer(tmp_path, record, max_steps=10, max_epochs=-1).fit(fitted, datamodule=data_module(shards))
    assert list(record.train.values()) == pytest.approx(TEN_LOSSES, abs=5e-4)


@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, 0.1)])
def test_without_a_discriminator_steps_are_lightnings(accumulate: int, clip: float | None, tmp_path: Path) -> None:
    batches, weights, records = loader(), [], []
    for kind in (Automatic, TokenizerModule):
        own = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
        fitted, record = module(kind, weight_decay=0.1, **own), Record()
        theirs = own if kind is Automatic else {}
        run = trainer(tmp_path, record, max_epochs=2, limit_train_batches=4, **theirs)
        run.fit(fitted, batches)
        assert run.global_step == 8 // accumulate
        weights.append(copy_of(fitted))
        records.append(record.train)
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    assert records[0] == pytest.approx(records[1], rel=1e-6) if accumulate == 1 else len(records[1]) == 8


def test_only_the_tokenizers_steps_are_counted(tmp_path: Path) -> None:
    steps, ema = Steps(), EMA(0.9)
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=4)
    fitted = module(adversarial=lambda: adversarial(start=3, lr=1e-2), warmup=0.2, final_lr_ratio=0.1)
    run = trainer(tmp_path, steps, ema, keep, enable_checkpointing=True, max_epochs=2)
    run.fit(fitted, loader())
    assert run.global_step == 10 == ema.updates
    assert sorted(path.stem for path in tmp_path.glob("step*")) == ["step=4", "step=8"]
    ours, theirs = steps.rates
    assert len(ours) == 10 and len(theirs) == 7
    # each on its own curve: up in the first fifth, down to a tenth
    assert ours[:2] == pytest.approx([1.5e-3, 3e-3]) and theirs[0] == pytest.approx(1e-2)
    assert theirs[-1] < 2e-3 and ours[-1] < 1e-3


@pytest.mark.parametrize(
    ("accumulate", "windows"),
    [
        (1, [(1, True)] * 5),
        (2, [(2, False), (2, True), (2, False), (2, True), (1, True)]),
        (3, [(3, False), (3, False), (3, True), (2, False), (2, True)]),
        (9, [(5, False)] * 4 + [(5, True)]),
    ],
)
def test_windows_of_an_epoch(accumulate: int, windows: list[tuple[int, bool]]) -> None:
    class Fake:
        num_training_batches, is_last_batch = BATCHES, False

    seen = [window_of(Fake(), n, accumulate) for n in range(BATCHES)]  # type: ignore[arg-type]
    assert [(window.size, window.closes) for window in seen] == windows


def test_a_stream_of_unknown_length_still_closes_its_last_window() -> None:
    class Fake:
        num_training_batches, is_last_batch = float("inf"), True

    assert window_of(Fake(), 2, 2) == window_of(Fake(), 4, 2)  # type: ignore[arg-type]
    assert window_of(Fake(), 2, 2).closes and window_of(Fake(), 2, 2).size == 2  # type: ignore[arg-type]


def test_accumulated_batches_make_one_step_and_the_last_ones_of_an_epoch_too(tmp_path: Path) -> None:
    steps = Steps()
    fitted = module(adversarial=adversarial, accumulate_grad_batches=2)
    run = trainer(tmp_path, steps, max_epochs=2)
    run.fit(fitted, loader())
    assert run.global_step == 6 == len(steps.rates[0]) == len(steps.rates[1])
    assert steps.rates[0][-1] == pytest.approx(3e-3 * 0.05, rel=2)  # the curve ends with the run
    assert fitted.lr_schedulers()[0].last_epoch == 6  # type: ignore[index, union-attr]


def test_two_small_batches_accumulate_to_one_large(tmp_path: Path) -> None:
    """With a discriminator, without the adaptive weight: a ratio of norms is not a mean over batches."""
    whole = [{"image": one["image"]} for one in loader().dataset][:16]  # type: ignore[attr-defined]
    weights = []
    for size, accumulate in ((8, 1), (4, 2)):
        loss = lambda: adversarial(adaptive=False, lecam=0.1, loss=NonSaturatingLoss(1.0, 2))  # noqa: E731
        fitted = module(adversarial=loss, accumulate_grad_batches=accumulate)
        trainer(tmp_path, max_epochs=1).fit(fitted, DataLoader(whole, batch_size=size))
        weights.append(copy_of(fitted))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=2e-4, rtol=1e-3, msg=name)


def test_validation_between_the_batches_of_a_step_keeps_their_gradients(tmp_path: Path) -> None:
    weights = []
    for often in ({}, {"val_check_interval": 1}):
        fitted = module(adversarial=adversarial, accumulate_grad_batches=2)
        trainer(tmp_path, max_epochs=1, **often).fit(fitted, loader(), loader() if often else None)
        weights.append(copy_of(fitted))
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_both_gradients_are_clipped_after_the_callbacks_have_seen_them(precision: str, tmp_path: Path) -> None:
    steps = Steps()
    fitted = module(adversarial=lambda: adversarial(loss=NonSaturatingLoss(100.0, 1)), gradient_clip_val=0.02)
    run = trainer(tmp_path, steps, GradientNorm(), max_steps=2, precision=precision)
    run.fit(fitted, loader())
    for norms in steps.norms:
        assert norms == pytest.approx([0.02, 0.02], rel=1e-3)
    assert run.callback_metrics["train/gradient_norm"] > 0.1


def test_a_start_after_the_end_is_told_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = module()
    trainer(tmp_path, max_epochs=1).fit(plain, loader())
    late = module(adversarial=lambda: adversarial(start=7))
    theirs = copy_of(late.adversarial)  # type: ignore[arg-type]
    trainer(tmp_path, max_epochs=1).fit(late, loader())
    assert "would start at step 7, but the run ends at step 5: it never starts" in caplog.text
    assert all(torch.equal(value, copy_of(late)[name]) for name, value in copy_of(plain).items())
    assert all(torch.equal(value, theirs[name]) for name, value in copy_of(late.adversarial).items())  # type: ignore


def test_terms_of_both_sides_are_logged(tmp_path: Path) -> None:
    loss = lambda: adversarial(lecam=0.1, augment=DiffAugment(), loss=NonSaturatingLoss(1.0, 1))  # noqa: E731
    run = trainer(tmp_path, max_steps=2)
    run.fit(module(adversarial=loss), loader())
    names = {"adversarial", "adversarial_weight", "discriminator", "logits_real", "logits_fake", "lecam"}
    assert {f"train/{name}" for name in (*names, "gradient_penalty", "loss", "l1")} <= set(run.callback_metrics)


def test_bf16_keeps_losses_and_gradients_in_float32(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    class Watched(TokenizerModule):
        def _losses(self, output: Any, image_B3HW: Tensor) -> Any:
            result = super()._losses(output, image_B3HW)
            seen.append({**result[2], "loss": result[0], "discriminator_loss": result[1]})
            assert output.reconstruction_B3HW.dtype == torch.bfloat16, "autocast is on"
            return result

    fitted = module(Watched, adversarial=lambda: adversarial(loss=NonSaturatingLoss(1.0, 1), lecam=0.1))
    norms: set[torch.dtype] = set()
    for part in fitted.modules():
        if isinstance(part, torch.nn.GroupNorm):
            part.register_forward_hook(lambda *call: norms.add(call[-1].dtype))
    trainer(tmp_path, max_epochs=1, precision="bf16-mixed").fit(fitted, loader())
    assert {term.dtype for terms in seen for term in terms.values()} == {torch.float32}
    assert all(term.isfinite() for terms in seen for term in terms.values())
    assert {parameter.dtype for parameter in fitted.parameters()} == {torch.float32} == norms


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gradient_clip_val": 1.0}, "trainer.gradient_clip_val 1.0.*set model.gradient_clip_val"),
        ({"accumulate_grad_batches": 2}, "trainer.accumulate_grad_batches 2.*set model.accumulate_grad_batches"),
        ({"precision": "64-true"}, "trainer.precision 64-true: .*; take 32-true, bf16-mixed"),
    ],
)
def test_settings_of_the_trainer_that_are_the_modules(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1, **settings)
    with pytest.raises(UserError, match=said):
        run.fit(module(), loader())
    if "precision" not in settings:
        run.validate(module(), loader(), verbose=False)  # only training minds


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches 0"),
        ({"gradient_clip_val": 0.0}, "gradient_clip_val 0"),
    ],
)
def test_own_settings_are_checked(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        module(**settings)


def test_a_discriminator_too_deep_for_the_images_is_refused(tmp_path: Path) -> None:
    deep = module(adversarial=lambda: AdversarialLoss(PatchDiscriminator(8, layers=3)))
    with pytest.raises(UserError, match="images of 16 pixels are too small"):
        trainer(tmp_path, max_steps=1).fit(deep, loader())


@pytest.mark.parametrize("gan", [False, True])
def test_nan_pixels_stop_the_run_at_their_step_with_the_last_good_checkpoint(gan: bool, tmp_path: Path) -> None:
    image = torch.zeros(4 * BATCHES, 3, 16, 16)
    image[13, 0, 3, 3] = torch.nan  # in the fourth batch
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=2)
    run = trainer(tmp_path, keep, NonFiniteLossGuard(), enable_checkpointing=True, max_epochs=1)
    with pytest.raises(UserError, match=r"'l1' is nan at step 3; the last good checkpoint is .*step=2.ckpt") as error:
        run.fit(module(adversarial=adversarial if gan else None), loader(image))
    assert "\n" not in str(error.value)
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step=2.ckpt"]


def test_a_gradient_that_is_not_finite_spoils_no_checkpoint(tmp_path: Path) -> None:
    """The loss of its step is finite, and the next batch would only tell after the checkpoint was written."""

    class Spoiled(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 2:
                pl_module.tokenizer.decoder.conv_out.bias.grad[0] = torch.nan

    keep = LastCheckpoint(every_steps=1)
    run = trainer(tmp_path, Spoiled(), EMA(0.9), keep, enable_checkpointing=True, max_epochs=1)
    with pytest.raises(UserError, match=r"weight tokenizer.decoder.conv_out.bias is not finite at step 3"):
        run.fit(module(), loader())
    saved = torch.load(keep.last_model_path, weights_only=True)
    assert saved["global_step"] == 2 and all(tensor.isfinite().all() for tensor in saved["state_dict"].values())


@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_constant_images_are_no_trouble(value: float, tmp_path: Path) -> None:
    image = torch.full((4 * BATCHES, 3, 16, 16), value)
    loss = lambda: adversarial(augment=DiffAugment(), lecam=0.1, loss=NonSaturatingLoss(1.0, 1))  # noqa: E731
    fitted = module(adversarial=loss)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(fitted, loader(image), loader(image))
    assert all(tensor.isfinite().all() for tensor in fitted.state_dict().values())
    assert run.callback_metrics["val/loss"].isfinite()


@pytest.mark.parametrize("saved_with", [True, False])
def test_a_checkpoint_with_other_optimizers_is_refused(saved_with: bool, tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1)
    run.fit(module(adversarial=adversarial if saved_with else None), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    other = module(adversarial=None if saved_with else adversarial)
    before = copy_of(other)
    with pytest.raises(UserError, match=f"written {'with' if saved_with else 'without'} a discriminator"):
        trainer(tmp_path, max_steps=2).fit(other, loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_a_checkpoint_of_another_discriminator_or_tokenizer_is_told_by_its_sizes(tmp_path: Path) -> None:
    """Before any weight is touched, and not in torch's list of all of them."""
    run = trainer(tmp_path, max_steps=1)
    run.fit(module(adversarial=adversarial), loader())
    state = {name: torch.zeros(3, *tensor.shape) for name, tensor in run.lightning_module.state_dict().items()}
    for name in ("adversarial.discriminator.", "tokenizer.encoder."):
        wrong = next(each for each in state if each.startswith(name))
        content = {"state_dict": {**run.lightning_module.state_dict(), wrong: state[wrong]}, "global_step": 1}
        with pytest.raises(UserError, match=rf"has {wrong} of \(3, .*keep the model's sizes"):
            run.lightning_module.on_load_checkpoint(content)


def test_scale_dropout_and_remedies_take_part(tmp_path: Path) -> None:
    calls: list[str] = []

    class Watching(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            calls.append("batch")

    class Remedy(CodebookRemedy):
        def before_step(self, tokenizer: Any, image_B3HW: Tensor, optimizer: Any = None) -> None:
            calls.append("before")

        def between_batches(self, tokenizer: Any, output: Any) -> None:
            calls.append("between")

        def after_step(self, tokenizer: Any, output: Any, optimizer: torch.optim.Optimizer) -> None:
            calls.append("after")
            assert optimizer.state[tokenizer.quantizer.codebook.weight]["step"] > 0
            assert output.idx_BL.shape == (4, 21)

    fitted = module(remedies=[Remedy()], accumulate_grad_batches=2)
    trainer(tmp_path, Watching(), max_epochs=1).fit(fitted, loader())
    assert calls == ["before", "between", "batch", "before", "after", "batch"] * 2 + ["before", "after", "batch"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dropped = module(scales=[1, 2, 3, 4], scale_dropout=0.5)
        kept: list[Tensor] = []
        forward = dropped.tokenizer.forward
        dropped.tokenizer.forward = lambda image, keep: (kept.append(keep), forward(image, keep))[1]  # type: ignore
        trainer(tmp_path, max_epochs=1).fit(dropped, loader())
        assert {3, 4} == set(torch.cat(kept).tolist())
        kept.clear()
        fewer = module(scales=[1, 2, 3, 4], scale_dropout=0.5, scale_dropout_keeps=1)
        whole = fewer.tokenizer.forward
        fewer.tokenizer.forward = lambda image, keep: (kept.append(keep), whole(image, keep))[1]  # type: ignore
        trainer(tmp_path, max_epochs=2).fit(fewer, loader())
        assert {1, 2, 3, 4} == set(torch.cat(kept).tolist())
