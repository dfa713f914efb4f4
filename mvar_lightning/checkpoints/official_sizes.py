"""Sizes of a published model, read off the names and shapes of its weights, and the buffers that follow from them.

Where several tensors tell the same size the majority counts, so that one damaged tensor is reported as such.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mvar_lightning.attention import AdjacentAttention, AttentionStrategy, FullAttention, SpatialAttention
from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import ScalePyramid, Scales
from mvar_lightning.transformer import LlamaBlocks, NoHistory, SlidingWindowHistory, VARBlocks

State = Mapping[str, Tensor]

ARCHITECTURES = ("var", "mvar", "markov_var", "hmar")
HITS = "quantize.ema_vocab_hit_SV"
LEVELS, MASK, ZERO_K_BIAS = "lvl_1L", "attn_bias_for_masking", "zero_k_bias"
"""Buffers that follow from the sizes; what they hold is told below."""

SIGNS = {
    "markov_var": (r"blocks\.\d+\.attn\.qkv_proj\.weight", r"context_pool\..*", r"lvl_embed\.mlp\..*"),
    "var or mvar": (r"blocks\.\d+\.attn\.mat_qkv\.weight", r"pos_1LC", r"lvl_embed\.weight"),
    "the tokenizer (vqvae)": (r"quantize\.embedding\.weight", r"encoder\.conv_in\.weight", r"post_quant_conv\..*"),
}


def looks_like(state: State) -> str | None:
    """What a state dict is of, by its names: a key of `SIGNS`, or None."""

    def hits(name: str) -> int:
        return sum(any(re.fullmatch(sign, key) for key in state) for sign in SIGNS[name])

    # by most signs, not by all of them: a damaged or shortened file should still be called by its name
    best = max(SIGNS, key=hits)
    return best if hits(best) else None


def check_architecture(state: State, architecture: str, source: str) -> None:
    """Raise `UserError` where the file's names are those of another architecture."""
    seen = looks_like(state)
    expected = "markov_var" if architecture == "markov_var" else "var or mvar"
    if seen is None:
        raise UserError(f"{source}: none of its {len(state)} names is known (first: {list(state)[:3]})")
    if seen != expected:
        raise UserError(f"{source}: looks like {seen}, not like {architecture}; name the right architecture or file")


def pyramid_of(state: State, patch_nums: Scales | None, source: str) -> ScalePyramid:
    """The scales given, or those published with the file's number of tokens.

    Raises:
        UserError: an unknown number of tokens and no ``patch_nums``, ``patch_nums`` of another number, or maps that are
            no squares, of which the published models have none.
    """
    tokens = _vote([_size(state, "pos_1LC", 1), _size(state, LEVELS, 1), _size(state, MASK, 2)])
    if patch_nums is None:
        if tokens is None:
            raise UserError(f"{source}: the file does not tell its number of tokens; give patch_nums=(...)")
        try:
            return ScalePyramid.from_num_tokens(tokens)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
    pyramid = ScalePyramid(patch_nums)
    check_squares(pyramid, f"{source}: patch_nums")
    if tokens is not None and tokens != pyramid.num_tokens:
        raise UserError(f"{source}: patch_nums {pyramid} have {pyramid.num_tokens} tokens, the weights have {tokens}")
    return pyramid


def check_squares(pyramid: ScalePyramid, what: str) -> None:
    """Raise `UserError` where a map is no square: what is published tells one side of each."""
    if not all(isinstance(side, int) for side in pyramid.sides):
        raise UserError(
            f"{what} {pyramid}: the published models have square maps alone; others travel in a saved folder "
            "(``folder`` of mvar export)"
        )


def vocab_size_of(state: State) -> int | None:
    """The number of codes that a transformer predicts."""
    return _vote([_size(state, "head.weight"), _size(state, "head.bias")])


def transformer_arguments(
    state: State, architecture: str, pyramid: ScalePyramid, vocab_size: int, code_dim: int, source: str
) -> dict[str, Any]:
    """Arguments of `NextScaleTransformer`, except its attention (`attention_of`)."""
    width = _need(_width_votes(state), "the width (word_embed.weight)", source)
    depth = _need([_count(state, r"blocks\.(\d+)\..*")], "the depth (blocks.0...)", source)
    heads = _vote([_size(state, key, 1) for key in state if key.endswith(".attn.scale_mul_1H11")])
    classes = _need([_size(state, "class_emb.weight")], "the number of classes (class_emb.weight)", source)
    return {
        "scales": pyramid.scales,
        "vocab_size": vocab_size,
        "code_dim": code_dim,
        "num_classes": classes - 1,
        "depth": depth,
        "width": width,
        # without the norm no weight tells the heads; the references always have as many as blocks
        "heads": heads or depth,
        "blocks": _blocks(state, architecture, width, qk_norm=heads is not None),
        "history": _history(architecture),
    }


