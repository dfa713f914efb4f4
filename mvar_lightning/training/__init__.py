"""The LightningModules: a tokenizer's, a scorer's, and one of next-scale models with the families as its defaults."""

from mvar_lightning.training.distributed import FullySharded
from mvar_lightning.training.next_scale import MarkovVARModule, MVARModule, NextScaleModule, VARModule
from mvar_lightning.training.scorer import ScorerModule
from mvar_lightning.training.tokenizer import TokenizerModule

__all__ = [
    "FullySharded",
    "MVARModule",
    "MarkovVARModule",
    "NextScaleModule",
    "ScorerModule",
    "TokenizerModule",
    "VARModule",
]
