"""Checkpoints: the published files in and out, the suite's own folders, Lightning's files, and initial weights.

Names load on first use: `checkpoints.source`, which a command asks before it starts to work, needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mvar_lightning.checkpoints.finetune import load_initial_weights
    from mvar_lightning.checkpoints.folder import is_released, load, load_tokenizer, save
    from mvar_lightning.checkpoints.official import export_official, import_official, import_tokenizer

_FILES = {
    "export_official": "official",
    "import_official": "official",
    "import_tokenizer": "official",
    "is_released": "folder",
    "load": "folder",
    "load_initial_weights": "finetune",
    "load_tokenizer": "folder",
    "save": "folder",
}

__all__ = [
    "export_official",
    "import_official",
    "import_tokenizer",
    "is_released",
    "load",
    "load_initial_weights",
    "load_tokenizer",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
