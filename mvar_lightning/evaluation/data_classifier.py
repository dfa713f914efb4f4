"""The data set's own classifier, trained once and kept beside the shards."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from mvar_lightning.data.image_data import ShardsDataModule
from mvar_lightning.data.reading.loader import loading
from mvar_lightning.errors import UserError
from mvar_lightning.metrics.classifier import STEP_IMAGES, DatasetClassifier, save_classifier, train_classifier

STEPS = 300

TRUSTED_ACCURACY = 0.9
"""Below this validation accuracy the log warns that class consistency says little."""


def classifier_file(data: Any, fallback: Path, device: torch.device) -> Path:
    """The file of a data set's classifier, trained in this process if it is not there; ``fallback`` is a folder for it
    where the data may not be written. Draws random numbers."""
    files = _candidates(data, fallback)
    return next((file for file in files if file.is_file()), None) or _train(data, device, files)


class _Alone(ShardsDataModule):
    """All images in one order, whatever the process: the others wait."""

    def rank_and_world_size(self) -> tuple[int, int]:
        return 0, 1


def fit_classifier(data: Any, device: torch.device, steps: int) -> DatasetClassifier:
    """A classifier of this many steps, trained on the images of a data module, in this process alone.

    Raises:
        NothingToLearnFrom: too few training images.
    """
    if isinstance(data, ShardsDataModule):  # else the features would hang on the settings of who came first
        batch = min(STEP_IMAGES, data.index.split("train").samples)
        cut: dict[str, Any] = {"resize_ratio": data.resize_ratio, "val_crop": data.val_crop}
        data = _Alone(data.path, data.image_size, batch, num_workers=0, **cut)
    with loading(data.train_dataloader()) as train, loading(data.val_dataloader()) as val:
        return train_classifier(train, val, data.num_classes, data.image_size, steps=steps, device=device)


def _candidates(data: Any, fallback: Path) -> list[Path]:
    index = Path(data.path) / "index.json"
    if not index.is_file():
        raise UserError(f"data {data.path}: no index.json; make the shards first (mvar shards make SRC {data.path})")
    cut = f"{getattr(data, 'resize_ratio', '')} {getattr(data, 'val_crop', '')}"
    key = hashlib.sha256(index.read_bytes() + cut.encode()).hexdigest()[:16]
    name = f"{key}-{data.image_size}.safetensors"
    return [Path(data.path) / "classifier" / name, fallback / "classifier" / name]


def _train(data: Any, device: torch.device, files: list[Path]) -> Path:
    rank_zero_info(f"Training a small classifier on {data.path} (once; metrics use its features) ...")
    start = time.perf_counter()
    classifier = fit_classifier(data, device, steps=STEPS)
    accuracy, images = classifier.score.accuracy, classifier.score.images
    seconds = time.perf_counter() - start
    rank_zero_info(f"... {seconds:.0f} s, {accuracy:.1%} of {images} validation images right")
    if accuracy < TRUSTED_ACCURACY:
        rank_zero_info("The classifier errs often: class consistency says little, prefer features of your own.")
    file = _first_writable(files)
    save_classifier(classifier.to(torch.device("cpu")), file)
    return file


def _first_writable(files: list[Path]) -> Path:
    for file in files:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(file.parent, os.W_OK):
            return file
    raise UserError(f"classifier {files[0]}: neither the data's nor the run's folder can be written; change either")
