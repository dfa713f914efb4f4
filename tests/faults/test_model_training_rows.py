"""Lightning's trainer with other people's loaders and other people's checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from mvar_lightning import TokenizerModule, VARModule
from mvar_lightning.checkpoints.folder import open_checkpoint
from mvar_lightning.data.image_data import named
from mvar_lightning.errors import UserError
from tests.faults.harness import ask, broken_promise
from tests.small_run import MODEL_SIZES, TOKENIZER_SIZES, data_module, plain, trainer, write_digits, write_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    write_digits(place / "data")
    write_tokenizer(place / "tokenizer")
    return place


class Pairs(L.LightningDataModule):
    """Batches as torchvision's data sets make them."""

    batch_size = 8

    def train_dataloader(self) -> Any:
        images = torch.rand(16, 3, 16, 16) * 2 - 1
        return DataLoader(TensorDataset(images, torch.arange(16) % 10), batch_size=self.batch_size)

    val_dataloader = predict_dataloader = train_dataloader


def module_of(kind: str, place: Path) -> Any:
    if kind == "tokenizer":
        return TokenizerModule(**TOKENIZER_SIZES, **plain())
    return VARModule(str(place / "tokenizer"), **MODEL_SIZES)


@pytest.mark.parametrize("kind", ["tokenizer", "model"])
def test_pairs_of_images_and_labels(kind: str, place: Path) -> None:
    module, run = module_of(kind, place), trainer(place, max_epochs=1)
    run.fit(module, datamodule=Pairs())
    assert run.global_step == 2 and torch.isfinite(run.callback_metrics["val/loss"])
    results = run.predict(module, datamodule=Pairs())
    assert results is not None and len(results) == 2
    images = results[0] if kind == "tokenizer" else results[0].images
    assert images.shape == (8, 3, 16, 16) and images.isfinite().all()


def test_predict_gives_images_of_our_own_data(place: Path) -> None:
    results: Any = trainer(place).predict(module_of("model", place), datamodule=data_module(place / "data"))
    tokens = torch.cat([result.tokens for result in results])
    assert len(tokens) == 32 and len(tokens.unique(dim=0)) == 32, "each with a seed of its own"


@pytest.mark.parametrize("batch", [[1], torch.zeros(2), {"image": 1}, (1, 2, 3), {"label": 1}])
def test_batches_of_another_kind(batch: Any) -> None:
    with pytest.raises(UserError, match=r"batch .*give a dict with image"):
        named(batch, "label")


@pytest.fixture(scope="module")
def last(place: Path) -> Path:
    """A checkpoint after one epoch."""
    run = trainer(place, max_epochs=1)
    run.fit(module_of("model", place), datamodule=data_module(place / "data"))
    run.save_checkpoint(place / "last.ckpt")
    run.save_checkpoint(place / "weights.ckpt", weights_only=True)
    return place / "last.ckpt"


@pytest.mark.parametrize("prefix", ["_orig_mod.", "_forward_module."])
def test_a_resume_reads_names_of_wrappers(prefix: str, last: Path, place: Path) -> None:
    content = torch.load(last, weights_only=True)
    wrapped = copy.copy(content)
    wrapped["state_dict"] = {prefix + key: tensor for key, tensor in content["state_dict"].items()}
    torch.save(wrapped, place / "wrapped.ckpt")
    run, module = trainer(place, max_epochs=1), module_of("model", place)
    run.fit(module, datamodule=data_module(place / "data"), ckpt_path=str(place / "wrapped.ckpt"), weights_only=True)
    assert run.global_step == 6
    assert torch.equal(module.model.word_embedding.weight, content["state_dict"]["model.word_embedding.weight"])


def test_a_resume_from_weights_alone(last: Path, place: Path) -> None:
    open_checkpoint(last).check_resumable()
    with pytest.raises(UserError, match=r"holds weights alone.*model\.init_from"):
        open_checkpoint(place / "weights.ckpt").check_resumable()
    recipe = place / "recipe.yaml"
    recipe.write_text(f"""
trainer: {{accelerator: cpu, devices: 1, max_epochs: 1}}
model:
  class_path: mvar_lightning.VARModule
  init_args: {{tokenizer: {place / "tokenizer"}, depth: 2, width: 32, heads: 2, gamma_init: 0.1}}
data:
  class_path: mvar_lightning.ShardsDataModule
  init_args: {{path: {place / "data"}, image_size: 16, batch_size: 16, num_workers: 0}}
""")
    answer = ask("fit", "--config", recipe, "--ckpt-path", place / "weights.ckpt", cwd=place)
    assert broken_promise(answer) is None and answer.status == 2
    assert "weights.ckpt: holds weights alone" in answer.line
