"""Metrics at validation: the numbers that come, how often, from what, and what they leave untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader

from mvar_lightning.callbacks import EMA, ReconstructionMetrics, SampleMetrics
from mvar_lightning.callbacks.metrics import ImageMetrics
from mvar_lightning.errors import UserError
from mvar_lightning.evaluation import features as judge_file
from mvar_lightning.metrics import (
    FeatureExtractor,
    FrechetDistance,
    Moments,
    StoredReference,
    as_saved,
    train_classifier,
)


class Colors(FeatureExtractor):
    """Mean of each color: three features, cheap."""

    def __init__(self) -> None:
        super().__init__("colors", 3)

    def extract(self, image_B3HW: Tensor) -> Tensor:
        return image_B3HW.mean(dim=(2, 3))


class Pixels(FeatureExtractor):
    """More features than images."""

    def __init__(self) -> None:
        super().__init__("pixels", 192)

    def extract(self, image_B3HW: Tensor) -> Tensor:
        return image_B3HW.flatten(1)


@pytest.fixture(autouse=True)
def quick_classifier(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Twenty steps are enough for three colors; the list counts trainings."""
    calls: list[int] = []

    def train(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return train_classifier(*args, **kwargs)

    monkeypatch.setattr(judge_file, "STEPS", (20, 20))
    monkeypatch.setattr(judge_file, "train_classifier", train)
    return calls


def test_sample_metrics_of_a_run(make_trainer: Any, module: Any, data: Any, quick_classifier: list[int]) -> None:
    metrics = SampleMetrics(num_images=30, batch_size=7)
    make_trainer(metrics).fit(module, datamodule=data)
    found = metrics.latest
    assert set(found) == {
        "val/fid_classifier",
        "val/fid_classifier_floor",
        "val/fid_floor_images",
        "val/fid_images",
        "val/fid_reference_images",
        "val/kid_classifier",
        "val/rfid_classifier",
        "val/class_consistency",
        "val/copying",
        "val/copying_p",
    }
    assert (found["val/fid_images"], found["val/fid_floor_images"], found["val/fid_reference_images"]) == (30, 30, 48)
    assert found["val/class_consistency"] == 1.0
    assert found["val/fid_classifier_floor"] < found["val/rfid_classifier"]
    assert len(quick_classifier) == 1


def test_labels_are_balanced_and_seeds_fixed(make_trainer: Any, module: Any, data: Any) -> None:
    make_trainer(SampleMetrics(Colors(), num_images=8, batch_size=5, consistency=False)).fit(module, datamodule=data)
    one_epoch = [([0, 1, 2, 0, 1], [0, 1, 2, 3, 4]), ([2, 0, 1], [5, 6, 7])]
    assert module.asked == one_epoch * 2


def test_numbers_are_to_stored_moments_where_there_are(
    make_trainer: Any, module: Any, data: Any, tmp_path: Path
) -> None:
    """As ADM's files: moments alone. Reconstructions are still compared with the images that they are of."""
    others = torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(3)) ** 2
    rows_NF, file = Colors()(as_saved(others)).double(), tmp_path / "adm.npz"
    np.savez(file, mu=rows_NF.mean(0).numpy(), sigma=torch.cov(rows_NF.T).numpy())
    metrics, without = (SampleMetrics(Colors(), num_images=40, consistency=False, reference=path)
                        for path in (str(file), None))  # fmt: skip
    make_trainer(metrics, without, max_epochs=2).fit(module, datamodule=data)
    distance = FrechetDistance(Colors())
    distance.update(others, real=True)
    distance.update(module.generate(torch.arange(40) % 3, list(range(40)))[0], real=False)
    assert metrics.latest["val/fid_colors"] == pytest.approx(distance.compute(), rel=1e-6)
    assert metrics.latest["val/fid_colors_floor"] > without.latest["val/fid_colors_floor"]
    for name in ("val/rfid_colors", "val/kid_colors"):
        assert metrics.latest[name] == without.latest[name]
    assert "val/fid_reference_images" not in metrics.latest, "such a file does not tell"


