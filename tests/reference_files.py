"""State dicts as the published references write them, made from the golden cases and the released shapes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from golden_formula import GOLDEN, load_case, weights
from torch import Tensor

from mvar_lightning.checkpoints import import_official
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.transformer import NextScaleTransformer


def releases() -> dict[str, dict[str, Any]]:
    """Every released checkpoint: architecture, scales, parameters, and shape by name (``state``)."""
    return json.loads(gzip.decompress((GOLDEN / "official" / "releases.json.gz").read_bytes()))


def buffer(key: str, shape: list[int], case: dict[str, Any]) -> Tensor:
    """A buffer as the reference's constructor makes it."""
    level_L = torch.tensor([scale for scale, side in enumerate(case["patch_nums"]) for _ in range(side * side)])
    if key == "lvl_1L":
        return level_L[None]
    if key == "attn_bias_for_masking":
        query, key_level = level_L[:, None], level_L[None, :]
        visible = query >= key_level if case["architecture"] == "var" else query == key_level
        return torch.where(visible, 0.0, -torch.inf)[None, None]
    return torch.zeros(shape)


def state_of(case: dict[str, Any], part: str) -> dict[str, Tensor]:
    """The reference's whole state dict of ``model`` or ``tokenizer`` of a golden case."""
    shapes, left = case[f"{part}_state"], case["left_at_init"]
    values = weights(shapes, case["seed"], left)
    return {key: values[key] if key in values else buffer(key, shape, case) for key, shape in shapes.items()}


def write_case(name: str, folder: Path, nested: bool = False) -> tuple[Path, Path]:
    """Write the two released files of a golden case."""
    case, _ = load_case(name)
    model_path, tokenizer_path = folder / f"{name}.pth", folder / f"{name}_tokenizer.pth"
    model = state_of(case, "model")
    torch.save({"trainer": {"var_wo_ddp": model}, "epoch": 1} if nested else model, model_path)
    torch.save(state_of(case, "tokenizer"), tokenizer_path)
    return model_path, tokenizer_path


def import_arguments(case: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `import_official` for a golden case."""
    arguments = {"architecture": case["architecture"], "patch_nums": case["patch_nums"]}
    if case["architecture"] == "mvar":
        arguments |= {name: case[name] for name in ("kernel_size", "first_neighborhood_scale")}
    return arguments


def import_case(name: str, folder: Path) -> tuple[NextScaleTransformer, MultiScaleTokenizer]:
    """A golden case through the importer."""
    case, _ = load_case(name)
    return import_official(*write_case(name, folder, nested=name.startswith("markov")), **import_arguments(case))
