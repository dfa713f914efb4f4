"""What Lightning's users bring: folders to `load_from_checkpoint`, bare loaders, pairs, labels alone, half()."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from faults.small_models import small_model, small_tokenizer
from torch.utils.data import DataLoader, TensorDataset

from mvar_lightning import MVARModule, TokenizerModule, UserError, VARModule
from mvar_lightning.checkpoints import save

IMAGES, LABELS = torch.rand(4, 3, 6, 6), torch.arange(4) % 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "folder"
    save(path, small_model(), small_tokenizer())
    return path


def trainer(**settings: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(accelerator="cpu", **quiet, **settings)


def batches(*tensors: torch.Tensor) -> DataLoader:
    return DataLoader(TensorDataset(*tensors), batch_size=2)


def test_a_saved_folder_becomes_a_module(folder: Path) -> None:
    module = MVARModule.load_from_checkpoint(folder, base_lr=3e-4, map_location="cpu")
    assert module.base_lr == 3e-4
    for part, expected in ((module.model, small_model()), (module.tokenizer, small_tokenizer())):
        assert part.config == expected.config
        for name, tensor in expected.state_dict().items():
            assert torch.equal(part.state_dict()[name], tensor)
    tokenizer = TokenizerModule.load_from_checkpoint(folder).tokenizer
    assert torch.equal(tokenizer.encode(IMAGES), small_tokenizer().encode(IMAGES))
    with pytest.raises(TypeError, match="depht"):
        VARModule.load_from_checkpoint(folder, depht=2)


@pytest.mark.parametrize("loader", [DataLoader(LABELS, batch_size=2), batches(LABELS), batches(IMAGES, LABELS)])
def test_predictions_of_labels(folder: Path, loader: DataLoader) -> None:
    module = VARModule.load_from_checkpoint(folder)
    found = trainer().predict(module, loader)
    assert found is not None and [tuple(made.images.shape) for made in found] == [(2, 3, 6, 6)] * 2
    again = trainer(precision="bf16-true").predict(module.half(), loader)
    assert again is not None and all(torch.isfinite(made.images).all() for made in again)


@pytest.mark.parametrize("loader", [DataLoader(IMAGES, batch_size=2), batches(IMAGES, LABELS)])
def test_predictions_of_images(folder: Path, loader: DataLoader) -> None:
    module = TokenizerModule.load_from_checkpoint(folder)
    found = trainer().predict(module, loader)
    expected = module.tokenizer.decode(module.tokenizer.encode(IMAGES))
    assert found is not None and torch.allclose(torch.cat(found), expected, atol=1e-5)


def test_a_bare_loader_of_pairs_trains_and_tells_its_batch_size(folder: Path) -> None:
    module = VARModule.load_from_checkpoint(folder)
    fitted = trainer(max_steps=2)
    fitted.fit(module, batches(IMAGES, LABELS), batches(IMAGES, LABELS))
    assert module.global_batch_size() == 2 and "val/loss" in fitted.callback_metrics
    with pytest.raises(UserError, match="batch size"):
        trainer(max_steps=1).fit(VARModule.load_from_checkpoint(folder), [(IMAGES, LABELS)])


@pytest.mark.parametrize("make", [VARModule, TokenizerModule])
@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        ((IMAGES * 255).round().long(), "image: its pixels are int64; give uint8"),
        ((IMAGES * 255).short(), "int16"),
        (IMAGES * 255, r"image: floats from .* to 25\d.*; give them in \[-1, 1\]"),
        (IMAGES - 1.5, r"floats from -1\.\d+ to"),
    ],
    ids=["int64", "int16", "255", "-1.5"],
)
def test_pixels_whose_black_and_white_nobody_knows_are_refused(
    make: Any, pixels: torch.Tensor, words: str, folder: Path
) -> None:
    with pytest.raises(UserError, match=words):
        trainer(max_steps=1).fit(make.load_from_checkpoint(folder), batches(pixels, LABELS))


def test_half_weights_sample(folder: Path) -> None:
    made = VARModule.load_from_checkpoint(folder).half().generate(LABELS, [0, 1, 2, 3])
    assert made.images.dtype == torch.float32 and torch.isfinite(made.images).all()
