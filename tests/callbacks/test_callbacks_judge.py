"""The data set's classifier: what its features are hangs on the data and the cut, not on who asked first."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_run import data_module, write_digits

from mvar_lightning.data.image_data import ShardsDataModule
from mvar_lightning.evaluation import features as judge


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(judge, "STEPS", (3, 3))
    return write_digits(tmp_path / "data")


def made_by(data: ShardsDataModule) -> Path:
    return judge.classifier_file(data, Path("unused"), torch.device("cpu"))


def test_the_same_for_all_settings_of_a_run(shards: Path) -> None:
    settings: list[dict[str, Any]] = [{}, {"batch_size": 2, "flip": True, "seed": 5, "crop": "center"}]
    weights = []
    for changes in settings:
        file = made_by(data_module(shards, **changes))
        weights.append(load_file(file))
        shutil.rmtree(shards / "classifier")
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_another_cut_makes_another_one(shards: Path) -> None:
    first = made_by(data_module(shards))
    assert made_by(data_module(shards, batch_size=2)) == first
    other = [made_by(data_module(shards, resize_ratio=1.0)), made_by(data_module(shards, val_crop="adm"))]
    assert len({first, *other}) == 3


def test_fewer_images_than_a_step_takes(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "STEP_IMAGES", 1000)
    assert made_by(data_module(shards)).is_file()
