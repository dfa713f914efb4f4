"""What a remedy against unused codes is: hooks of a training step.

Shapes: B batch, HW pixels.
"""

from __future__ import annotations

from abc import ABC

import torch
from torch import Tensor, nn

from mvar_lightning.tokenizer.tokenizer import MultiScaleTokenizer, TokenizerOutput


class CodebookRemedy(nn.Module, ABC):
    """Looks after the codebook of a tokenizer in training.

    The hooks run on every process, in training only. Collectives are inside; afterwards the codebook is the same on
    all processes, and the one that a single process would have whose batch is theirs one
    after the other. State lives in buffers, so that it is in the checkpoint and a resume is exact.
    """

    def attach(self, tokenizer: MultiScaleTokenizer) -> None:
        """Called once, when the tokenizer is there: make the buffers that depend on its sizes."""

    def before_step(
        self, tokenizer: MultiScaleTokenizer, image_B3HW: Tensor, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Called before the forward of a batch, with the tokenizer's optimizer."""

    def between_batches(self, tokenizer: MultiScaleTokenizer, output: TokenizerOutput) -> None:
        """Called after each batch of an accumulated step but the last, with its output."""

    def after_step(
        self, tokenizer: MultiScaleTokenizer, output: TokenizerOutput, optimizer: torch.optim.Optimizer
    ) -> None:
        """Called after the step of the tokenizer's optimizer, with the last forward's output.

        May rewrite codes, and then resets their moments in the optimizer.
        """

    def after_fit(self) -> None:
        """Called at the end of the run: tell what there was no occasion to do."""
