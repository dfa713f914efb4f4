"""Training from a token cache is training on the images that it was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from small_run import BATCH, MODEL_SIZES, TOKENIZER_SIZES, Record, data_module, trainer
from torch import Tensor
from torch.utils.data import DataLoader

from mvar_lightning import MarkovVARModule, TokenizerModule, TokenShards, UserError, VARModule
from mvar_lightning.callbacks import ReconstructionGrid, SampleMetrics
from mvar_lightning.cli import main
from mvar_lightning.data.images import decode_rgb
from mvar_lightning.data.index import read_index
from mvar_lightning.data.reading.place import ShardPlace
from mvar_lightning.data.reading.samples import Faults, read_shard
from mvar_lightning.data.token_data import TrainOrder
from mvar_lightning.data.tokens.making import Views
from mvar_lightning.data.transforms import to_batch
from mvar_lightning.metrics.features import FeatureExtractor


@pytest.fixture(scope="module")
def cache(tokenizer: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two views of each training image."""
    folder = tmp_path_factory.mktemp("small") / "tokens"
    given = ["--checkpoint", tokenizer, "--data", shards, "--out", folder, "--views", 2, "--num-workers", 0]
    assert main([str(one) for one in ("tokens", "make", *given, "--devices", 1, "--accelerator", "cpu")]) == 0
    return folder


def tokens(cache: Path, **options: Any) -> TokenShards:
    return TokenShards(str(cache), **({"batch_size": BATCH, "num_workers": 0} | options))


def module(tokenizer: Path, family: Any = VARModule, **changes: Any) -> Any:
    torch.manual_seed(0)
    return family(str(tokenizer), **{**MODEL_SIZES, "drop_path": 0.0, "label_drop": 0.0, "base_lr": 0.05, **changes})


def crops_of_an_epoch(data: TokenShards, shards: Path, number: int) -> list[dict[str, Tensor]]:
    """The batches of a pass over the cache, as images: in its order, each with the view that is due."""
    views, faults = Views(data.settings), Faults(9)
    images, part_of = [], []
    for part, shard in enumerate(read_index(shards).split("train").shards):
        images += list(read_shard(ShardPlace(str(shards)), shard, faults))
        part_of += [part] * shard.samples
    order = TrainOrder([part.samples for part in data.cache.split("train")], data.seed, data.shuffle_window)
    row = np.concatenate([piece.numbers_N for piece in order.take(number * len(images), len(images))])
    batches = []
    for numbers in row.reshape(-1, BATCH):
        crops = [
            views.of(decode_rgb(images[n].image), "train", images[n].key)[(number + part_of[n]) % 2] for n in numbers
        ]
        batches.append({"image": to_batch(crops), "label": torch.tensor([int(images[n].label) for n in numbers])})
    return batches


@pytest.mark.parametrize("family", [VARModule, MarkovVARModule])
def test_a_cached_batch_has_the_loss_of_the_same_crops(cache: Path, shards: Path, tokenizer: Path, family: Any) -> None:
    data, model = tokens(cache), module(tokenizer, family).eval()
    loader = data.train_dataloader()
    for number in range(2):
        for cached, crops in zip(loader, crops_of_an_epoch(data, shards, number), strict=True):
            assert torch.equal(cached["label"], crops["label"])
            with torch.no_grad():
                (ours, our_logits), (theirs, their_logits) = model(cached), model(crops)
            assert ours.loss.item() == pytest.approx(theirs.loss.item(), abs=1e-6)
            assert torch.equal(our_logits, their_logits)


class Images(L.LightningDataModule):
    """Fixed image batches, one list an epoch; validates on what the shards validate on."""

    image_size = 16

    def __init__(self, epochs: list[list[dict[str, Tensor]]], shards: Path) -> None:
        super().__init__()
        self.epochs, self.batch_size = epochs, BATCH
        self.val = data_module(shards)

    def train_dataloader(self) -> Any:
        return DataLoader(self.epochs[self.trainer.current_epoch], batch_size=None)

    def val_dataloader(self) -> Any:
        return DataLoader(list(self.val.val_dataloader()), batch_size=None)


@pytest.mark.slow
def test_a_run_on_tokens_is_the_run_on_images(cache: Path, shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    """Twelve steps in two epochs, with label dropout and stochastic depth: the same losses."""
    crops = [crops_of_an_epoch(tokens(cache), shards, number) for number in range(2)]
    records = []
    for data in (tokens(cache), Images(crops, shards)):
        record = Record()
        run = trainer(tmp_path, record, max_epochs=2, reload_dataloaders_every_n_epochs=int(isinstance(data, Images)))
        run.fit(module(tokenizer, drop_path=0.2, label_drop=0.2), datamodule=data)
        records.append(record)
    ours, theirs = records
    assert len(ours.train) == 12 and ours.train.keys() == theirs.train.keys()
    assert list(ours.train.values()) == pytest.approx(list(theirs.train.values()), abs=1e-6)
    assert ours.val == pytest.approx(theirs.val, abs=1e-6)
    assert len(set(ours.val.values())) == 2


def test_a_cache_of_another_tokenizer_is_refused_before_the_first_step(
    cache: Path, other_tokenizer: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=r"token cache .*made by a tokenizer of hash \w{12}, model.tokenizer has \w{12}"
    ):
        trainer(tmp_path).fit(module(other_tokenizer), datamodule=tokens(cache))


def test_a_tokenizer_is_not_trained_on_tokens(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a tokenizer is trained on images"):
        trainer(tmp_path).fit(TokenizerModule(**TOKENIZER_SIZES), datamodule=tokens(cache))


class Colors(FeatureExtractor):
    """Mean and deviation of the image."""

    def __init__(self) -> None:
        super().__init__("colors", 2)

    def extract(self, image_B3HW: Tensor) -> Tensor:
        return torch.stack([image_B3HW.mean(dim=(1, 2, 3)), image_B3HW.std(dim=(1, 2, 3))], dim=1)


def test_metrics_and_pictures_take_real_images_from_the_shards(
    cache: Path, shards: Path, tokenizer: Path, tmp_path: Path
) -> None:
    found = []
    for name, data in (("tokens", tokens(cache, images=str(shards))), ("images", data_module(shards))):
        metrics = SampleMetrics(Colors(), consistency=False, num_images=10)
        grid = ReconstructionGrid(num_images=8)
        run = trainer(tmp_path / name, metrics, grid, max_epochs=1)
        run.fit(module(tokenizer), datamodule=data)
        found.append((metrics.latest, (tmp_path / name / "reconstructions.png").read_bytes()))
    (ours, our_picture), (theirs, their_picture) = found
    assert ours["val/fid_reference_images"] == 32
    for key in ("fid_reference_images", "rfid_colors", "fid_colors_floor", "fid_floor_images"):
        assert ours[f"val/{key}"] == pytest.approx(theirs[f"val/{key}"], rel=1e-4), key
    assert our_picture == their_picture


@pytest.mark.parametrize(
    "callback", [SampleMetrics(Colors(), consistency=False), SampleMetrics(), ReconstructionGrid()]
)
def test_without_images_what_needs_them_says_so(
    cache: Path, tokenizer: Path, tmp_path: Path, callback: L.Callback
) -> None:
    with pytest.raises(
        UserError, match=rf"{type(callback).__name__}: needs real images.*set data\.images to the shard"
    ):
        trainer(tmp_path, callback).validate(module(tokenizer), datamodule=tokens(cache), verbose=False)
