"""Which keys and values stay in the cache of sampling from one scale to the next: an axis, as strategies are one.

A strategy says what a query *may* read; a policy may keep less of it, and is then an approximation of the model. Where
it drops nothing it changes nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

from mvar_lightning.attention.kv_cache import KVCache
from mvar_lightning.attention.plan import AttentionPlan
from mvar_lightning.attention.scored_cache import WINDOW, ScoredCache
from mvar_lightning.axis import AxisMember
from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import ScalePyramid


class CachePolicy(AxisMember, ABC):
    """How much each layer keeps, and what."""

    def check(self, plan: AttentionPlan, layers: int) -> None:
        """Raise `UserError` where this policy makes no sense under ``plan``, or for so many layers."""

    @abstractmethod
    def make(self, plan: AttentionPlan, *, layers: int, stop: int | None = None, **of_rows: Any) -> KVCache:
        """The cache of one call; arguments as of `KVCache`."""


class KeepAll(CachePolicy):
    """Everything that the strategy reads later."""

    def make(self, plan: AttentionPlan, *, layers: int, stop: int | None = None, **of_rows: Any) -> KVCache:
        return KVCache(plan, layers=layers, stop=stop, **of_rows)


class ScaleKV(CachePolicy):
    """A few drafters keep nearly the whole history, all other layers the keys that the current map looks at most
    (ScaleKV, arXiv 2505.19602). An approximation: images are others than with everything kept.

    What stays of each row and head, once a scale is over: a window of 16 tokens spread over its map, and the keys of
    the best score (`ScoredLayer`).

    Args:
        budget: tokens that a layer keeps on average, as a share of all tokens of the pyramid. Nothing is dropped while
            there are no more than that.
        drafters: layers, counted from 0, that keep all there is, or as much as leaves the others their window; [0] if
            not given (published: 0 and 23 of 32, 0 to 2 of 40; `mvar analyze attention` measures which look broadly).

    Raises:
        UserError: a budget that is no share, or layers that are no numbers.
    """

    def __init__(self, budget: float = 0.1, drafters: list[int] | None = None) -> None:
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= 1:
            raise UserError(f"``cache_budget`` {budget}: give a share of all tokens, above 0 and at most 1 (0.1)")
        drafters = [0] if drafters is None else drafters
        if not isinstance(drafters, list) or any(isinstance(d, bool) or not isinstance(d, int) for d in drafters):
            raise UserError(f"``cache_drafters`` {drafters}: give a list of layers, counted from 0")
        if len(set(drafters)) < len(drafters):
            raise UserError(f"``cache_drafters`` {drafters}: names a layer twice")
        self.budget, self.drafters = float(budget), drafters

    def check(self, plan: AttentionPlan, layers: int) -> None:
        cached = [read.scale for read in plan.reads if plan.is_cached(read.scale)]
        if not cached:
            raise UserError(
                "ScaleKV: the model's attention keeps no keys from scale to scale, so there is nothing to drop; leave "
                "the cache policy out"
            )
        if any(plan.reads[scale].first_key_scale > plan.cache_start(scale) for scale in cached):
            raise UserError("ScaleKV: a scale passes over keys that a later one reads; leave the cache policy out")
        kept, all_tokens = self.tokens(plan.pyramid), plan.pyramid.num_tokens
        if kept < WINDOW:
            least = math.ceil(1000 * WINDOW / all_tokens) / 1000
            way_out = f"give at least {least:g}" if least <= 1 else "leave the cache policy out"
            raise UserError(
                f"``cache_budget`` {self.budget:g}: keeps {kept} of {all_tokens} tokens, fewer than the window of "
                f"{WINDOW}; {way_out}"
            )
        if outside := [layer for layer in self.drafters if not 0 <= layer < layers]:
            raise UserError(f"``cache_drafters`` {outside[0]}: the model has layers 0 to {layers - 1}")

    def tokens(self, pyramid: ScalePyramid) -> int:
        """What a layer keeps at most, on average."""
        return int(self.budget * pyramid.num_tokens + 1e-9)  # products such as 0.7 x 30 are a little less

    def kept(self, plan: AttentionPlan, layers: int) -> list[list[int]]:
        """Tokens that each layer holds for each row and head, once each scale is over."""
        there, mean, drafters = held_of_all(plan), self.tokens(plan.pyramid), len(self.drafters)
        others, sizes = layers - drafters, []
        for tokens in there:
            most, least = tokens, tokens
            if tokens > mean:
                # drafters x most + others x least = layers x mean, and the others keep at least their window
                most = min(tokens, (layers * mean - others * WINDOW) // drafters) if drafters else 0
                least = min(tokens, (layers * mean - drafters * most) // others) if others else 0
            sizes.append((most, least))
        wanted = [[size[0 if layer in self.drafters else 1] for size in sizes] for layer in range(layers)]
        return [_certain(plan, of_layer, there) for of_layer in wanted]

    def make(self, plan: AttentionPlan, *, layers: int, stop: int | None = None, **of_rows: Any) -> KVCache:
        if not plan.cache_tokens:  # beside another model, which keeps something
            return KVCache(plan, layers=layers, stop=stop, **of_rows)
        return ScoredCache(plan, self.kept(plan, layers), stop=stop, **of_rows)


def held_of_all(plan: AttentionPlan) -> list[int]:
    """Tokens that are read after each scale: what is held once it is over, where everything is kept."""
    offsets, last = plan.pyramid.offsets, plan.pyramid.num_scales - 1
    starts = [min(plan.cache_start(scale + 1), scale + 1) for scale in range(last)]
    return [*(offsets[scale + 1] - offsets[start] for scale, start in enumerate(starts)), 0]


def _certain(plan: AttentionPlan, wanted: list[int], there: list[int]) -> list[int]:
    """At most what every head certainly has: where scales go out of sight, how many of their keys a head kept is its
    own affair, and all that they have in common is the last scale."""
    sizes: list[int] = []
    for scale, (size, all_of_them) in enumerate(zip(wanted, there, strict=True)):
        if scale and sizes[-1] < there[scale - 1]:
            forgets = scale + 1 < len(there) and plan.cache_start(scale + 1) > plan.cache_start(scale)
            size = min(size, plan.pyramid.tokens_of(scale) + (0 if forgets else sizes[-1]))
        sizes.append(min(size, all_of_them))
    return sizes
