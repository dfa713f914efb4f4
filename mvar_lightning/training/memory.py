"""What a training step and its validation take of a device's memory: a table of counted bytes, and the sums of it.

B batch, L tokens, C width, V vocabulary, P parameters, S image side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

KEPT = {"VARBlocks": (46.6, 30.9), "LlamaBlocks": (58.9, 34.7)}
"""Bytes a token, layer and channel that autograd keeps in bf16-mixed, eager and compiled: counted with hooks on saved
tensors under CUDA's cast policy (`tests/transformer/test_saved_bytes.py`). In float32 it is twice as much at most."""
ENDS = 24.0
"""The same, outside of the blocks: embeddings, history, the head's norm and the gradient of its output."""
CHECKPOINTED = {False: 2.0, True: 4.0}
"""A block's input in bf16, which is kept where blocks are computed again; a shared AdaLN's is float32."""
WEIGHTS, GRADIENTS, ADAMW, ROUNDED, BUCKETS = 4, 4, 8, 2, 4
"""Bytes a parameter: float32 weights and gradients, two moments, autocast's bf16 copy, DDP's buckets. 22 in all."""
TOKENIZER_KEPT = 166.0
"""Bytes a pixel and channel that a tokenizer's step keeps: 1.74 GB of an image of 256 pixels and 160 channels."""
PERCEPTUAL_KEPT, ENCODED = 3000.0, 16.0
"""Bytes a pixel that LPIPS and a discriminator keep; and, a pixel and channel, an encoder's maps without gradient."""
LOSS_TOKENS, LOGIT_BYTES, DECODING, SAMPLED_TOKENS = 4096, 16, 0.6e9, 2**16
INCEPTION = 0.1e9, 20e6
"""Weights with sums of features, and each image at 299 pixels."""
CACHE_BYTES = 8e9
"""Keys and values that sampling at validation may hold at a time: beside weights, gradients and optimizer states."""


def cache_of_image(model: Any, cfg: float | None, element_size: int) -> int:
    """Bytes of keys and values that a transformer holds for one image that it samples; guided, two rows of them."""
    rows = 2 if cfg else 1
    return int(2 * rows * model.backend.plan.cache_tokens * model.width * model.depth * element_size)


@dataclass(frozen=True)
class Shape:
    """What memory follows from: sizes of the models, and the settings that can be changed to make them fit."""

    parameters: int
    tokenizer_parameters: int
    pixels: int
    channels: int
    batch: int
    accumulated: int
    processes: int
    blocks: str = ""
    depth: int = 0
    width: int = 0
    tokens: int = 0
    group_tokens: int = 0
    auto_tokens: int = 0
    vocab_size: int = 0
    shared: bool = False
    compiled: bool = False
    checkpointed: bool = False
    sharded: bool = False
    buckets: bool = False
    ema: bool = False
    half: bool = True
    on_the_fly: bool = False
    reconstructs: bool = False
    inception: bool = False
    sampled: int = 0
    cache_of_image: int = 0
    cache_bytes: float = 0.0

    def state(self) -> dict[str, float]:
        """Bytes that are there for the whole run."""
        own, all_ = self.parameters / (self.processes if self.sharded else 1), self.parameters
        gathered = 3 * WEIGHTS * all_ / max(1, self.depth) if self.sharded else 0  # blocks, on their way
        frozen = self.tokenizer_parameters if self.blocks else 0
        return {
            "weights": WEIGHTS * (own + frozen) + gathered,
            "gradients": GRADIENTS * own + (BUCKETS * own if self.buckets else 0),
            "optimizer state": ADAMW * own,
            "bf16 copies of weights": ROUNDED * all_ if self.half else 0,
            "EMA": WEIGHTS * own if self.ema else 0,
            "Inception": INCEPTION[0] if self.inception else 0,
        }

    def phases(self) -> dict[str, float]:
        """Bytes that come and go: the largest counts."""
        pixels = self.pixels * self.batch
        encoding = ENCODED * pixels * self.channels
        if not self.blocks:
            kept = (TOKENIZER_KEPT * self.channels + PERCEPTUAL_KEPT) * pixels
            return {"training step": kept, "validation": encoding + self._features(self.batch)}
        factor, width = 1 if self.half else 2, self.width * self.batch
        layer = factor * KEPT[self.blocks][self.compiled] * width * self.group_tokens
        layers = self.depth * layer
        if self.checkpointed:
            layers = layer + self.depth * CHECKPOINTED[self.shared] * factor * width * self.group_tokens
        step = layers + ENDS * width * self.tokens + LOGIT_BYTES * LOSS_TOKENS * self.vocab_size
        logits = 2 * 4 * self.batch * self.tokens * self.vocab_size
        validation = max(logits, encoding + self._features(self.batch) if self.reconstructs else 0)
        pieces = min(self.sampled, max(1, int(self.cache_bytes / max(1, self.cache_of_image))))
        blocks = 40 * self.width * SAMPLED_TOKENS + 3 * 2**30
        sampling = pieces * self.cache_of_image + blocks + DECODING + self._features(self.sampled)
        return {
            "training step": step + (encoding if self.on_the_fly else 0),
            "validation": validation,
            "sampling in callbacks": sampling if self.sampled else 0,
        }

    def peak(self) -> float:
        return sum(self.state().values()) + max(self.phases().values())

    def _features(self, images: int) -> float:
        return INCEPTION[1] * images if self.inception else 0