def attention_of(
    architecture: str, pyramid: ScalePyramid, kernel_size: int, first_neighborhood_scale: int | None
) -> AttentionStrategy:
    """The attention of an architecture; MVAR's neighborhood starts at the last but one scale by default."""
    if architecture == "var":
        return FullAttention()
    if architecture in ("markov_var", "hmar"):
        return AdjacentAttention()
    total = pyramid.num_scales
    first = max(total - 2, 0) if first_neighborhood_scale is None else first_neighborhood_scale
    if not 0 <= first < total:
        raise UserError(f"first_neighborhood_scale {first}: the scales {pyramid} are counted from 0 to {total - 1}")
    return SpatialAttention(kernel_size, scales=list(range(first, total)))


def tokenizer_arguments(
    state: State, pyramid: ScalePyramid, source: str, vocab_size: int | None = None
) -> dict[str, Any]:
    """Arguments of `MultiScaleTokenizer`; ``vocab_size`` is what the transformer tells, one vote among others."""
    if looks_like(state) != "the tokenizer (vqvae)":
        raise UserError(f"{source}: looks like {looks_like(state) or 'no known model'}, not like the tokenizer (vqvae)")
    votes = [_size(state, key) for key in ("encoder.conv_in.weight", "encoder.conv_in.bias", "decoder.norm_out.bias")]
    channels = _need(votes, "the channels (encoder.conv_in.weight)", source)
    levels = _need([_count(state, r"encoder\.down\.(\d+)\..*")], "the levels (encoder.down.0...)", source)
    widths = [_need(_level_votes(state, i), f"the width of encoder.down.{i}", source) for i in range(levels)]
    codes = state.get("quantize.embedding.weight")
    vocab_votes = [len(codes) if codes is not None and codes.ndim == 2 else None, _size(state, HITS, 1), vocab_size]
    code_votes = [_size(state, "quantize.embedding.weight", 1), _size(state, "quant_conv.bias")]
    code_votes += [_size(state, "encoder.conv_out.bias"), _size(state, "post_quant_conv.bias")]
    return {
        "scales": pyramid.scales,
        "vocab_size": _need(vocab_votes, "the number of codes (quantize.embedding.weight)", source),
        "code_dim": _need(code_votes, "the code length (quantize.embedding.weight)", source),
        "channels": channels,
        "channel_multipliers": [max(width // channels, 1) for width in widths],
        "num_res_blocks": _need([_count(state, r"encoder\.down\.0\.block\.(\d+)\..*")], "encoder.down.0.block", source),
        "phi_layers": _phi_layers(state, pyramid, source),
        "image_channels": _vote(_image_votes(state)) or 3,
    }


def _phi_layers(state: State, pyramid: ScalePyramid, source: str) -> int:
    """How the scales share phi, by its names: several shared, one for all, or (0) one for each scale."""
    several = _count(state, r"quantize\.quant_resi\.qresi_ls\.(\d+)\..*")
    if several is not None:
        return several
    if any(key.startswith("quantize.quant_resi.qresi.") for key in state):
        return 1
    each = _count(state, r"quantize\.quant_resi\.(\d+)\..*")
    if each is not None and each != pyramid.num_scales:
        raise UserError(f"{source}: it has one phi for each of {each} scales, patch_nums {pyramid} are {len(pyramid)}")
    return 4 if each is None else 0  # with no phi at all, the check of names will say so


def _blocks(state: State, architecture: str, width: int, qk_norm: bool) -> VARBlocks | LlamaBlocks:
    if architecture == "markov_var":
        return LlamaBlocks(qk_norm=qk_norm)
    hidden = _vote([_size(state, key) for key in state if key.endswith((".ffn.fc1.weight", ".ffn.fc1.bias"))])
    shared = any(key.endswith(".ada_gss") or key.startswith("shared_ada_lin.") for key in state)
    return VARBlocks(mlp_ratio=4.0 if hidden is None else hidden / width, shared_adaln=shared, qk_norm=qk_norm)


def _history(architecture: str) -> NoHistory | SlidingWindowHistory:
    return SlidingWindowHistory(3, conditional_class_when_guided=True) if architecture == "markov_var" else NoHistory()


def _width_votes(state: State) -> list[int | None]:
    biases = [_size(state, key) for key in state if key.endswith((".attn.q_bias", ".attn.v_bias", ".attn.proj.bias"))]
    return [_size(state, "word_embed.bias"), _size(state, "class_emb.weight", 1), *biases]


def _image_votes(state: State) -> list[int | None]:
    return [
        _size(state, "encoder.conv_in.weight", 1),
        _size(state, "decoder.conv_out.bias"),
        _size(state, "decoder.conv_out.weight"),
    ]


def _level_votes(state: State, level: int) -> list[int | None]:
    names = ("conv1.weight", "conv1.bias", "norm2.weight")
    return [_size(state, f"encoder.down.{level}.block.0.{name}") for name in names]


def _size(state: State, key: str, dimension: int = 0) -> int | None:
    tensor = state.get(key)
    return tensor.shape[dimension] if tensor is not None and tensor.ndim > dimension else None


def _count(state: State, pattern: str) -> int | None:
    """One more than the largest index that names of this pattern have; a file has a tensor for each, at least."""
    indices = [match[1] for key in state if (match := re.fullmatch(pattern, key))]
    if any(len(index) > 9 or int(index) >= len(state) for index in indices):
        raise UserError(
            f"a name counts to {max(indices, key=len)[:20]}, but there are {len(state)} tensors in the file"
        )
    return max(map(int, indices)) + 1 if indices else None


def _vote(sizes: Sequence[int | None]) -> int | None:
    """The most frequent size told, the first of equals; None where nothing is told."""
    votes = Counter(size for size in sizes if size is not None)
    return votes.most_common(1)[0][0] if votes else None


def _need(sizes: Sequence[int | None], what: str, source: str) -> int:
    size = _vote(sizes)
    if not size:
        raise UserError(f"{source}: missing what tells {what}")
    return size


# Buffers of the published transformers that follow from their sizes: written on export, checked on import.
#
# ``lvl_1L`` is the scale of every token, ``attn_bias_for_masking`` the training mask as 0 and -inf, ``zero_k_bias``
# the absent bias of the keys. A file may lack them, or hold zeros in their place: they then say nothing.
#
# MVAR's released training script loads VAR's checkpoint whole, its causal mask included; so both masks occur in files
# of MVAR and neither is refused there. The attention that its sampler computes (and we do) is the block-diagonal one.
#
# L all tokens.


def derived_shapes(pyramid: ScalePyramid, width: int, depth: int, architecture: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every such buffer in the reference's state dict."""
    tokens = pyramid.num_tokens
    shapes: dict[str, tuple[int, ...]] = {LEVELS: (1, tokens), MASK: (1, 1, tokens, tokens)}
    shapes |= {f"blocks.{block}.attn.{ZERO_K_BIAS}": (width,) for block in range(depth)}
    if architecture == "markov_var":
        shapes[f"context_pool.ca.{ZERO_K_BIAS}"] = (width,)
    return shapes


def derived_buffers(pyramid: ScalePyramid, width: int, depth: int, architecture: str) -> dict[str, Tensor]:
    """The buffers with their values, as the reference's constructor makes them."""
    shapes = derived_shapes(pyramid, width, depth, architecture)
    buffers = {key: torch.zeros(shape, device="cpu") for key, shape in shapes.items() if key.endswith(ZERO_K_BIAS)}
    buffers[LEVELS] = pyramid.scale_of_tokens()[None]
    buffers[MASK] = torch.full(shapes[MASK], -torch.inf, device="cpu")
    for scale in range(pyramid.num_scales):
        rows = pyramid.slice_of(scale)
        buffers[MASK][0, 0, rows, _first_visible(pyramid, scale, architecture) : rows.stop] = 0.0
    return buffers


def check_derived(state: Mapping[str, Tensor], pyramid: ScalePyramid, architecture: str, source: str) -> None:
    """Check the values of those buffers that a file holds (their shapes fit already).

    Raises:
        UserError: the scales are others than the file's, or the file belongs to another architecture.
    """
    levels = state.get(LEVELS)
    if levels is not None and levels.any() and not torch.equal(levels.long(), pyramid.scale_of_tokens()[None]):
        raise UserError(
            f"{source}: patch_nums {pyramid} do not fit the file: its {LEVELS} divides the tokens otherwise"
        )
    for key, tensor in state.items():
        if key.endswith(ZERO_K_BIAS) and tensor.any():
            raise UserError(f"{source}: {key} is not zero; keys have no bias in the published models")
    if MASK in state and is_block_diagonal(state[MASK]) and architecture == "var":
        raise UserError(f"{source}: its attention mask is block-diagonal: the file looks like mvar, not var")
    if MASK in state and architecture == "hmar" and state[MASK].any() and not is_block_diagonal(state[MASK]):
        raise UserError(f"{source}: its attention mask shows earlier scales: the file looks like var, not hmar")


def is_block_diagonal(mask_11LL: Tensor) -> bool:
    """Whether the last token is kept from the first one, as in MVAR and Markov-VAR, but not in VAR."""
    return bool(mask_11LL[0, 0, -1, 0] == -torch.inf)


def _first_visible(pyramid: ScalePyramid, scale: int, architecture: str) -> int:
    return 0 if architecture == "var" else pyramid.slice_of(scale).start
