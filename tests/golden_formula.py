"""The formula that makes weights and inputs of the golden numbers, and readers for their files (tests/golden)."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
CASES = ("var_tiny", "var_tiny_shared_adaln", "mvar_tiny", "markov_var_tiny")


def load_case(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Hyperparameters and arrays of one golden case."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return json.loads((GOLDEN / f"{name}.json").read_text()), dict(arrays)


def random_state(name: str, seed: int) -> np.random.RandomState:
    return np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)


def normal(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A float32 input made from its name."""
    return torch.from_numpy(random_state(name, seed).standard_normal(shape).astype(np.float32))


def integers(name: str, high: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """An int64 input in [0, high) made from its name."""
    return torch.from_numpy(random_state(name, seed).randint(0, high, shape).astype(np.int64))


def weight(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The float32 value of one parameter of the reference."""
    x = random_state(key, seed).standard_normal(shape)
    if key.endswith("scale_mul_1H11"):
        value = math.log(4) + 0.1 * x
    elif len(shape) == 1:
        value = 1 + 0.1 * x if key.endswith("weight") else 0.05 * x
    elif any(part in key for part in ("embedding", "class_emb", "lvl_embed.weight")):
        value = 0.5 * x if "embedding" in key else 0.3 * x
    elif "pos" in key:
        value = 0.3 * x
    else:
        value = x / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def weights(shapes: dict[str, list[int]], seed: int, left_at_init: list[str]) -> dict[str, Tensor]:
    """All parameters that the formula sets, by the reference's names."""
    return {key: weight(key, tuple(shape), seed) for key, shape in shapes.items() if key not in left_at_init}


def sliced(array: Tensor, name: str, case: dict[str, Any]) -> Tensor:
    """Thin an array the way the file says it was thinned."""
    text = case["slices"].get(name)
    if text is None:
        return array
    parts = [slice(*[int(p) if p else None for p in part.split(":")]) for part in text.strip("[]").split(",")]
    return array[tuple(parts)]