def test_a_wrong_reference_is_told_when_the_callback_is_made(tmp_path: Path) -> None:
    file = tmp_path / "moments.npz"
    StoredReference(Moments(torch.zeros(4), torch.eye(4).double()), extractor="inception").save(file)
    for extractor, path, words in (
        (None, file, "needs the extractor"),
        (Colors(), tmp_path / "none.npz", "no such file; ADM's are https://openaipublic.*VIRTUAL_imagenet256_labeled"),
        (Colors(), file, "made with inception, the extractor here is colors"),
    ):
        with pytest.raises(UserError, match=words):
            SampleMetrics(extractor, reference=str(path))
    StoredReference(Moments(torch.zeros(4), torch.eye(4).double())).save(file)
    with pytest.raises(UserError, match="moments are of 4 features, colors gives 3"):
        SampleMetrics(Colors(), reference=str(file))
    file.write_bytes(b"PK")
    with pytest.raises(UserError, match="not a readable npz"):
        SampleMetrics(Colors(), reference=str(file))


def test_few_images_are_warned_of(
    make_trainer: Any, module: Any, data: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = SampleMetrics(Pixels(), num_images=4, consistency=False)
    make_trainer(metrics, max_epochs=2).fit(module, datamodule=data)
    few = "48 reference and 4 generated images for 192 features"
    assert [record.message for record in caplog.records if few in record.message]
    caplog.clear()
    moments = tmp_path / "moments.npz"  # of enough images, but there are few to compare with them
    StoredReference(Moments(torch.zeros(192), torch.eye(192).double())).save(moments)
    metrics = SampleMetrics(Pixels(), num_images=4, consistency=False, reference=str(moments))
    make_trainer(metrics).fit(module, datamodule=data)
    assert [record.message for record in caplog.records if ": 4 generated images for 192 features" in record.message]


def test_numbers_equal_a_direct_computation(make_trainer: Any, module: Any, data: Any) -> None:
    metrics = SampleMetrics(Colors(), num_images=40, consistency=False)
    trainer = make_trainer(metrics, max_epochs=1)
    trainer.fit(module, datamodule=data)
    distance = FrechetDistance(Colors())
    real = torch.cat([(batch["image"] + 1) / 2 for batch in data.val_dataloader()])
    distance.update(real, real=True)
    distance.update(module.generate(torch.arange(40) % 3, list(range(40)))[0], real=False)
    assert metrics.latest["val/fid_colors"] == pytest.approx(distance.compute(), rel=1e-6)
    distance.reset_generated()
    tokenizer = module.tokenizer
    distance.update((tokenizer.decode(tokenizer.encode(real * 2 - 1)) + 1) / 2, real=False)
    assert metrics.latest["val/rfid_colors"] == pytest.approx(distance.compute(), rel=1e-6)
    assert float(trainer.callback_metrics["val/fid_colors"]) == pytest.approx(metrics.latest["val/fid_colors"])


def test_real_side_and_floor_are_made_once(make_trainer: Any, module: Any, data: Any) -> None:
    metrics = SampleMetrics(Colors(), num_images=10, consistency=False)
    make_trainer(metrics, max_epochs=3).fit(module, datamodule=data)
    assert metrics.distance.count(real=True) == 48
    assert data.loaders_made == 2  # the run's own, and the floor's


def test_every_nth_epoch_and_the_last(make_trainer: Any, module: Any, data: Any) -> None:
    metrics = SampleMetrics(Colors(), num_images=6, consistency=False, every_n_epochs=2)
    make_trainer(metrics, max_epochs=3).fit(module, datamodule=data)
    assert len(module.asked) == 2


def test_samples_come_from_averaged_weights(make_trainer: Any, module: Any, data: Any) -> None:
    metrics = SampleMetrics(Colors(), num_images=6, consistency=False)
    make_trainer(EMA(decay=0.9), metrics, max_epochs=1).fit(module, datamodule=data)
    assert module.bias_when_sampling == [float(module.model.linear.bias.sum())]


def test_training_is_not_changed(make_trainer: Any, make_module: Any, data: Any) -> None:
    losses = []
    for callbacks in ([], [SampleMetrics(num_images=6)]):
        module = make_module()
        torch.manual_seed(1)
        make_trainer(*callbacks).fit(module, datamodule=data)
        losses.append(module.losses)
    assert losses[0] == losses[1]


def test_classifier_is_kept_beside_the_data(
    make_trainer: Any, make_module: Any, data: Any, quick_classifier: list[int]
) -> None:
    for _ in range(2):
        make_trainer(SampleMetrics(num_images=4), max_epochs=1).fit(make_module(), datamodule=data)
    folder = Path(data.path) / "classifier"
    assert len(quick_classifier) == 1 and len(list(folder.iterdir())) == 2
    (Path(data.path) / "index.json").write_text(json.dumps({"format": "other data"}))
    make_trainer(SampleMetrics(num_images=4), max_epochs=1).fit(make_module(), datamodule=data)
    assert len(quick_classifier) == 2


def test_classifier_goes_to_the_run_where_data_is_read_only(
    make_trainer: Any, module: Any, data: Any, tmp_path: Path
) -> None:
    (Path(data.path) / "classifier").write_text("in the way")
    make_trainer(SampleMetrics(num_images=4), max_epochs=1).fit(module, datamodule=data)
    assert list((tmp_path / "run" / "classifier").glob("*.safetensors"))


def test_reconstruction_metrics(make_trainer: Any, module: Any, data: Any) -> None:
    metrics = ReconstructionMetrics(num_images=20)
    make_trainer(metrics).fit(module, datamodule=data)
    assert metrics.latest["val/rfid_images"] == 48 and metrics.distance.count(real=True) == 48
    assert set(metrics.latest) >= {"val/rfid_classifier", "val/fid_classifier_floor"}
    # gray reconstructions of colored classes: one class of three is guessed at best
    assert metrics.latest["val/reconstruction_consistency"] < 0.5
    assert not module.asked


def test_validate_and_test_without_fit(make_trainer: Any, module: Any, data: Any) -> None:
    metrics = SampleMetrics(Colors(), num_images=6, consistency=False)
    trainer = make_trainer(metrics)
    trainer.validate(module, datamodule=data, verbose=False)
    value = metrics.latest["val/fid_colors"]
    trainer.test(module, datamodule=data, verbose=False)
    assert metrics.latest["test/fid_colors"] == pytest.approx(value)


def test_fast_dev_run_is_short_and_keeps_nothing(make_trainer: Any, module: Any, data: Any) -> None:
    make_trainer(SampleMetrics(num_images=5000), ReconstructionMetrics(), fast_dev_run=True).fit(
        module, datamodule=data
    )
    assert sum(len(seeds) for _, seeds in module.asked) == 4
    assert not (Path(data.path) / "classifier").exists()


def test_tensorboard_gets_the_numbers(make_trainer: Any, module: Any, data: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="")
    metrics = SampleMetrics(Colors(), num_images=6, consistency=False)
    make_trainer(metrics, logger=logger).fit(module, datamodule=data)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("val/fid_colors")] == [5, 11]


