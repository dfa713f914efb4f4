"""mvar_lightning: train and study next-scale (visual autoregressive) image models.

Public names load on first use (PEP 562), so that `mvar --help` need not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mvar_lightning.moved import install

__version__ = "0.2.0"

_ROOMS = {
    "mvar_lightning.errors": ("UserError",),
    "mvar_lightning.pyramid": ("ScalePyramid",),
    "mvar_lightning.tools.drawing": ("normalize",),
    "mvar_lightning.attention": (
        "AdjacentAttention",
        "AttentionStrategy",
        "FullAttention",
        "SlidingWindowAttention",
        "SpatialAttention",
    ),
    "mvar_lightning.tokenizer": (
        "AdversarialLoss",
        "DataDependentInit",
        "DeadCodeRestart",
        "DiffAugment",
        "EntropyLoss",
        "FrozenFeatureDiscriminator",
        "HingeLoss",
        "L1Loss",
        "L2Loss",
        "MultiScaleTokenizer",
        "NonSaturatingLoss",
        "PatchDiscriminator",
        "PerceptualLoss",
        "QuantizerLoss",
    ),
    "mvar_lightning.transformer": (
        "BlockDesign",
        "GlobalHistory",
        "History",
        "LlamaBlocks",
        "MixedHistory",
        "NextScaleTransformer",
        "NoHistory",
        "SlidingWindowHistory",
        "VARBlocks",
    ),
    "mvar_lightning.transformer.quantized": ("quantize",),
    "mvar_lightning.sampling": ("BestOfScales", "MostLikely", "Selector", "edit", "generate"),
    "mvar_lightning.checkpoints": ("export_official", "import_official", "load", "save"),
    "mvar_lightning.data.image_data": ("ShardsDataModule",),
    "mvar_lightning.data.token_data": ("TokenShards", "TokenShardsDataModule"),
    "mvar_lightning.training.objectives": ("CCA", "CrossEntropy", "Distillation", "Objective", "WeightedScales"),
    "mvar_lightning.training": ("MarkovVARModule", "MVARModule", "ScorerModule", "TokenizerModule", "VARModule"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = sorted([*_ROOM_OF, "__version__"])

install()


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'mvar_lightning' has no attribute {name!r}")
    return getattr(import_module(_ROOM_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
