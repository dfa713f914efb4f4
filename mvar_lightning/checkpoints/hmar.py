"""HMAR's released layout (arXiv 2506.04421): VAR's transformer under adjacent attention, its last blocks twice.

The names are those of NVlabs/HMAR, models/hmar.py: ``base_blocks`` and then ``ns_blocks`` are VAR's ``blocks``,
``ns_head`` is its head; ``mask_blocks``, ``mask_head`` and ``mask_embed`` refine inside a scale and are no part of that
transformer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from mvar_lightning.errors import UserError

RENAMED = {"ns_head.": "head.", "ns_head_nm.": "head_nm.", "word_embed_bias": "word_embed.bias"}
MASKED = ("mask_blocks.", "mask_head.", "mask_head_nm.", "mask_embed.")


def is_hmar(state: Mapping[str, Tensor]) -> bool:
    return "ns_head.weight" in state and any(name.startswith("ns_blocks.") for name in state)


def as_var(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The next-scale half under VAR's names; what masks is left out.

    Raises:
        UserError: blocks that are not numbered one after another, none before the last where the heads tell of some, or
            VAR's own blocks or head beside these.
    """
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(MASKED)}
    if twice := [name for name in kept if name.startswith(("blocks.", "head.", "head_nm.", "word_embed.bias"))]:
        raise UserError(f"{source}: holds {twice[0]} beside ns_blocks, two models in one; give a file of one")
    if endless := next((name for name in kept if re.match(r"(base|ns)_blocks\.\d{10}", name)), None):
        raise UserError(f"{source}: a name counts to {endless[:30]}..., but there are {len(state)} tensors in the file")
    base, last = (
        {int(found[1]) for name in kept if (found := re.match(rf"{part}_blocks\.(\d+)\.", name))}
        for part in ("base", "ns")
    )
    if base != set(range(len(base))):
        raise UserError(f"{source}: its base_blocks are {sorted(base)}; some are missing")
    heads = kept.get("ns_blocks.0.attn.scale_mul_1H11")  # as many as blocks, in all that is published
    if not base and heads is not None and heads.ndim > 1 and len(last) < heads.shape[1]:
        raise UserError(
            f"{source}: has {len(last)} ns_blocks of {heads.shape[1]} heads and no base_blocks; they are missing"
        )
    renamed = {}
    for name, tensor in kept.items():
        if found := re.match(r"(base|ns)_blocks\.(\d+)\.(.*)", name):
            number = int(found[2]) + (len(base) if found[1] == "ns" else 0)
            name = f"blocks.{number}.{found[3]}"
        for theirs, ours in RENAMED.items():
            if name.startswith(theirs):
                name = ours + name[len(theirs) :]
        renamed[name] = tensor
    return renamed
