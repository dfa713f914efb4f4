"""One random generator for each image, so that image i depends on its seed alone.

Not on the batch size, the order, the number of processes or the device: numbers are drawn on the CPU and moved.

B batch, l tokens of one scale, L all tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import ScalePyramid

NUM_SEEDS = 2**32
"""A CPU generator reads no more than 32 bits of its seed."""


class ImageNoise:
    """The random numbers of B images.

    Args:
        seed_B: one for each image.
        pyramid: how many numbers each scale takes.
        device: where they are needed.
    """

    def __init__(self, seed_B: Sequence[int], pyramid: ScalePyramid, device: torch.device) -> None:
        self.pyramid = pyramid
        self.device = device
        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in seed_B]
        uniform = [torch.rand(pyramid.num_tokens, generator=g, device="cpu") for g in self._generators]
        self._uniform_BL = torch.stack(uniform).to(device)

    def uniform(self, scale: int) -> Tensor:
        """Numbers in [0, 1) for the tokens of ``scale``, float32 (B, l)."""
        return self._uniform_BL[:, self.pyramid.slice_of(scale)]

    def gumbel(self, scale: int, vocab_size: int) -> Tensor:
        """Gumbel noise for the tokens of ``scale``, float32 (B, l, V); to be asked for in the order of the scales."""
        shape = (self.pyramid.tokens_of(scale), vocab_size)
        exponential = [torch.empty(shape, device="cpu").exponential_(generator=g) for g in self._generators]
        return torch.stack(exponential).to(self.device).log_().neg_()


def check_seeds(seeds: Sequence[int] | Tensor | None, batch: int) -> list[int]:
    """One seed for each image; fresh ones, governed by `torch.manual_seed`, where none are given.

    Raises:
        UserError: another number of seeds, or one that is not a whole number from 0 to 2^32 - 1.
    """
    if seeds is None:
        return torch.randint(NUM_SEEDS, (batch,), device="cpu").tolist()
    listed = seeds.tolist() if isinstance(seeds, Tensor) else seeds
    if isinstance(listed, int) or len(listed) != batch:
        given = listed if isinstance(listed, int) else f"({len(listed)} of them)"
        raise UserError(f"seeds {given}: give one for each of the {batch} images, e.g. range({batch})")
    for seed in listed:
        if int(seed) != seed or not 0 <= seed < NUM_SEEDS:
            raise UserError(f"seed {seed}: must be a whole number from 0 to {NUM_SEEDS - 1}")
    return [int(seed) for seed in listed]
