"""The data module: embedded digits, Lightning's loop, and clear errors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch

from mvar_lightning import normalize
from mvar_lightning.data.check import check
from mvar_lightning.data.image_data import ShardsDataModule, run_data
from mvar_lightning.data.making.embedded import digits, load_source
from mvar_lightning.data.making.shards import ensure
from mvar_lightning.errors import UserError


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "digits"
    ensure(folder)
    return str(folder)


def module_of(folder, **options) -> ShardsDataModule:
    defaults = {"image_size": 16, "batch_size": 64, "num_workers": 0, "resize_ratio": 1.0}
    return ShardsDataModule(str(folder), **(defaults | options))


def test_digits_are_all_there_and_split_by_class(digits_folder):
    data = module_of(digits_folder)
    assert (data.train_samples, data.val_samples, data.num_classes) == (1437, 360, 10)
    assert data.class_names == tuple("0123456789")
    assert check(digits_folder) == []
    source = digits()
    assert {example.name for example in source.train}.isdisjoint(example.name for example in source.val)
    per_class = torch.bincount(torch.tensor([example.label for example in source.val]))
    assert per_class.min() >= 34
    assert len(data.index.split("train").shards) >= 4


def test_digits_come_out_as_they_were_scanned(digits_folder):
    batches = list(module_of(digits_folder).val_dataloader())
    image = torch.cat([batch["image"] for batch in batches])
    label = torch.cat([batch["label"] for batch in batches])
    assert image.shape == (360, 3, 16, 16)
    assert (image.dtype, label.dtype) == (torch.uint8, torch.int64)
    image = normalize(image)
    assert image.min() == -1
    assert image.max() > 0.9
    assert torch.equal(image[:, 0], image[:, 2])
    # ones and zeros differ in the middle of the picture: labels and pictures belong together
    middle = image[:, 0, 6:10, 6:10].mean(dim=(1, 2))
    assert middle[label == 1].mean() > middle[label == 0].mean() + 0.5


def test_a_missing_embedded_folder_is_made_and_reused(tmp_path):
    data = module_of(tmp_path / "deep" / "digits")
    assert data.num_classes == 10
    stamp = (tmp_path / "deep" / "digits" / "index.json").stat().st_mtime_ns
    data.prepare_data()
    assert (tmp_path / "deep" / "digits" / "index.json").stat().st_mtime_ns == stamp
    assert len(load_source("digits").train) == 1437


def test_missing_and_empty_folders_say_what_to_run(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").touch()
    for name, message in (("none", "does not exist"), ("empty", "is empty"), ("images", "no index.json")):
        with pytest.raises(UserError, match=rf"{name}: .*{message}.*mvar shards make"):
            _ = module_of(tmp_path / name).num_classes
    with pytest.raises(UserError, match=r"pipe:echo .*runs a command"):
        module_of("pipe:echo x").prepare_data()


def test_setup_names_a_missing_or_shortened_shard(numbered_shards):
    folder = numbered_shards()
    shard = folder / "val" / "000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"val/000001\.tar: \d+ bytes instead of"):
        module_of(folder).setup("fit")
    shard.unlink()
    with pytest.raises(UserError, match=r"val/000001\.tar: missing"):
        module_of(folder).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"num_workers": -2}, "num_workers -2"),
        ({"val_crop": "random"}, "val_crop 'random'"),
        ({"crop": "none"}, "crop 'none'"),
        ({"image_size": 0}, "image_size 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        module_of("anywhere", **options)


def test_an_epoch_shorter_than_a_batch_is_refused(numbered_shards):
    folder = numbered_shards()
    with pytest.raises(UserError, match="epoch of 40 samples is less than one batch of 41"):
        module_of(folder, batch_size=41).train_dataloader()
    assert len(module_of(folder, batch_size=4, epoch_samples=99).train_dataloader()) == 24


class Recorder(lightning.LightningModule):
    """Counts what it sees; a single weight is trained so that Lightning has something to do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.sums: list[float] = []
        self.val_images = 0

    def training_step(self, batch, batch_idx):
        image = normalize(batch["image"])
        self.sums.append(float(image.double().sum()))
        return (self.weight - image.mean()) ** 2

    def validation_step(self, batch, batch_idx):
        self.val_images += len(batch["label"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(lightning.Callback):
    """Saves once, in the middle of a run: after the batch that makes so many steps."""

    def __init__(self, step: int, path: Path) -> None:
        self.step = step
        self.path = path

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(folder, workers=0, ckpt_path=None, **options):
    model = Recorder()
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    data = module_of(folder, batch_size=4, num_workers=workers)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return model, trainer


@pytest.mark.parametrize("workers", [0, 2])
def test_lightning_knows_the_length_and_sees_each_validation_image(numbered_shards, workers):
    model, trainer = fit(numbered_shards(), workers, max_epochs=2)
    assert trainer.estimated_stepping_batches == 20
    assert len(model.sums) == 20
    assert model.val_images == 2 * 12
    assert model.sums[:10] != model.sums[10:]


@pytest.mark.parametrize(
    ("step", "workers", "limit"), [(13, 0, None), (13, 2, None), (10, 0, None), (7, 0, 7), (9, 0, 7)]
)
def test_a_resumed_fit_sees_the_same_batches(numbered_shards, tmp_path, step, workers, limit):
    folder = numbered_shards()
    options = {"workers": workers, "max_epochs": 3} | ({"limit_train_batches": limit} if limit else {})
    saved = tmp_path / "saved.ckpt"
    whole, _ = fit(folder, callbacks=[SaveAt(step, saved)], **options)
    resumed, _ = fit(folder, ckpt_path=saved, **options)
    assert len(whole.sums) == 3 * (limit or 10)
    assert resumed.sums == whole.sums[step:]
    assert resumed.weight.item() == whole.weight.item()


class Reader(Recorder):
    """Reads a loader of its own in the middle of training, as callbacks do."""

    def training_step(self, batch, batch_idx):
        own = next(iter(self.trainer.datamodule.train_dataloader()))
        assert batch["image"].dtype == own["image"].dtype == torch.uint8
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        assert batch["image"].dtype == torch.uint8


def test_batches_are_bytes_for_everyone(numbered_shards):
    data = ShardsDataModule(str(numbered_shards()), image_size=8, batch_size=4, num_workers=0, resize_ratio=1.0)
    plain = next(iter(data.train_dataloader()))["image"]
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **options)
    model = Reader()
    trainer.fit(model, datamodule=data)
    assert model.sums[0] == float(normalize(plain).double().sum())
    trainer.validate(model, data.val_dataloader(), verbose=False)  # a loader without the data module's hooks


class Own(lightning.LightningDataModule):
    """A data module of a user's own, which knows nothing of ours."""

    image_size = 8


def test_a_data_module_of_ones_own_says_what_it_can():
    tokenizer = SimpleNamespace(image_size=16, pyramid="1 2", downsampling=8)
    data = run_data(SimpleNamespace(datamodule=Own()))
    assert (data.batch_size, data.train_samples, data.holds_images) == (None, None, True)
    assert isinstance(data.image_data("who"), Own)
    with pytest.raises(UserError, match=r"data\.image_size 8: the tokenizer makes images of 16"):
        data.check_model(tokenizer, "hash")
    with pytest.raises(UserError, match=r"they make images of 16 pixels, but data\.image_size is 8"):
        data.check_model(tokenizer)
    loaders = run_data(SimpleNamespace())
    loaders.check_model(tokenizer, "hash")
    with pytest.raises(UserError, match="who: needs the run's data module, not bare loaders"):
        loaders.image_data("who")
    ours = module_of("anywhere")
    assert run_data(SimpleNamespace(datamodule=ours)) is ours and ours.image_data("who") is ours
