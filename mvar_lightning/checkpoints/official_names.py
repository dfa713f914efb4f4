"""Names of parameters in the published checkpoints and in ours, as tables read in both directions.

A table is a list of (reference pattern, our pattern). A pattern is a dotted name in which ``*`` stands for one part
(an index, or ``weight`` and ``bias``); the stars correspond in order. The first row that fits a name renames it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Literal, TypeVar

from mvar_lightning.errors import UserError

T = TypeVar("T")
Table = Sequence[tuple[str, str]]
Direction = Literal["to_ours", "to_reference"]


def _blocks(reference: str, ours: str) -> list[tuple[str, str]]:
    """Rows of a residual block."""
    names = ("norm1", "conv1", "norm2", "conv2")
    rows = [(f"{reference}.{name}.*", f"{ours}.{name}.*") for name in names]
    return [*rows, (f"{reference}.nin_shortcut.*", f"{ours}.shortcut.*")]


def _attentions(reference: str, ours: str) -> list[tuple[str, str]]:
    """Rows of the autoencoder's attention block."""
    names = {"norm": "norm", "qkv": "qkv", "proj_out": "proj"}
    return [(f"{reference}.{theirs}.*", f"{ours}.{name}.*") for theirs, name in names.items()]


def _half(half: str, levels: str, resample: str) -> list[tuple[str, str]]:
    """Rows of the encoder or the decoder."""
    return [
        *[(f"{half}.{name}.*", f"{half}.{name}.*") for name in ("conv_in", "norm_out", "conv_out")],
        *_blocks(f"{half}.{levels}.*.block.*", f"{half}.levels.*.blocks.*"),
        *_attentions(f"{half}.{levels}.*.attn.*", f"{half}.levels.*.attentions.*"),
        (f"{half}.{levels}.*.{resample}.conv.*", f"{half}.levels.*.resample.conv.*"),
        *_blocks(f"{half}.mid.block_1", f"{half}.middle.block1"),
        *_attentions(f"{half}.mid.attn_1", f"{half}.middle.attention"),
        *_blocks(f"{half}.mid.block_2", f"{half}.middle.block2"),
    ]


_PHI_PARTLY_SHARED = ("quantize.quant_resi.qresi_ls.*.*", "quantizer.phi.*.*")
_PHI_SHARED = ("quantize.quant_resi.qresi.*", "quantizer.phi.0.*")
_PHI_EACH_SCALE = ("quantize.quant_resi.*.*", "quantizer.phi.*.*")


def tokenizer_keys(phi_layers: int) -> Table:
    """The tokenizer's table; the reference names phi by how the scales share it (0, 1 or more: ``phi_layers``)."""
    return [
        *_half("encoder", "down", "downsample"),
        *_half("decoder", "up", "upsample"),
        ("quant_conv.*", "quant_conv.*"),
        ("post_quant_conv.*", "post_quant_conv.*"),
        ("quantize.embedding.weight", "quantizer.codebook.weight"),
        ("quantize.ema_vocab_hit_SV", "quantizer.ema_hits_KV"),
        {0: _PHI_EACH_SCALE, 1: _PHI_SHARED}.get(phi_layers, _PHI_PARTLY_SHARED),
    ]


TOKENIZER_KEYS: Table = tokenizer_keys(phi_layers=4)
"""The released tokenizer's (``vae_ch160v4096z32.pth``)."""

_SHARED_BY_TRANSFORMERS: Table = [
    ("word_embed.*", "word_embedding.*"),
    ("class_emb.weight", "class_embedding.weight"),
    ("blocks.*.attn.q_bias", "blocks.*.attention.q_bias"),
    ("blocks.*.attn.v_bias", "blocks.*.attention.v_bias"),
    ("blocks.*.attn.proj.*", "blocks.*.attention.proj.*"),
    ("blocks.*.attn.scale_mul_1H11", "blocks.*.attention.log_scale"),
    ("blocks.*.ada_lin.1.*", "blocks.*.modulation.linear.*"),
    ("head_nm.ada_lin.1.*", "head.modulation.linear.*"),
    ("head.*", "head.linear.*"),
]

