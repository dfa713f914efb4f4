"""What a model costs by counting: products of the attention blocks, of the whole transformer, and its cache.

The published GFLOPs (MVAR's tables) come out exactly as: multiply-accumulates of one image without guidance, of the
query-key-value projection and the two products of attention alone, over all blocks (no output projection, no MLP).
`attention_block_gflops` counts so; `transformer_tflops` counts everything, two operations for a multiply-accumulate.
The published cache sizes are keys and values of all scales in float32, of both guided halves, in MiB (2^20).
"""

from __future__ import annotations

from mvar_lightning.attention import AttentionPlan

MIB = 2**20


def attention_block_gflops(plan: AttentionPlan, width: int, depth: int) -> float:
    """Multiply-accumulates (10^9) of one image as MVAR's tables count them."""
    projection = 3 * width**2 * plan.pyramid.num_tokens
    attention = 2 * width * plan.num_pairs
    return depth * (projection + attention) / 1e9


def transformer_tflops(plan: AttentionPlan, width: int, depth: int, hidden: int, parts: int, vocab_size: int) -> float:
    """Operations (10^12) of one forward pass over one sequence.

    Args:
        hidden: the MLP's inner width.
        parts: its number of products with that width (2 for GELU, 3 for SwiGLU).
    """
    token = 4 * width**2 + parts * width * hidden
    block = token * plan.pyramid.num_tokens + 2 * width * plan.num_pairs
    return 2 * (depth * block + width * vocab_size * plan.pyramid.num_tokens) / 1e12


def cache_mib(plan: AttentionPlan, width: int, depth: int, rows: int, bytes_each: int) -> float:
    """Keys and values that sampling holds at most, MiB."""
    return 2 * depth * rows * plan.cache_tokens * width * bytes_each / MIB
