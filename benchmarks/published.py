"""Published speed and memory, as data: what the tables of the papers say, on which hardware."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

MVAR_TABLE = "MVAR (arXiv 2505.12742): RTX 4090, batch 32"
MARKOV_TABLE = "Markov-VAR (arXiv 2511.23334): H200, batch 25"


@dataclass(frozen=True)
class Published:
    """One row of a table: figures by name of our measures (seconds, MiB, GFLOPs); None where the table has none."""

    architecture: str
    depth: int
    image_size: int
    source: str
    sample_decode_s: float
    peak_mib: float
    attention_gflops: float | None = None
    cache_mib: float | None = None
    train_s: float | None = None
    train_mib: float | None = None

    def figures(self) -> dict[str, Any]:
        names = ("architecture", "depth", "image_size", "source")
        return {name: value for name, value in asdict(self).items() if name not in names and value is not None}


def _mvar(architecture: str, depth: int, *figures: float | None) -> Published:
    seconds, gflops, cache, memory, train_s, train_mib = figures
    assert seconds is not None and memory is not None
    return Published(architecture, depth, 256, MVAR_TABLE, seconds, memory, gflops, cache, train_s, train_mib)


def _markov(architecture: str, image_size: int, seconds: float, gigabytes: float) -> Published:
    return Published(architecture, 24, image_size, MARKOV_TABLE, seconds, gigabytes * 1024)


PUBLISHED = (
    _mvar("var", 16, 0.34, 43.61, 5440, 10882, 0.99, 34319),
    _mvar("mvar", 16, 0.27, 35.44, 0, 3846, 0.61, 20676),
    _mvar("var", 20, 0.52, 81.52, 8500, 16244, 1.35, 48173),
    _mvar("mvar", 20, 0.45, 68.75, 0, 5432, 0.79, 27665),
    _mvar("var", 24, 0.81, 136.63, 12240, 23056, None, None),
    _mvar("mvar", 24, 0.71, 118.25, 0, 7216, 0.91, 38579),
    _markov("var", 256, 0.711, 12.4),
    _markov("markov_var", 256, 0.608, 4.7),
    _markov("var", 512, 1.335, 31.4),
    _markov("markov_var", 512, 1.261, 8.1),
    _markov("var", 1024, 5.891, 117.9),
    _markov("markov_var", 1024, 5.322, 19.1),
)

PREFIX_GFLOPS = {None: 43.61, 3: 41.54, 2: 40.15, 1: 37.84}
"""MVAR's ablation at d16, 256 px: GFLOPs of the attention blocks by how many last scales are seen (None: all)."""


def published_for(architecture: str, depth: int, image_size: int) -> list[Published]:
    """What the papers say about a model."""
    wanted = architecture, depth, image_size
    return [row for row in PUBLISHED if (row.architecture, row.depth, row.image_size) == wanted]
