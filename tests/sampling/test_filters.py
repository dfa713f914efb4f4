"""Filters equal the published formula, and draws follow the filtered distribution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from mvar_lightning.errors import UserError
from mvar_lightning.sampling import filter_logits, sample_tokens


def published_filter(logits_BlV: Tensor, top_k: int, top_p: float) -> Tensor:
    """VAR's filters written anew; 0 is off. Removes, in ascending order, what sums to at most 1 - p."""
    logits_BlV = logits_BlV.clone()
    if top_k > 0:
        kth = logits_BlV.sort(dim=-1, descending=True).values[..., top_k - 1 : top_k]
        logits_BlV[logits_BlV < kth] = -torch.inf
    if top_p > 0:
        ascending, order = logits_BlV.sort(dim=-1)
        gone = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        gone[..., -1] = False
        logits_BlV[torch.zeros_like(gone).scatter(-1, order, gone)] = -torch.inf
    return logits_BlV


@given(
    top_k=st.none() | st.integers(1, 60),
    top_p=st.none() | st.floats(0.05, 0.999),
    spread=st.sampled_from([0.1, 1.0, 6.0]),
    seed=st.integers(0, 1000),
)
def test_equals_the_published_filter(top_k: int | None, top_p: float | None, spread: float, seed: int) -> None:
    logits = spread * torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(seed))
    before = logits.clone()
    expected = published_filter(logits, min(top_k or 0, 40), top_p or 0.0)
    # a token whose cumulative share is p up to rounding may fall on either side
    filtered = filter_logits(logits, top_k, top_p)
    differing = filtered.isinf() != expected.isinf()
    ascending = logits.masked_fill(expected.isinf() & ~differing, -torch.inf).sort(-1).values.softmax(-1).cumsum(-1)
    assert not differing.any() or (ascending - (1 - (top_p or 0))).abs().min() < 1e-5
    assert torch.equal(filtered[~differing], expected[~differing])
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(None, None, 1.0), (4, None, 1.0), (None, 0.7, 1.0), (6, 0.8, 0.5)]
)
def test_draws_follow_the_filtered_distribution(top_k: int | None, top_p: float | None, temperature: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logits_V = 1.5 * torch.randn(8, generator=generator)
    draws = 40_000
    uniform = torch.rand(1, draws, generator=generator)
    idx = sample_tokens(logits_V.expand(1, draws, 8), uniform, top_k, top_p, temperature)
    counts = torch.bincount(idx[0], minlength=8).double()
    expected = published_filter(logits_V[None, None] / temperature, top_k or 0, top_p or 0.0)[0, 0].softmax(-1).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    if possible.sum() > 1:
        shares = expected[possible] / expected[possible].sum()
        assert chisquare(counts[possible].numpy(), (shares * draws).numpy()).pvalue > 1e-3


def test_extreme_uniform_numbers_find_possible_tokens() -> None:
    logits = torch.tensor([-torch.inf, 0.0, 1.0, -torch.inf]).expand(1, 2, 4)
    uniform = torch.tensor([[0.0, 1 - 2**-24]])
    assert sample_tokens(logits, uniform).tolist() == [[1, 2]]


def test_small_changes_of_logits_hardly_move_draws() -> None:
    """Equal logits that swap places in a sort must not swap tokens."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(1, 500, 64)
    uniform = torch.rand(1, 500, generator=generator)
    nudged = logits + 1e-7 * torch.randn(logits.shape, generator=generator)
    assert (sample_tokens(logits, uniform, 64) != sample_tokens(nudged, uniform, 64)).float().mean() < 0.01


def test_top_k_one_is_greedy_and_large_top_k_is_off() -> None:
    logits = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample_tokens(logits, torch.rand(2, 3), top_k=1), logits.argmax(-1))
    assert torch.equal(filter_logits(logits, top_k=900, top_p=1.0), logits)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"top_k": 0}, "top_k 0"),
        ({"top_k": 2.5}, "top_k 2.5"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.01}, "top_p 1.01"),
        ({"top_p": float("nan")}, "top_p nan"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"temperature": float("nan")}, "temperature nan"),
    ],
)
def test_values_out_of_range(arguments: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        sample_tokens(torch.zeros(1, 1, 4), torch.zeros(1, 1), **arguments)
