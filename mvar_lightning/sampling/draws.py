"""One draw: the filters, the tokens that random numbers stand for, and the numbers that an image's seed stands for.

B batch, l tokens of one scale, L all tokens, M maps drawn for one, V vocabulary.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from mvar_lightning.errors import UserError, check_kind
from mvar_lightning.pyramid import ScalePyramid
from mvar_lightning.tools.compute import plain_numbers, runs_behind

NUM_SEEDS = 2**32
"""A CPU generator reads no more than 32 bits of its seed."""

# Top-k, top-p and the draw (VAR's `sample_with_top_k_top_p_`). Both filters come to one threshold for each token, which
# needs a sort of the k largest logits only; the draw runs in the order of the vocabulary, so that two almost equal
# logits which swap places under another batch size move no boundary of the distribution.


def check_filters(top_k: int | None, top_p: float | None, temperature: float = 1.0) -> None:
    """Raise `UserError` for values that mean nothing."""
    for name, value in (("top_k", top_k), ("top_p", top_p), ("temperature", temperature)):
        if value is not None or name == "temperature":
            check_kind(name, value, numbers.Real, "a number")
    if top_k is not None and (isinstance(top_k, bool) or top_k != int(top_k) or top_k < 1):
        raise UserError(f"top_k {top_k}: must be a whole number of at least 1 (1 is greedy), or None to switch it off")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p {top_p}: must be in (0, 1], or None to switch it off")
    if not 0 < temperature < float("inf"):
        raise UserError(f"temperature {temperature}: must be positive (1 leaves the logits alone); greedy is top_k=1")


def filter_logits(logits_BlV: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits with -inf where a token is filtered out.

    Args:
        logits_BlV: any leading shape; left as they are.
        top_k: keep the k largest; more than V means all. None: off.
        top_p: of these, keep the most probable ones until their share reaches p. None or 1: off.

    Logits equal to the last one kept are kept too (the reference does so for top-k; for top-p it breaks such ties by
    the order of its sort).

    Raises:
        UserError: top_k below 1 or top_p outside (0, 1].
    """
    check_filters(top_k, top_p)
    vocab_size = logits_BlV.shape[-1]
    candidates = vocab_size if top_k is None else min(int(top_k), vocab_size)
    share = 1.0 if top_p is None else top_p
    if candidates == vocab_size and share == 1:
        return logits_BlV
    largest_Blk = logits_BlV.topk(min(candidates + 1, vocab_size), dim=-1).values
    largest_Blk, beyond_Bl1 = largest_Blk[..., :candidates], largest_Blk[..., candidates:]
    last_Bl1 = largest_Blk[..., -1:]
    if share < 1:  # a token stays while the probability of those before it is below p
        p_Blk = largest_Blk.float().softmax(dim=-1)
        if runs_behind(logits_BlV.device) or (beyond_Bl1 == last_Bl1).any():  # a GPU would wait for the question
            # equals of the last one beyond the k stay, too, and so have a part in the sum
            ties = [(part == last_Bl1).sum(-1, keepdim=True) for part in (logits_BlV, largest_Blk)]
            p_Blk /= 1 + (ties[0] - ties[1]) * p_Blk[..., -1:]
        before_Blk = p_Blk.cumsum(dim=-1) - p_Blk
        kept_Bl1 = (before_Blk < share).sum(dim=-1, keepdim=True).clamp_min(1)
        last_Bl1 = largest_Blk.gather(-1, kept_Bl1 - 1)
    return logits_BlV.masked_fill(logits_BlV < last_Bl1, -torch.inf)


