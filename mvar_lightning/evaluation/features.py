"""What an evaluation compares images by, and the shards it reads: opened as the options or a request name them."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch.utilities.seed import isolate_rng

from mvar_lightning.data.image_data import ShardsDataModule
from mvar_lightning.errors import UserError
from mvar_lightning.evaluation.data_classifier import classifier_file
from mvar_lightning.metrics import ClassifierFeatures, FeatureExtractor, InceptionFeatures, TorchScriptFeatures
from mvar_lightning.metrics.classifier import NothingToLearnFrom
from mvar_lightning.metrics.features import INCEPTION_FILE
from mvar_lightning.tokenizer import perceptual

OTHER_SPLIT = {"val": "train", "train": "val"}
"""Where other real images come from, whose distance is the floor of what can be reached."""


def open_data(
    path: str, image_size: int, split: str, batch_size: int, resize_ratio: float, crop: str, workers: int = 0
) -> ShardsDataModule:
    """Shards, cut as validation does. Raises UserError for an empty split or a missing shard."""
    data = ShardsDataModule(
        path, image_size, batch_size=batch_size, num_workers=workers, resize_ratio=resize_ratio, val_crop=crop
    )
    if not data.index.split(split).samples:
        held = ", ".join(name for name, part in data.index.splits.items() if part.samples)
        raise UserError(f"``split`` {split}: {path} has no such images; it has {held or 'none at all'}")
    data.setup("validate")
    return data


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
