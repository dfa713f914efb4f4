"""The next-scale transformer and its axes: block designs and histories (attention strategies live next door)."""

from mvar_lightning.transformer.blocks import BlockDesign, LlamaBlocks, VARBlocks
from mvar_lightning.transformer.history import GlobalHistory, History, MixedHistory, NoHistory, SlidingWindowHistory
from mvar_lightning.transformer.transformer import Inputs, NextScaleTransformer, SamplingState

__all__ = [
    "BlockDesign",
    "GlobalHistory",
    "History",
    "Inputs",
    "LlamaBlocks",
    "MixedHistory",
    "NextScaleTransformer",
    "NoHistory",
    "SamplingState",
    "SlidingWindowHistory",
    "VARBlocks",
]
