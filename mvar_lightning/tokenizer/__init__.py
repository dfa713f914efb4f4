"""The multi-scale VQ tokenizer: autoencoder, quantizer, losses."""

from __future__ import annotations

from mvar_lightning.tokenizer.adversarial import AdversarialLoss
from mvar_lightning.tokenizer.diff_augment import Augmentation, DiffAugment
from mvar_lightning.tokenizer.discriminator import Discriminator, FrozenFeatureDiscriminator, PatchDiscriminator
from mvar_lightning.tokenizer.entropy import EntropyLoss
from mvar_lightning.tokenizer.fingerprint import fingerprint, fingerprint_of
from mvar_lightning.tokenizer.gan_losses import GANLoss, HingeLoss, NonSaturatingLoss
from mvar_lightning.tokenizer.losses import L1Loss, L2Loss, LossPart, QuantizerLoss
from mvar_lightning.tokenizer.pairing import check_pair
from mvar_lightning.tokenizer.perceptual import LPIPS, PerceptualLoss
from mvar_lightning.tokenizer.quantizer import MultiScaleQuantizer, QuantizerOutput
from mvar_lightning.tokenizer.remedies import CodebookRemedy, DataDependentInit, DeadCodeRestart
from mvar_lightning.tokenizer.scale_dropout import check_scale_dropout, draw_kept_scales
from mvar_lightning.tokenizer.tokenizer import MultiScaleTokenizer, TokenizerOutput
from mvar_lightning.tokenizer.usage import CodebookUsage

__all__ = [
    "LPIPS",
    "AdversarialLoss",
    "Augmentation",
    "CodebookRemedy",
    "CodebookUsage",
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
