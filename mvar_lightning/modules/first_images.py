"""Data that no tokenizer can learn much from: told at a run's first batch, with or without remedies.

Shapes: B batch, HW pixels.
"""

from __future__ import annotations

import logging
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from mvar_lightning.tokenizer import MultiScaleTokenizer

log = logging.getLogger(__name__)


@rank_zero_only
def tell_of_poor_data(trainer: L.Trainer, tokenizer: MultiScaleTokenizer, image_B3HW: Tensor) -> None:
    """Warn of constant images, a single one, and a codebook larger than all training images could fill."""
    if bool((image_B3HW.amax((2, 3)) == image_B3HW.amin((2, 3))).all()):
        log.warning(
            f"images: all {len(image_B3HW)} of the first batch are of one color each; "
            "a tokenizer learns nothing from them: check the data if this is not meant"
        )
    images = _number_of_images(trainer)
    if images is None:
        return
    if images == 1:
        log.warning("data: a single training image; the tokenizer will know this one alone, add images")
    tokens = images * tokenizer.pyramid.num_tokens
    if tokens < tokenizer.vocab_size:
        log.warning(
            f"vocab_size {tokenizer.vocab_size}: {images} training images have only {tokens} tokens and cannot use all "
            "codes; take a smaller vocab_size or more images"
        )


def _number_of_images(trainer: L.Trainer) -> int | None:
    """None where the data does not say."""
    samples = getattr(getattr(trainer, "datamodule", None), "train_samples", None)
    if samples is not None:
        return int(samples)
    loader: Any = trainer.train_dataloader
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        return None
