"""What a tokenizer run does where nothing is said: remedies keep codes in use, poor data is told, bad data stops it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from codebook_fits import dull_images, smooth_images, tiny, usage
from lightning.pytorch.callbacks import ModelCheckpoint
from small_run import TOKENIZER_SIZES, plain, trainer
from torch import Tensor
from torch.utils.data import DataLoader

from mvar_lightning import TokenizerModule, UserError
from mvar_lightning.callbacks import LastCheckpoint
from mvar_lightning.tokenizer import DataDependentInit, DeadCodeRestart
from mvar_lightning.training.manual_steps import last_checkpoint

CODES = "quantizer.codebook.weight"


def module(**changes: Any) -> TokenizerModule:
    L.seed_everything(0, verbose=False)
    return TokenizerModule(**{**TOKENIZER_SIZES, "lr": 3e-3, **changes})


def small_module(seed: int, **changes: Any) -> TokenizerModule:
    """Around a tokenizer that a step takes milliseconds for."""
    tokenizer = tiny(seed)
    made = TokenizerModule(**{**tokenizer.config, "lr": 5e-3, "warmup": 0.0, "final_lr_ratio": 1.0, **changes})
    made.tokenizer.encoder, made.tokenizer.decoder = tokenizer.encoder, tokenizer.decoder
    made.tokenizer.decoder.conv_out = torch.nn.Identity()  # type: ignore[assignment]
    return made


def loader(image: Tensor, batch: int = 4) -> DataLoader[Any]:
    return DataLoader([{"image": one} for one in image], batch_size=batch)


def images(count: int = 20) -> Tensor:
    return torch.nn.functional.interpolate(smooth_images(count), (16, 16), mode="bilinear")


def names(made: TokenizerModule) -> tuple[list[str], list[str]]:
    return [part.name for part in made.loss.parts], [type(remedy).__name__ for remedy in made.remedies]


def test_nothing_said_is_the_form_that_works() -> None:
    made = module()
    assert names(made) == (["l1", "l2", "quantizer", "entropy"], ["DataDependentInit", "DeadCodeRestart"])
    assert [part.weight for part in made.loss.parts] == [1, 1, 1, 0.1]
    assert names(module(**plain())) == (["l1", "l2", "quantizer"], [])
    assert names(module(losses=plain()["losses"]))[1] == ["DataDependentInit", "DeadCodeRestart"]


@pytest.mark.parametrize("changes", [{"init_from": "somewhere"}, {"frozen": ["quantizer"]}])
def test_codes_that_come_trained_stay_unless_a_remedy_is_asked_for(changes: dict[str, Any]) -> None:
    assert names(module(**changes))[1] == []
    if "init_from" in changes:
        assert names(module(**changes, remedies=[DeadCodeRestart()]))[1] == ["DeadCodeRestart"]


@pytest.mark.slow
def test_the_default_keeps_codes_that_the_plain_form_loses(tmp_path: Path) -> None:
    """Two starts. Seen at 2x2 and 4x4: 0.19 and 0.44 plain, 0.94 and 0.92 by default."""
    found = {}
    for name, settings in (("plain", plain), ("default", dict)):
        used = []
        for seed in (0, 1):
            made, seen = small_module(seed, **settings()), dull_images(seed + 1)
            trainer(tmp_path, max_epochs=1).fit(made, loader(seen.repeat(40, 1, 1, 1), 32))
            used.append(torch.tensor(usage(made.tokenizer, seen)))
        found[name] = torch.stack(used).mean(dim=0)
    assert found["plain"][1] < 0.4
    assert found["default"][1:].min() > 0.75 and found["default"][1] > found["plain"][1] + 0.35, found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scale_dropout": 0.1}, "keeps at least 3 scales and the pyramid has 3; lower scale_dropout_keeps"),
        ({"scale_dropout_keeps": 0}, "scale_dropout_keeps 0: an image needs at least 1 scale"),
    ],
)
def test_scales_that_cannot_be_kept(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        module(**changes)


@pytest.mark.parametrize("settings", [plain, dict])
@pytest.mark.parametrize(
    ("image", "changes", "said"),
    [
        (torch.full((8, 3, 16, 16), -1.0), {}, "all 4 of the first batch are of one color each"),
        (images(1), {}, "a single training image"),
        (images(8), {"vocab_size": 256}, "vocab_size 256: 8 training images have only 168 tokens"),
    ],
)
def test_data_that_teaches_little_is_told_once(
    settings: Any,
    image: Tensor,
    changes: dict[str, Any],
    said: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer(tmp_path, max_epochs=2).fit(module(**{**settings(), **changes}), loader(image))
    assert caplog.text.count(said) == 1


def test_good_data_is_not_talked_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, max_epochs=1).fit(module(), loader(images()))
    assert "images" not in caplog.text and "vocab_size" not in caplog.text


def test_nan_pixels_in_validation_stop_the_run(tmp_path: Path) -> None:
    bad = images(8)
    bad[5, 0, 3, 3] = torch.nan
    keep = LastCheckpoint()
    run = trainer(tmp_path, keep, enable_checkpointing=True, max_epochs=2)
    with pytest.raises(UserError, match=r"'val/l1' is nan at step 5; a checkpoint of this step holds the same weights"):
        run.fit(module(), loader(images()), loader(bad))
    saved = torch.load(keep.last_model_path, weights_only=True)
    assert saved["global_step"] == 5 and all(tensor.isfinite().all() for tensor in saved["state_dict"].values())


def test_nan_pixels_of_the_first_batch_name_the_step(tmp_path: Path) -> None:
    bad = images()
    bad[5, 0, 3, 3] = torch.nan
    with pytest.raises(UserError, match="at step 1: DataDependentInit: the latents of the first images are not finite"):
        trainer(tmp_path, max_epochs=1).fit(module(remedies=[DataDependentInit(batches=2)]), loader(bad))


def test_more_batches_than_the_run_has_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = module(remedies=[DataDependentInit(batches=9)])
    trainer(tmp_path, max_epochs=1).fit(made, loader(images()))
    assert "batches 9: the run ended after 5 and codes kept their random start; give fewer" in caplog.text


def test_codes_that_start_after_steps_have_no_moments(tmp_path: Path) -> None:
    class Third(L.Callback):
        """A step without a gradient of the codes, after two with: what moments are left is of these."""

        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 2:
                pl_module.tokenizer.quantizer.codebook.weight.grad.zero_()

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            weight = pl_module.tokenizer.quantizer.codebook.weight
            self.second = trainer.optimizers[0].state[weight]["exp_avg_sq"]

    left = []
    for batches in (1, 3):
        watch = Third()
        trainer(tmp_path, watch, max_steps=3).fit(module(remedies=[DataDependentInit(batches)]), loader(images()))
        left.append(bool(watch.second.any()))
    assert left == [True, False]


def test_all_batches_of_an_accumulated_step_count_as_hits(tmp_path: Path) -> None:
    remedy = DeadCodeRestart(every=50)
    trainer(tmp_path, max_epochs=1).fit(module(remedies=[remedy], accumulate_grad_batches=2), loader(images()))
    assert remedy.steps == 3 and remedy.hits_KV.sum() == 20 * 21


def test_the_newest_checkpoint_of_all_callbacks_is_named(tmp_path: Path) -> None:
    early = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    run = trainer(tmp_path, early, LastCheckpoint(), enable_checkpointing=True, max_epochs=1)
    run.fit(module(), loader(images()))
    assert last_checkpoint(run).endswith("last.ckpt")


def test_an_infinite_moment_is_in_no_checkpoint(tmp_path: Path) -> None:
    class Spoiled(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                next(iter(trainer.optimizers[0].state.values()))["exp_avg_sq"].flatten()[0] = torch.inf

    keep = LastCheckpoint(every_steps=1)
    run = trainer(tmp_path, Spoiled(), keep, enable_checkpointing=True, max_epochs=1)
    with pytest.raises(UserError, match="exp_avg_sq of parameter 0 of optimizer 0 is not finite at step 2"):
        run.fit(module(), loader(images()))
    assert torch.load(keep.last_model_path, weights_only=True)["global_step"] == 1