VAR_KEYS: Table = [
    *_SHARED_BY_TRANSFORMERS,
    ("pos_start", "positions.start"),
    ("pos_1LC", "positions.token"),
    ("lvl_embed.weight", "positions.level.weight"),
    ("shared_ada_lin.1.*", "condition.linear.*"),
    ("blocks.*.ada_gss", "blocks.*.modulation.offset"),
    ("blocks.*.attn.mat_qkv.weight", "blocks.*.attention.qkv.weight"),
    ("blocks.*.ffn.fc1.*", "blocks.*.mlp.up.*"),
    ("blocks.*.ffn.fc2.*", "blocks.*.mlp.down.*"),
]
"""VAR's and MVAR's transformer, with or without shared AdaLN."""

MARKOV_VAR_KEYS: Table = [
    *_SHARED_BY_TRANSFORMERS,
    ("lvl_embed.mlp.0.*", "positions.up.*"),
    ("lvl_embed.mlp.2.*", "positions.down.*"),
    ("blocks.*.attn.qkv_proj.weight", "blocks.*.attention.qkv.weight"),
    ("blocks.*.ffn.gate_proj.weight", "blocks.*.mlp.gate.weight"),
    ("blocks.*.ffn.up_proj.weight", "blocks.*.mlp.up.weight"),
    ("blocks.*.ffn.down_proj.weight", "blocks.*.mlp.down.weight"),
    ("blocks.*.ln_wo_grad.weight", "blocks.*.norm.weight"),
    ("head_nm.ln_wo_grad.weight", "head.norm.weight"),
    ("context_pool.ca.mat_q", "history.pools.0.query"),
    ("context_pool.ca.v_bias", "history.pools.0.v_bias"),
    ("context_pool.ca.mat_kv.weight", "history.pools.0.kv.weight"),
    ("context_pool.ca.proj.*", "history.pools.0.proj.*"),
    ("norm_x.*", "history.norm_words.*"),
    ("norm_cond.*", "history.norm_context.*"),
    ("head_context.*", "history.fuse.*"),
]
"""Markov-VAR's transformer with its sliding-window history."""

_LEADING_ONE = ("attn.scale_mul_1H11",)


def reference_shape(reference_key: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The reference's shape of a parameter that has ``shape`` here (some have one more dimension of 1 in front)."""
    return (1, *shape) if reference_key.endswith(_LEADING_ONE) else tuple(shape)


@lru_cache(maxsize=1024)
def _pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", r"([^.]+)"))


def rename_key(key: str, table: Table, direction: Direction) -> str | None:
    """The other side's name of one parameter; None where no row fits."""
    for reference, ours in table:
        source, target = (reference, ours) if direction == "to_ours" else (ours, reference)
        match = _pattern(source).fullmatch(key)
        if match:
            # what each star stood for, put between the pieces of the other side's pattern
            pieces = target.split("*")
            return "".join(piece + part for piece, part in zip(pieces, (*match.groups(), ""), strict=True))
    return None


def rename(state: Mapping[str, T], table: Table, direction: Direction) -> dict[str, T]:
    """Rename every key of a state dict.

    Raises:
        UserError: a key that the table does not know.
    """
    renamed: dict[str, T] = {}
    unknown: list[str] = []
    for key, value in state.items():
        name = rename_key(key, table, direction)
        if name is None:
            unknown.append(key)
        else:
            renamed[name] = value
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise UserError(f"unknown parameters {unknown[:5]}{more}: the checkpoint is of another architecture")
    return renamed


def to_ours(state: Mapping[str, T], table: Table) -> dict[str, T]:
    """A reference's state dict with our names."""
    return rename(state, table, "to_ours")


def to_reference(state: Mapping[str, T], table: Table) -> dict[str, T]:
    """Our state dict with the reference's names."""
    return rename(state, table, "to_reference")
