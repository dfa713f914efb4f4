"""Top-k, top-p and the draw of a token from what is left (VAR's `sample_with_top_k_top_p_`).

Both filters come to one threshold for each token: what lies below it goes. The threshold needs a sort of the k
largest logits only, and the draw itself runs in the order of the vocabulary, so that two almost equal logits which
swap places under another batch size move no boundary of the distribution.

B batch, l tokens of one scale, V vocabulary, k candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mvar_lightning.errors import UserError


def check_filters(top_k: int | None, top_p: float | None, temperature: float = 1.0) -> None:
    """Raise `UserError` for values that mean nothing."""
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
    if top_k is not None and top_k >= logits_BlV.shape[-1]:
        top_k = None
    nucleus = top_p is not None and top_p < 1
    if top_k is None and not nucleus:
        return logits_BlV
    candidates = logits_BlV.shape[-1] if top_k is None else int(top_k)
    largest_Blk = logits_BlV.topk(candidates, dim=-1).values
    last_Bl1 = _last_of_nucleus(largest_Blk, top_p) if nucleus and top_p is not None else largest_Blk[..., -1:]
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
    scaled = logits_BlV if temperature == 1.0 else logits_BlV / temperature
    return draw(filter_logits(scaled, top_k, top_p), uniform_Bl)


def draw(logits_BlV: Tensor, uniform_Bl: Tensor) -> Tensor:
    """Inverse transform: the first token whose cumulative probability exceeds the uniform number."""
    cumulative_BlV = logits_BlV.float().softmax(dim=-1).cumsum_(dim=-1)
    # scaled by the sum as it was rounded, so that a number below 1 always finds a token, and a possible one
    target_Bl1 = uniform_Bl[..., None] * cumulative_BlV[..., -1:]
    return torch.searchsorted(cumulative_BlV, target_Bl1, right=True)[..., 0]


def _last_of_nucleus(sorted_Blk: Tensor, top_p: float) -> Tensor:
    """The smallest logit kept: a token stays while the share of those before it is below p."""
    share_Blk = sorted_Blk.float().softmax(dim=-1)
    before_Blk = share_Blk.cumsum(dim=-1) - share_Blk
    kept_Bl1 = (before_Blk < top_p).sum(dim=-1, keepdim=True).clamp_min(1)
    return sorted_Blk.gather(-1, kept_Bl1 - 1)
