"""mvar_lightning: train and study next-scale (visual autoregressive) image models.

A tour, on the trained model of handwritten digits that ships:

    >>> from mvar_lightning import edit, generate, load, show
    >>> model, tokenizer = load("digits")                     # or a run's folder, or a checkpoint
    >>> made = generate(model, tokenizer, 3, seeds=range(8))  # eight images of class 3, and their tokens
    >>> show(made.images).save("threes.png")                  # in a notebook, made shows itself
    >>> after = tokenizer.progressive(made.tokens)            # the images after each scale, in [-1, 1]

To go on:

- an image becomes tokens and back: `MultiScaleTokenizer` (encode, decode, progressive), `ScalePyramid`
- tokens become logits: `NextScaleTransformer`, chosen on its axes:
  who sees whom `AttentionStrategy` (`FullAttention`, `AdjacentAttention`, `SlidingWindowAttention`,
  `SpatialAttention`), what is remembered `History`, which block `BlockDesign`
- training under Lightning: `TokenizerModule`, `VARModule`, `MVARModule`, `MarkovVARModule`, with
  `ShardsDataModule`; what is minimized: `Objective`
- parts of images painted anew: `edit`; fewer bits: `quantize`; released weights: `import_official`
- all jobs of the command `mvar`: docs/python.md. A user's mistake is a `UserError` of one line.

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
    "mvar_lightning.tools.drawing": ("normalize", "show", "to_pil"),
    "mvar_lightning.attention": (
        "AdjacentAttention",
        "AttentionStrategy",
        "CachePolicy",
        "FullAttention",
        "KeepAll",
        "ScaleKV",
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
    "mvar_lightning.sampling.refinement": ("InPasses",),
    "mvar_lightning.checkpoints.refinement": ("load_refinement", "save_refinement"),
    "mvar_lightning.checkpoints": ("export_official", "import_official", "load", "save"),
    "mvar_lightning.data.image_data": ("ShardsDataModule",),
    "mvar_lightning.data.token_data": ("TokenShards", "TokenShardsDataModule"),
    "mvar_lightning.training.objectives": ("CCA", "CrossEntropy", "Distillation", "Objective", "WeightedScales"),
    "mvar_lightning.training.refinement": ("RefinementModule",),
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
