"""The published families: each names its defaults on the three axes and changes nothing else."""

from __future__ import annotations

from mvar_lightning.attention import AdjacentAttention, FullAttention, SpatialAttention
from mvar_lightning.modules.next_scale import NextScaleModule
from mvar_lightning.transformer import LlamaBlocks, NoHistory, SlidingWindowHistory, VARBlocks


class VARModule(NextScaleModule):
    """VAR (arXiv 2404.02905): full attention, no history, VAR's blocks."""

    default_attention = FullAttention()
    default_history = NoHistory()
    default_blocks = VARBlocks()


class MVARModule(NextScaleModule):
    """MVAR (arXiv 2505.12742): adjacent attention, a 7x7 neighborhood at the last two scales, VAR's blocks."""

    default_attention = SpatialAttention(kernel_size=7, scales=2)
    default_history = NoHistory()
    default_blocks = VARBlocks()


class MarkovVARModule(NextScaleModule):
    """Markov-VAR (arXiv 2511.23334): adjacent attention, a history window of three scales, LLaMA-style blocks."""

    default_attention = AdjacentAttention()
    default_history = SlidingWindowHistory(size=3)
    default_blocks = LlamaBlocks()