def sample_tokens(
    logits_BlV: Tensor,
    uniform_Bl: Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Token indices, int64 (B, l): one draw for each token.

    Args:
        logits_BlV: float32.
        uniform_Bl: one number in [0, 1) for each token; the draw is a function of it and the logits.
        top_k, top_p: see `filter_logits`; top_k=1 is the argmax.
        temperature: divides the logits before they are filtered.

    Raises:
        UserError: a filter or temperature out of range.
    """
    check_filters(top_k, top_p, temperature)
    if top_k == 1:
        return logits_BlV.argmax(dim=-1)
    return sample_maps(logits_BlV, uniform_Bl[..., None], top_k, top_p, temperature)[..., 0]


def sample_maps(
    logits_BlV: Tensor, uniform_BlM: Tensor, top_k: int | None, top_p: float | None, temperature: float
) -> Tensor:
    """Token indices, int64 (B, l, M), of M maps from one distribution, which is filtered and summed up once.

    Arguments as of `sample_tokens`, checked there; with as many numbers for each token as there are maps.
    """
    scaled = logits_BlV if temperature == 1.0 else logits_BlV / temperature
    cumulative_BlV = filter_logits(scaled, top_k, top_p).float().softmax(dim=-1).cumsum_(dim=-1)
    # the first token whose share exceeds the number; scaled by the sum as rounded: a number below 1 finds a token
    target_BlM = uniform_BlM * cumulative_BlV[..., -1:]
    # of logits that are no numbers there is no such token: `sample_pyramid` tells
    return torch.searchsorted(cumulative_BlV, target_BlM, right=True).clamp_(max=logits_BlV.shape[-1] - 1)


# One random generator for each image, so that image i depends on its seed alone: not on batch size, order or processes.
# Numbers are drawn on the CPU and moved, but for Gumbel noise, a number for every code: it depends on the device.


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
        self.seeds = list(seed_B)
        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in seed_B]
        uniform = [torch.rand(pyramid.num_tokens, generator=g, device="cpu") for g in self._generators]
        self._uniform_BL = torch.stack(uniform).to(device)

    def uniform(self, scale: int) -> Tensor:
        """Numbers in [0, 1) for the tokens of ``scale``, float32 (B, l)."""
        return self._uniform_BL[:, self.pyramid.slice_of(scale)]

    def of_maps(self, scale: int, count: int) -> tuple[Tensor, Tensor]:
        """Numbers in [0, 1) for ``count`` maps of ``scale``, float32 (B, l, M), and one more for each image, (B,).

        The first map's are `uniform`'s; the others come from a generator of the image and the scale, so that no other
        draw changes, nor do the first ones where more are asked for.
        """
        shape, more, extra = (count - 1, self.pyramid.tokens_of(scale)), [], []
        for seed in self.seeds:
            generator = torch.Generator("cpu").manual_seed(crc32(f"{seed}/maps/{scale}".encode()))
            extra.append(torch.rand((), generator=generator, device="cpu"))
            more.append(torch.rand(shape, generator=generator, device="cpu").t())
        own_Bl1 = self.uniform(scale)[..., None]
        return torch.cat([own_Bl1, torch.stack(more).to(self.device)], dim=-1), torch.stack(extra).to(self.device)

    def gumbel(self, scale: int, vocab_size: int) -> Tensor:
        """Gumbel noise for the tokens of ``scale``, float32 (B, l, V); to be asked for in the order of the scales."""
        shape = (self.pyramid.tokens_of(scale), vocab_size)
        own = self._generators
        if self.device.type != "cpu":  # millions of numbers: drawn there, from a seed that the image's generator gives
            seeds = [int(torch.randint(2**62, (), generator=g, device="cpu")) for g in own]
            own = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        exponential = [torch.empty(shape, device=self.device).exponential_(generator=g) for g in own]
        return torch.stack(exponential).log_().neg_()


def listed(seeds: Sequence[int] | Tensor | int | None) -> Sequence[int] | None:
    """Seeds as a sequence; a bare number is one of them. Raises `UserError` for anything else."""
    given: Any = seeds.tolist() if isinstance(seeds, (Tensor, np.ndarray)) else plain_numbers(seeds)
    given = [given] if isinstance(given, numbers.Number) else given
    if given is not None and not isinstance(given, Sequence):
        raise UserError(f"seeds {given!r}: give a list of whole numbers")
    return given


def check_seeds(seeds: Sequence[int] | Tensor | int | None, batch: int) -> list[int]:
    """One seed for each image; fresh ones, governed by `torch.manual_seed`, where none are given.

    Raises:
        UserError: another number of seeds, or one that is not a whole number from 0 to 2^32 - 1.
    """
    each = listed(seeds)
    if each is None:
        return torch.randint(NUM_SEEDS, (batch,), device="cpu").tolist()
    if len(each) != batch:
        given = f"({len(each)} of them)" if isinstance(seeds, Sequence) else str(seeds)
        raise UserError(f"seeds {given}: give one for each of the {batch} images, e.g. range({batch})")
    for seed in each:
        if not isinstance(seed, numbers.Real) or not 0 <= seed < NUM_SEEDS or int(seed) != seed:
            raise UserError(f"seed {seed}: must be a whole number from 0 to {NUM_SEEDS - 1}")
    return [int(seed) for seed in each]
