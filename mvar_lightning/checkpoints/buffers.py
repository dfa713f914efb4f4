"""Buffers of the published transformers that follow from their sizes: written on export, checked on import.

``lvl_1L`` is the scale of every token, ``attn_bias_for_masking`` the training mask as 0 and -inf, ``zero_k_bias`` the
absent bias of the keys. A file may lack them, or hold zeros in their place: they then say nothing.

MVAR's released training script loads VAR's checkpoint whole, its causal mask included; so both masks occur in files of
MVAR and neither is refused there. The attention that its sampler computes (and we do) is the block-diagonal one.

L all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import ScalePyramid

LEVELS, MASK = "lvl_1L", "attn_bias_for_masking"
ZERO_K_BIAS = "zero_k_bias"


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


def is_block_diagonal(mask_11LL: Tensor) -> bool:
    """Whether the last token is kept from the first one, as in MVAR and Markov-VAR, but not in VAR."""
    return bool(mask_11LL[0, 0, -1, 0] == -torch.inf)


def _first_visible(pyramid: ScalePyramid, scale: int, architecture: str) -> int:
    return 0 if architecture == "var" else pyramid.slice_of(scale).start
