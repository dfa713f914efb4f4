"""Shards to batches: where shards lie and how they are opened, their samples, the order of an epoch, the loader."""

from __future__ import annotations

from typing import Any

from mvar_lightning.moved import old_module

OLD_NAMES = ("Batch", "ImageReader", "RawSample", "Sample", "SampleReader", "SmallSetMemory", "read_shard")
"""What the file `data/reading.py` held, before this room took its name."""


def __getattr__(name: str) -> Any:
    if name in OLD_NAMES:
        return getattr(old_module(__name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
