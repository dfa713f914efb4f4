"""What an evaluation compares images by, opened as the options or a request name it.

Among the features are those of the data set's own classifier, trained once and kept beside the shards.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from mvar_lightning.data.image_data import ShardsDataModule
from mvar_lightning.data.reading.loader import loading
from mvar_lightning.errors import UserError
from mvar_lightning.metrics import ClassifierFeatures, FeatureExtractor, InceptionFeatures, TorchScriptFeatures
from mvar_lightning.metrics.classifier import (
    STEP_IMAGES,
    DatasetClassifier,
    NothingToLearnFrom,
    save_classifier,
    train_classifier,
)
from mvar_lightning.metrics.features import INCEPTION_FILE
from mvar_lightning.pyramid import short
from mvar_lightning.tokenizer import perceptual
from mvar_lightning.tools.remote import is_url

STEPS = (300, 6000)
"""Training steps of a data set's classifier, at least and at most."""

PASSES = 6
"""Between the two it sees each training image so often."""

TRUSTED_ACCURACY = 0.9
"""Below this validation accuracy the log warns that class consistency says little."""

OTHER_SPLIT = {"val": "train", "train": "val"}
"""Where other real images come from, whose distance is the floor of what can be reached."""


def open_lpips(weights: str | None, device: torch.device) -> perceptual.LPIPS | None:
    """The perceptual distance, where its weights are given."""
    return None if weights is None else perceptual.LPIPS(weights).to(device)


def open_features(
    name: str,
    size: int | None,
    data: ShardsDataModule | None,
    out: Path,
    device: torch.device,
    others: str = "inception, a TorchScript file, or none",
) -> FeatureExtractor | None:
    """The features that a Frechet distance compares, none for ``none``.

    Args:
        name: ``data``, ``inception``, ``none``, or a file.
        size: to which images are resized for a TorchScript file.
        data: whose classifier is taken, and trained where there is none yet.
        out: a folder for it where the data's may not be written.
        others: says in messages what can be chosen instead.

    Raises:
        UserError: missing files, or data that no classifier can be trained on.
    """
    if size is not None and name in ("none", "data", "inception"):
        raise UserError(f"``feature_size``: is for TorchScript files alone, not for ``features`` {name}")
    if name == "none":
        return None
    if name == "data":
        return _classifier_features(data, out, device, others)
    if name == "inception":
        return InceptionFeatures(str(Path("weights") / INCEPTION_FILE))
    if Path(name).name == INCEPTION_FILE:
        return InceptionFeatures(name)
    return TorchScriptFeatures(name, size=size)


def holds_shards(path: str | Path) -> bool:
    """Whether a reference is a shard folder, or is to become one (embedded data), rather than pictures or a file."""
    path = Path(path)
    return path.suffix.lower() != ".npz" and (not path.is_dir() or (path / "index.json").is_file())


def _classifier_features(
    data: ShardsDataModule | None, out: Path, device: torch.device, others: str
) -> FeatureExtractor:
    if data is None:
        raise UserError(
            "``features`` data: its classifier needs a shard folder; give one with ``data``, or choose "
            "``features`` inception or a TorchScript file"
        )
    if not data.index.split("train").samples or not data.index.split("val").samples:
        raise UserError(
            f"``features`` data: {data.path} needs both splits to train and check a classifier; "
            f"choose ``features`` {others}"
        )
    try:
        with isolate_rng():
            return ClassifierFeatures(str(classifier_file(data, out, device)))
    except NothingToLearnFrom as error:  # its own words speak of the batches of a recipe
        raise UserError(
            f"``features`` data: {data.path} has too few training images for a classifier "
            f"({data.index.split('train').samples}); choose ``features`` {others}"
        ) from error


# The classifier of a data set.


def classifier_file(data: Any, fallback: Path, device: torch.device) -> Path:
    """The file of a data set's classifier, trained in this process if it is not there; ``fallback`` is a folder for it
    where the data may not be written. Draws random numbers."""
    is_remote = is_url(data.path)
    index = Path(data.path) / "index.json"
    if not is_remote and not index.is_file():
        raise UserError(f"data {data.path}: no index.json; make the shards first (mvar shards make SRC {data.path})")
    cut = f"{getattr(data, 'resize_ratio', '')} {getattr(data, 'val_crop', '')}"
    content = data.index.to_json().encode() if is_remote else index.read_bytes()
    key = hashlib.sha256(content + cut.encode()).hexdigest()[:16]
    folders = (fallback,) if is_remote else (data.path, fallback)
    files = [Path(f) / "classifier" / f"{key}-{short(data.image_size)}.safetensors" for f in folders]
    for file in files:
        if file.is_file():
            return file
    rank_zero_info(f"Training a small classifier on {data.path} (once; metrics use its features) ...")
    start = time.perf_counter()
    classifier = fit_classifier(data, device)
    accuracy, seconds = classifier.score.accuracy, time.perf_counter() - start
    rank_zero_info(f"... {seconds:.0f} s, {accuracy:.1%} of {classifier.score.images} validation images right")
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


class _Alone(ShardsDataModule):
    """All images in one order, whatever the process: the others wait."""

    def rank_and_world_size(self) -> tuple[int, int]:
        return 0, 1


def fit_classifier(data: Any, device: torch.device, steps: int | None = None) -> DatasetClassifier:
    """A classifier trained on the images of a data module, in this process alone.

    Args:
        data: the module; of any but a `ShardsDataModule` the number of images is not known.
        device: where to train.
        steps: as many as the data deserve if not given: 6 passes, 300 steps at least and 6,000 at most.

    Raises:
        NothingToLearnFrom: too few training images.
    """
    if isinstance(data, ShardsDataModule):  # else the features would hang on the settings of who came first
        batch = min(STEP_IMAGES, data.index.split("train").samples)
        cut: dict[str, Any] = {"resize_ratio": data.resize_ratio, "val_crop": data.val_crop}
        if steps is None:
            steps = min(max(PASSES * data.index.split("train").samples // batch, STEPS[0]), STEPS[1])
        data = _Alone(data.path, data.image_size, batch, num_workers=0, channels=3, **cut)
    with loading(data.train_dataloader()) as train, loading(data.val_dataloader()) as val:
        return train_classifier(train, val, data.num_classes, data.image_size, steps=steps or STEPS[0], device=device)
