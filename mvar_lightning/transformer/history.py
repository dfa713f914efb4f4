"""The history axis: what of the earlier scales enters the *input* of scale k.

Markov-VAR (arXiv 2511.23334) compresses the inputs of the last N scales into one vector by a learnt query and
fuses it, with the class, into every token of the scale. Teacher forcing and sampling run the same `step`, scale
after scale, so they cannot drift apart.

B images, R rows of the batch (R = B, or 2B where a conditional and an unconditional half are guided),
l tokens of one scale, S tokens of a window, Q learnt queries, C width, H heads, D head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar_lightning.axis import AxisMember
from mvar_lightning.errors import UserError
from mvar_lightning.transformer.linear import linear

HistoryState = list[list[tuple[Tensor, Tensor]]]
"""What sampling carries from scale to scale: attention scores and values of earlier inputs, by pool."""


class HistoryFusion(nn.Module, ABC):
    """The module behind a history: makes the input of a scale from its word embeddings."""

    def begin(self) -> HistoryState:
        return []

    @abstractmethod
    def step(self, words_BlC: Tensor, class_RC: Tensor, state: HistoryState) -> Tensor:
        """Input (R, l, C) of the next scale; R is a multiple of B (rows repeat image by image)."""

    def forward(self, words_by_scale: tuple[Tensor, ...], class_BC: Tensor) -> list[Tensor]:
        """Teacher forcing: inputs of all scales but the first from their word embeddings."""
        state = self.begin()
        return [self.step(words_BlC, class_BC, state) for words_BlC in words_by_scale]


class History(AxisMember, ABC):
    """Describes what is remembered; `make` builds the module."""

    conditional_class_when_guided = False
    """Whether guided sampling fuses the conditional class into the unconditional half too."""

    @abstractmethod
    def make(self, width: int) -> HistoryFusion: ...


class NoHistory(History):
    """The input of a scale is its word embedding alone (VAR and MVAR; for Markov-VAR the ablation "none").

    The Markov-VAR paper does not say whether its ablation keeps the LayerNorm after the word embedding; here it
    goes with the rest of the fusion. At d16 that makes 315M parameters (300M in the paper, whose own count of the
    window, 329M, is also above the 320M of its code).
    """

    def make(self, width: int) -> HistoryFusion:
        return WordsOnly()


class _PooledHistory(History):
    def __init__(self, queries: int = 1, conditional_class_when_guided: bool = False) -> None:
        if queries < 1:
            raise UserError(f"{type(self).__name__}: queries={queries}; at least one learnt query is needed")
        self.queries = queries
        self.conditional_class_when_guided = conditional_class_when_guided


class SlidingWindowHistory(_PooledHistory):
    """A pool over the inputs of the last ``size`` scales, the current one included (Markov-VAR: 3).

    Args:
        size: how many scales the window holds. The start token is never in it.
        queries: learnt queries; each gives one vector c (the paper has one and leaves more open).
        conditional_class_when_guided: fuse the conditional class in both halves of a guided batch, as the
            released sampler does; training fuses each row's own (dropped) class, so False is what was trained.
    """

    def __init__(self, size: int = 3, queries: int = 1, conditional_class_when_guided: bool = False) -> None:
        super().__init__(queries, conditional_class_when_guided)
        if size < 1:
            raise UserError(f"SlidingWindowHistory: size={size}; a window holds at least one scale (or use NoHistory)")
        self.size = size

    def make(self, width: int) -> HistoryFusion:
        return PooledFusion(width, windows=(self.size,), queries=self.queries)


class GlobalHistory(_PooledHistory):
    """A pool over the inputs of all scales so far (the paper's ablation "global").

    The paper does not say more; here all is as in the window: the current scale is included, the start token is not,
    and pool and fusion have the window's sizes (320M parameters at d16; 324M in the paper).
    """

    def make(self, width: int) -> HistoryFusion:
        return PooledFusion(width, windows=(None,), queries=self.queries)


class MixedHistory(_PooledHistory):
    """A sliding window and a global pool side by side (the paper's ablation "mixed").

    The paper does not say how the two are joined; here each has its own pool and both vectors enter the fusion:
    input = Linear([E, c_window, c_global]). At d16 that makes 324M parameters; the paper's has 359M, so its join is
    another, larger one.
    """

    def __init__(self, size: int = 3, queries: int = 1, conditional_class_when_guided: bool = False) -> None:
        super().__init__(queries, conditional_class_when_guided)
        if size < 1:
            raise UserError(f"MixedHistory: size={size}; a window holds at least one scale")
        self.size = size

    def make(self, width: int) -> HistoryFusion:
        return PooledFusion(width, windows=(self.size, None), queries=self.queries)


class WordsOnly(HistoryFusion):
    """No history: rows are the word embeddings, repeated for every half of a guided batch."""

    def step(self, words_BlC: Tensor, class_RC: Tensor, state: HistoryState) -> Tensor:
        return words_BlC.repeat(class_RC.shape[0] // words_BlC.shape[0], 1, 1)


class AttentivePool(nn.Module):
    """Cross-attention of learnt queries over a window: (B, S, C) -> (B, Q, C) (`ContextAttentivePool`).

    Keys have no bias. A query does not depend on the input, so a token's score is fixed the moment it arrives:
    scores and values are computed once for a scale, however many windows it falls in.
    """

    def __init__(self, width: int, queries: int) -> None:
        super().__init__()
        head_dim = 64 if width > 4096 else 128
        self.heads = max(1, width // head_dim)
        if width % self.heads:
            raise UserError(f"history: width {width} does not divide into {self.heads} heads of {head_dim}")
        self.query = nn.Parameter(torch.empty(queries, self.heads, width // self.heads))
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def init_weights(self, std: float) -> None:
        nn.init.trunc_normal_(self.query, std=std)

    def observe(self, x_BlC: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B, H, Q, l) and values (B, H, l, D) of new tokens.

        A score is a query times a key, and a key the token times the key weights: taken from the left, the queries are
        weights of H Q rows, and no key of C channels is ever made.
        """
        key_weight, value_weight = self.kv.weight.chunk(2)
        queries, head_dim = self.query.shape[0], self.query.shape[2]
        weight_HQC = torch.einsum("qhd,hdc->hqc", self.query, key_weight.unflatten(0, (self.heads, -1)))
        scores_BlHQ = F.linear(x_BlC, weight_HQC.flatten(0, 1) * head_dim**-0.5).unflatten(2, (self.heads, queries))
        v_BlHD = linear(x_BlC, value_weight, self.v_bias).unflatten(2, (self.heads, head_dim))
        return scores_BlHQ.permute(0, 2, 3, 1), v_BlHD.transpose(1, 2)

    def forward(self, window: list[tuple[Tensor, Tensor]]) -> Tensor:
        scores_BHQS = torch.cat([scores for scores, _ in window], dim=3)
        v_BHSD = torch.cat([values for _, values in window], dim=2)
        pooled_BHQD = scores_BHQS.softmax(dim=-1) @ v_BHSD
        return self.proj(pooled_BHQD.transpose(1, 2).flatten(2))


class PooledFusion(HistoryFusion):
    """input = Linear([E, c_1, ..., c_n]) with E = LayerNorm(words), c = LayerNorm(pooled + class).

    One c for each window and query. (Markov-VAR's `get_context_cache_*`, `norm_x`, `norm_cond`, `head_context`.)
    """

    def __init__(self, width: int, windows: tuple[int | None, ...], queries: int) -> None:
        super().__init__()
        self.windows = windows
        self.norm_words = nn.LayerNorm(width)
        self.pools = nn.ModuleList([AttentivePool(width, queries) for _ in windows])
        self.norm_context = nn.LayerNorm(width)
        self.fuse = nn.Linear((1 + len(windows) * queries) * width, width)

    def begin(self) -> HistoryState:
        return [[] for _ in self.windows]

    def step(self, words_BlC: Tensor, class_RC: Tensor, state: HistoryState) -> Tensor:
        e_BlC = self.norm_words(words_BlC)
        pooled = []
        for pool, window, seen in zip(self.pools, self.windows, state, strict=True):
            assert isinstance(pool, AttentivePool)
            seen.append(pool.observe(e_BlC))
            if window is not None:
                del seen[:-window]
            pooled.append(pool(seen))
        repeats = class_RC.shape[0] // e_BlC.shape[0]
        context_RQC = self.norm_context(torch.cat(pooled, dim=1).repeat(repeats, 1, 1) + class_RC[:, None])
        # Linear([E, c]) in two parts: c is one vector for all tokens, so its part is computed once
        width = e_BlC.shape[2]
        from_words = F.linear(e_BlC, self.fuse.weight[:, :width], self.fuse.bias)
        from_context = F.linear(context_RQC.flatten(1), self.fuse.weight[:, width:])
        return from_words.repeat(repeats, 1, 1) + from_context[:, None]
