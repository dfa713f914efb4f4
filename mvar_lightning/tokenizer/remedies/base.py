"""What a remedy against unused codes is: two hooks of a training step.

Shapes: B batch, HW pixels.
"""

from __future__ import annotations

from abc import ABC

import torch
from torch import Tensor, nn

from mvar_lightning.tokenizer.tokenizer import MultiScaleTokenizer, TokenizerOutput


class CodebookRemedy(nn.Module, ABC):
    """Looks after the codebook of a tokenizer in training.

    Both hooks run on every process, in training only. Collectives are inside; afterwards the codebook is the same on
    all processes. State lives in buffers, so that it is in the checkpoint and a resume is exact.
    """

    def attach(self, tokenizer: MultiScaleTokenizer) -> None:
        """Called once, when the tokenizer is there: make the buffers that depend on its sizes."""

    def before_step(self, tokenizer: MultiScaleTokenizer, image_B3HW: Tensor) -> None:
        """Called before the forward of a batch."""

    def after_step(
        self, tokenizer: MultiScaleTokenizer, output: TokenizerOutput, optimizer: torch.optim.Optimizer
    ) -> None:
        """Called after the step of the tokenizer's optimizer, with the last forward's output.

        May rewrite codes, and then resets their moments in the optimizer.
        """
