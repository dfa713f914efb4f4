"""TODO."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mvar_lightning.errors import UserError

if TYPE_CHECKING:
    import torch

    from mvar_lightning.data.image_data import ShardsDataModule
    from mvar_lightning.metrics import FeatureExtractor
    from mvar_lightning.tokenizer.perceptual import LPIPS


def data_of(args: argparse.Namespace, image_size: int, split: str, workers: int = 0) -> ShardsDataModule:
    """The shards of ``--data``, cut as validation does. Raises UserError for an empty split or a missing shard."""
    from mvar_lightning.data.image_data import ShardsDataModule

    data = ShardsDataModule(
        args.data,
        image_size,
        batch_size=args.batch_size,
        num_workers=workers,
        resize_ratio=args.resize_ratio,
        val_crop=args.crop,
    )
    if not data.index.split(split).samples:
        held = ", ".join(name for name, part in data.index.splits.items() if part.samples)
        raise UserError(f"--split {split}: {args.data} has no such images; it has {held or 'none at all'}")
    data.setup("validate")
    return data


def lpips_of(args: argparse.Namespace, device: torch.device) -> LPIPS | None:
    """The perceptual distance, where its weights are given."""
    if args.lpips is None:
        return None
    from mvar_lightning.tokenizer.perceptual import LPIPS

    return LPIPS(args.lpips).to(device)


def extractor_of(
    args: argparse.Namespace,
    data: ShardsDataModule | None,
    out: Path,
    device: torch.device,
    others: str = "inception, a TorchScript file, or none",
) -> FeatureExtractor | None:
    """The features that a Frechet distance compares, none for ``none``.

    A classifier of the data is trained where there is none yet; ``out`` is a folder for it where the data's may not be
    written; ``others`` says in messages what can be chosen instead.
    Raises UserError for missing files or data that no classifier can be trained on.
    """
    from mvar_lightning.metrics.features import INCEPTION_FILE, InceptionFeatures, TorchScriptFeatures

    name = args.features
    if args.feature_size is not None and name in ("none", "data", "inception"):
        raise UserError(f"--feature-size: is for TorchScript files alone, not for --features {name}")
    if name == "none":
        return None
    if name == "data":
        return _classifier_features(data, out, device, others)
    if name == "inception":
        return InceptionFeatures(str(Path("weights") / INCEPTION_FILE))
    if Path(name).name == INCEPTION_FILE:
        return InceptionFeatures(name)
    return TorchScriptFeatures(name, size=args.feature_size)


def holds_shards(path: Path) -> bool:
    """Whether a reference is a shard folder, or is to become one (embedded data), rather than pictures or a file."""
    return path.suffix.lower() != ".npz" and (not path.is_dir() or (path / "index.json").is_file())


def features_of(args: argparse.Namespace, size: tuple[int, int], out: Path, device: torch.device) -> FeatureExtractor:
    """The features of generated images of one size, on their device.

    A classifier is of the shards of ``--data``, else of the reference. Raises UserError as `extractor_of`.
    """
    from mvar_lightning.data.image_data import ShardsDataModule

    data = None
    path = args.data or (args.reference if holds_shards(Path(args.reference)) else None)
    if args.features == "data" and path is not None:
        cutting = {"resize_ratio": args.resize_ratio, "val_crop": args.crop}
        data = ShardsDataModule(path, size[0], batch_size=64, num_workers=args.workers, **cutting)
        data.setup("validate")
    extractor = extractor_of(args, data, out, device, "inception or a TorchScript file")  # none leaves no number
    assert extractor is not None
    return extractor.to(device)


def _classifier_features(
    data: ShardsDataModule | None, out: Path, device: torch.device, others: str
) -> FeatureExtractor:
    from lightning.pytorch.utilities.seed import isolate_rng

    from mvar_lightning.evaluation.data_classifier import classifier_file
    from mvar_lightning.metrics import ClassifierFeatures
    from mvar_lightning.metrics.classifier import NothingToLearnFrom

    if data is None:
        raise UserError(
            "--features data: its classifier needs a shard folder; give one with --data, or choose "
            "--features inception or a TorchScript file"
        )
    if not data.index.split("train").samples or not data.index.split("val").samples:
        raise UserError(
            f"--features data: {data.path} needs both splits to train and check a classifier; "
            f"choose --features {others}"
        )
    try:
        with isolate_rng():
            return ClassifierFeatures(str(classifier_file(data, out, device)))
    except NothingToLearnFrom as error:  # its own words speak of the batches of a recipe
        raise UserError(
            f"--features data: {data.path} has too few training images for a classifier "
            f"({data.index.split('train').samples}); choose --features {others}"
        ) from error
