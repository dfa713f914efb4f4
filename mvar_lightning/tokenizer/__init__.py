"""The multi-scale VQ tokenizer: autoencoder, quantizer, losses."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mvar_lightning.tokenizer.adversarial import AdversarialLoss, GANLoss, HingeLoss, NonSaturatingLoss
from mvar_lightning.tokenizer.codebook import CodebookRemedy, DataDependentInit, DeadCodeRestart
from mvar_lightning.tokenizer.discriminator import (
    Augmentation,
    DiffAugment,
    Discriminator,
    FrozenFeatureDiscriminator,
    PatchDiscriminator,
)
from mvar_lightning.tokenizer.losses import EntropyLoss, L1Loss, L2Loss, LossPart, QuantizerLoss
from mvar_lightning.tokenizer.perceptual import LPIPS, PerceptualLoss
from mvar_lightning.tokenizer.quantizer import (
    MultiScaleQuantizer,
    QuantizerOutput,
    check_scale_dropout,
    draw_kept_scales,
)
from mvar_lightning.tokenizer.tokenizer import (
    MultiScaleTokenizer,
    TokenizerOutput,
    check_pair,
    fingerprint,
    fingerprint_of,
)


def __getattr__(name: str) -> Any:
    if name == "CodebookUsage":  # until 0.3: it has moved to the metrics
        return getattr(import_module("mvar_lightning.tokenizer.usage"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "LPIPS",
    "AdversarialLoss",
    "Augmentation",
    "CodebookRemedy",
    "DataDependentInit",
    "DeadCodeRestart",
    "DiffAugment",
    "Discriminator",
    "EntropyLoss",
    "FrozenFeatureDiscriminator",
    "GANLoss",
    "HingeLoss",
    "L1Loss",
    "L2Loss",
    "LossPart",
    "MultiScaleQuantizer",
    "MultiScaleTokenizer",
    "NonSaturatingLoss",
    "PatchDiscriminator",
    "PerceptualLoss",
    "QuantizerLoss",
    "QuantizerOutput",
    "TokenizerOutput",
    "check_pair",
    "check_scale_dropout",
    "draw_kept_scales",
    "fingerprint",
    "fingerprint_of",
]
