"""Whether a transformer speaks a tokenizer's tokens."""

from __future__ import annotations

from typing import Protocol

from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import ScalePyramid
from mvar_lightning.tokenizer.tokenizer import MultiScaleTokenizer


class SpeaksTokens(Protocol):
    """What of a transformer has to agree with its tokenizer."""

    pyramid: ScalePyramid
    vocab_size: int
    code_dim: int


def check_pair(model: SpeaksTokens, tokenizer: MultiScaleTokenizer) -> None:
    """Raise `UserError` where the tokenizer is not of the kind that the model was made for."""
    for name, ours, theirs in (
        ("scales", list(model.pyramid.sides), list(tokenizer.pyramid.sides)),
        ("vocab_size", model.vocab_size, tokenizer.vocab_size),
        ("code_dim", model.code_dim, tokenizer.code_dim),
    ):
        if ours != theirs:
            raise UserError(
                f"{name}: the model has {ours}, the tokenizer {theirs}; take the tokenizer it was trained with"
            )
