"""The LightningModules: the tokenizer's, and one next-scale module with the published families as its defaults."""

from mvar_lightning.training.distributed import FullySharded
from mvar_lightning.training.next_scale import MarkovVARModule, MVARModule, NextScaleModule, VARModule
from mvar_lightning.training.tokenizer import TokenizerModule

__all__ = ["FullySharded", "MVARModule", "MarkovVARModule", "NextScaleModule", "TokenizerModule", "VARModule"]
