"""A tokenizer run that starts from other weights, trains parts alone, or goes on from an older checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from small_run import MODEL_SIZES, TOKENIZER_SIZES, copy_of, trainer
from torch.utils.data import DataLoader

from mvar_lightning import (
    AdversarialLoss,
    DataDependentInit,
    DeadCodeRestart,
    MultiScaleTokenizer,
    PatchDiscriminator,
    TokenizerModule,
    UserError,
    VARModule,
    load,
)
from mvar_lightning.checkpoints.official import tokenizer_reference_state
from mvar_lightning.training.tokenizer import start_from

PUBLISHED_NORMS = {**TOKENIZER_SIZES, "channels": 32, "norm_groups": 32}


def module(**changes: Any) -> TokenizerModule:
    L.seed_everything(0, verbose=False)
    return TokenizerModule(**{**TOKENIZER_SIZES, "lr": 3e-3, **changes})


def loader() -> DataLoader[Any]:
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return DataLoader([{"image": image} for image in images], batch_size=4)


class Start(L.Callback):
    """The tokenizer as training finds it."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.state = copy_of(pl_module.tokenizer)


def started(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    start = Start()
    trainer(folder, start, max_steps=1).fit(module(**changes), loader())
    return start.state


def test_starts_from_a_folder(tokenizer: Path, tmp_path: Path) -> None:
    expected = load(tokenizer)[1].state_dict()
    found = started(tmp_path, init_from=str(tokenizer))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any(not torch.equal(value, started(tmp_path)[name]) for name, value in expected.items())


def test_a_runs_folder_is_taken_where_a_tokenizer_is_asked_for(tokenizer: Path, tmp_path: Path) -> None:
    expected = load(tokenizer)[1].state_dict()
    shutil.copytree(tokenizer, tmp_path / "run" / "model")
    started_here = module().tokenizer
    start_from(started_here, str(tmp_path / "run"))
    frozen_there = VARModule(str(tmp_path / "run"), **MODEL_SIZES).tokenizer
    for found in (started_here.state_dict(), frozen_there.state_dict()):
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_tells_that_a_remedy_replaces_the_codes(
    tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    started(tmp_path, init_from=str(tokenizer))
    assert "replaces its codes" not in caplog.text
    started(tmp_path, init_from=str(tokenizer), remedies=[DataDependentInit()])
    assert "replaces its codes; leave it out to keep them" in caplog.text


def test_starts_from_a_released_file(tmp_path: Path) -> None:
    torch.manual_seed(3)
    source = MultiScaleTokenizer(**PUBLISHED_NORMS)
    torch.save(tokenizer_reference_state(source), tmp_path / "vae.pth")
    found = started(tmp_path, **PUBLISHED_NORMS, init_from=str(tmp_path / "vae.pth"))
    assert all(torch.equal(found[name], value) for name, value in source.state_dict().items())


def test_a_resumed_run_does_not_start_over(tokenizer: Path, tmp_path: Path) -> None:
    first = module(init_from=str(tokenizer))
    run = trainer(tmp_path, max_steps=2)
    run.fit(first, loader())
    run.save_checkpoint(tmp_path / "two.ckpt")
    start = Start()
    again = trainer(tmp_path, start, max_steps=3, max_epochs=-1)
    again.fit(module(init_from=str(tokenizer)), loader(), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert all(torch.equal(start.state[name], value) for name, value in first.tokenizer.state_dict().items())
    second = Start()
    trainer(tmp_path, second, max_steps=1).fit(first, loader())
    assert not torch.equal(second.state["decoder.conv_out.bias"], load(tokenizer)[1].decoder.conv_out.bias)


def test_other_sizes_are_told(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vocab_size \(64 here, 32 there\), codes \(cosine here, euclidean there\)"):
        started(tmp_path, init_from=str(tokenizer), vocab_size=64, codes="cosine")
    with pytest.raises(UserError, match="nowhere"):
        started(tmp_path, init_from=str(tmp_path / "nowhere.pth"))
    started(tmp_path, init_from=str(tokenizer), beta=1.0)
    with pytest.raises(UserError, match=r"tokenizer\.safetensors: is one file of a saved folder.*; give .*tokenizer$"):
        start_from(module().tokenizer, str(tokenizer / "tokenizer.safetensors"))


@pytest.mark.parametrize("frozen", [["encoder", "quant_conv", "quantizer"], ["decoder"]])
def test_frozen_parts_keep_their_weights(frozen: list[str], tmp_path: Path) -> None:
    fitted = module(frozen=frozen)
    before = copy_of(fitted.tokenizer)
    trainer(tmp_path, max_epochs=1).fit(fitted, loader())
    changed = {
        name.split(".")[0] for name, value in copy_of(fitted.tokenizer).items() if not torch.equal(value, before[name])
    }
    assert changed == {"encoder", "quant_conv", "quantizer", "post_quant_conv", "decoder"} - set(frozen)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"frozen": ["encode"]}, "frozen 'encode': no part of a tokenizer; they are encoder, quant_conv"),
        (
            {"frozen": ["encoder", "quant_conv", "quantizer", "post_quant_conv", "decoder"]},
            "nothing is left to train",
        ),
        (
            {"frozen": ["decoder"], "adversarial": AdversarialLoss(PatchDiscriminator(8, layers=1))},
            "frozen decoder: the adaptive weight .* set adaptive: false",
        ),
        ({"frozen": ["quantizer"], "remedies": [DeadCodeRestart()]}, "frozen quantizer: remedies change its codes"),
    ],
)
def test_parts_that_cannot_be_frozen(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        module(**changes)


def test_few_scales_train_only_the_phi_they_use() -> None:
    quantizer = module(scales=[4]).tokenizer.quantizer
    trained = [all(parameter.requires_grad for parameter in phi.parameters()) for phi in quantizer.phi]
    assert trained == [place in quantizer.phi_index for place in range(4)] and sum(trained) == 1


def test_steps_of_a_checkpoint_of_automatic_optimization_go_on_being_counted(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=2)
    run.fit(module(), loader())
    run.save_checkpoint(tmp_path / "two.ckpt")
    content = torch.load(tmp_path / "two.ckpt", weights_only=True)
    place = content["loops"]["fit_loop"]["epoch_loop.manual_optimization.optim_step_progress"]
    place["total"] = {"ready": 0, "completed": 0}
    torch.save(content, tmp_path / "old.ckpt")
    again = trainer(tmp_path, max_steps=3, max_epochs=-1)
    again.fit(module(), loader(), ckpt_path=tmp_path / "old.ckpt", weights_only=True)
    assert again.global_step == 3
