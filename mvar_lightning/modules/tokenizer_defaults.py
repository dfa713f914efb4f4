"""What a tokenizer is trained with where nothing is said.

VAR's plain form loses codes at every scale (docs/tokenizer.md).
"""

from __future__ import annotations

from collections.abc import Sequence

from mvar_lightning.tokenizer import (
    CodebookRemedy,
    DataDependentInit,
    DeadCodeRestart,
    EntropyLoss,
    L1Loss,
    L2Loss,
    LossPart,
    QuantizerLoss,
)


def default_losses() -> list[LossPart]:
    return [L1Loss(), L2Loss(), QuantizerLoss(), EntropyLoss(0.1)]


def default_remedies(init_from: str | None, frozen: Sequence[str]) -> list[CodebookRemedy]:
    """None where codes come trained or are held still: what new images leave unused is not the tokenizer's loss."""
    if init_from is not None or "quantizer" in frozen:
        return []
    return [DataDependentInit(), DeadCodeRestart()]
