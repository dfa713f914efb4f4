"""The LightningModules: the tokenizer's, and one next-scale module with the published families as its defaults."""

from mvar_lightning.modules.families import MarkovVARModule, MVARModule, VARModule
from mvar_lightning.modules.next_scale import NextScaleModule
from mvar_lightning.modules.sharding import FullySharded
from mvar_lightning.modules.tokenizer_module import TokenizerModule

__all__ = ["FullySharded", "MVARModule", "MarkovVARModule", "NextScaleModule", "TokenizerModule", "VARModule"]
