"""The multi-scale VQ tokenizer: autoencoder, quantizer, losses."""

from __future__ import annotations

from mvar_lightning.tokenizer.fingerprint import fingerprint, fingerprint_of
from mvar_lightning.tokenizer.losses import L1Loss, L2Loss, LossPart, QuantizerLoss
from mvar_lightning.tokenizer.pairing import check_pair
from mvar_lightning.tokenizer.quantizer import MultiScaleQuantizer, QuantizerOutput
from mvar_lightning.tokenizer.tokenizer import MultiScaleTokenizer, TokenizerOutput
from mvar_lightning.tokenizer.usage import CodebookUsage

__all__ = [
    "CodebookUsage",
    "L1Loss",
    "L2Loss",
    "LossPart",
    "MultiScaleQuantizer",
    "MultiScaleTokenizer",
    "QuantizerLoss",
    "QuantizerOutput",
    "TokenizerOutput",
    "check_pair",
    "fingerprint",
    "fingerprint_of",
]
