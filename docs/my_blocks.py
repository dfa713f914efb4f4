"""Blocks of one's own, from outside of the package: Markov-VAR's, with VAR's learnt positions (docs/analyses.md)."""

from __future__ import annotations

from torch import nn

from mvar_lightning import LlamaBlocks, ScalePyramid
from mvar_lightning.transformer.positions import LearnedPositions


class LlamaBlocksWithPositions(LlamaBlocks):
    """Rotary positions inside attention as before, and a learnt vector for every token instead of one for its level."""

    def make_positions(self, pyramid: ScalePyramid, width: int) -> nn.Module:
        return LearnedPositions(pyramid, width)
