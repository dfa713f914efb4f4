"""A hash that says which tokenizer tokens belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from mvar_lightning.tokenizer.tokenizer import MultiScaleTokenizer

TRAINING_ONLY = frozenset({"beta", "codebook_std"})
"""Entries of the configuration that change no token and no image once the weights are there."""

UNCHANGED = {"codes": "euclidean"}
"""Entries that came later, with the value that leaves a tokenizer as it was: old hashes stay valid."""


def fingerprint(tokenizer: MultiScaleTokenizer) -> str:
    """SHA-256 (64 hexadecimal digits) of what turns images into tokens and back.

    Covers the configuration and the parameters as float32 in the order of their names, so it is the same on any device
    and for any way of building the module; buffers (running statistics) do not count.
    """
    return fingerprint_of(tokenizer, dict(tokenizer.named_parameters()))


def fingerprint_of(tokenizer: MultiScaleTokenizer, state: Mapping[str, Tensor]) -> str:
    """The fingerprint that ``tokenizer`` would have with the parameters in ``state`` (which may hold more)."""
    config = {
        key: value
        for key, value in tokenizer.config.items()
        if key not in TRAINING_ONLY and not (key in UNCHANGED and value == UNCHANGED[key])
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(name for name, _ in tokenizer.named_parameters()):
        parameter = state[name]
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        array = parameter.detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(array.astype("<f4", copy=False).tobytes())
    return digest.hexdigest()
