"""What happens around training: pictures, metrics, speed, guards, averaged weights. Used by name in recipes."""

from __future__ import annotations

from mvar_lightning.callbacks.ema import EMA
from mvar_lightning.callbacks.last_checkpoint import LastCheckpoint
from mvar_lightning.callbacks.loggers import ScaleCharts
from mvar_lightning.callbacks.metrics import ReconstructionMetrics
from mvar_lightning.callbacks.monitors import (
    GradientNorm,
    NonFiniteLossGuard,
    ProgressLines,
    Throughput,
    WritableRunFolder,
)
from mvar_lightning.callbacks.run_pictures import (
    AttentionMaskPicture,
    CoarseToFine,
    ReconstructionGrid,
    ReconstructionStrips,
    SampleGrid,
)
from mvar_lightning.callbacks.sample_metrics import SampleMetrics

__all__ = [
    "EMA",
    "AttentionMaskPicture",
    "CoarseToFine",
    "GradientNorm",
    "LastCheckpoint",
    "NonFiniteLossGuard",
    "ProgressLines",
    "ReconstructionGrid",
    "ReconstructionMetrics",
    "ReconstructionStrips",
    "SampleGrid",
    "SampleMetrics",
    "ScaleCharts",
    "Throughput",
    "WritableRunFolder",
]