def test_errors_name_the_way_out(make_trainer: Any, module: Any, data: Any) -> None:
    with pytest.raises(UserError, match="at least 2 images"):
        SampleMetrics(num_images=1)
    with pytest.raises(UserError, match="every_n_epochs 0"):
        SampleMetrics(every_n_epochs=0)
    with pytest.raises(UserError, match="needs the run's data module"):
        make_trainer(SampleMetrics()).validate(module, data.val_dataloader(), verbose=False)
    (Path(data.path) / "index.json").unlink()
    with pytest.raises(UserError, match="make the shards first"):
        make_trainer(SampleMetrics()).validate(module, datamodule=data, verbose=False)


@pytest.mark.parametrize("kind", [SampleMetrics, ReconstructionMetrics])
@pytest.mark.parametrize("extractor", [None, Colors()])
def test_a_single_image_goes_on_without_numbers_and_says_so_once(
    kind: type[ImageMetrics],
    extractor: Colors | None,
    make_trainer: Any,
    module: Any,
    data: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in ("train_dataloader", "val_dataloader"):
        one = getattr(data, name)().dataset[0]
        setattr(data, name, lambda one=one: DataLoader([one]))
    metrics = kind(extractor, num_images=4)
    make_trainer(metrics, max_epochs=3).fit(module, datamodule=data)
    said = [message for message in caplog.messages if "left out" in message]
    assert len(said) == 1 and said[0].startswith(kind.__name__) and not metrics.latest
    assert "add images" in said[0] or "raise num_images" in said[0]
