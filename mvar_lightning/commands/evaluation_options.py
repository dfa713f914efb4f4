"""What `mvar evaluate`, `reconstruct` and `analyze` share: how images are cut, and what they are compared by."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mvar_lightning.errors import UserError

if TYPE_CHECKING:
    import torch

    from mvar_lightning.data.modules import ShardsDataModule
    from mvar_lightning.metrics import FeatureExtractor
    from mvar_lightning.tokenizer.perceptual import LPIPS


def add_cutting(parser: argparse.ArgumentParser) -> None:
    """Arguments that say how images are cut to size."""
    parser.add_argument("--crop", default="center", choices=("center", "adm"), help="of each image (center)")
    parser.add_argument(
        "--resize-ratio",
        type=float,
        default=1.125,
        metavar="R",
        help="shorter side before the crop, over the image size; 1.0 for digits (1.125)",
    )


def add_features(parser: argparse.ArgumentParser) -> None:
    """Arguments that say what images are compared by."""
    parser.add_argument(
        "--features",
        default="data",
        metavar="data|inception|none|FILE",
        help="of Frechet distances: a classifier trained on these shards (data); Inception (weights/NAME.pth, or its "
        "path); a TorchScript file; none leaves them out",
    )
    parser.add_argument("--feature-size", type=int, metavar="N", help="resize images for a TorchScript file")
    parser.add_argument("--lpips", metavar="FILE", help="VGG weights; without them LPIPS is left out")


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Raise UserError for a number below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")


def data_of(args: argparse.Namespace, image_size: int, split: str, workers: int = 0) -> ShardsDataModule:
    """The shards of ``--data``, cut as validation does. Raises UserError for an empty split or a missing shard."""
    from mvar_lightning.data.modules import ShardsDataModule

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
    args: argparse.Namespace, data: ShardsDataModule, out: Path, device: torch.device
) -> FeatureExtractor | None:
    """The features that a Frechet distance compares, none for ``none``.

    A classifier of the data is trained where there is none yet; ``out`` is a folder for it where the data's may not be
    written. Raises UserError for missing files or data that no classifier can be trained on.
    """
    from mvar_lightning.metrics.features import INCEPTION_FILE, InceptionFeatures, TorchScriptFeatures

    name = args.features
    if args.feature_size is not None and name in ("none", "data", "inception"):
        raise UserError(f"--feature-size: is for TorchScript files alone, not for --features {name}")
    if name == "none":
        return None
    if name == "data":
        return _classifier_features(data, out, device)
    if name == "inception":
        return InceptionFeatures(str(Path("weights") / INCEPTION_FILE))
    if Path(name).name == INCEPTION_FILE:
        return InceptionFeatures(name)
    return TorchScriptFeatures(name, size=args.feature_size)


def _classifier_features(data: ShardsDataModule, out: Path, device: torch.device) -> FeatureExtractor:
    from lightning.pytorch.utilities.seed import isolate_rng

    from mvar_lightning.callbacks.judge import classifier_file
    from mvar_lightning.metrics import ClassifierFeatures

    if not data.index.split("train").samples or not data.index.split("val").samples:
        raise UserError(
            f"--features data: {data.path} needs both splits to train and check a classifier; "
            "choose --features inception, a TorchScript file, or none"
        )
    with isolate_rng():
        return ClassifierFeatures(str(classifier_file(data, out, device)))
