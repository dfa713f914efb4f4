"""The data-copying test: calibrated on data that are as new as the held-out ones, and far from 0 for copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from mvar_lightning.errors import UserError
from mvar_lightning.metrics.copying import cells_of, copying_test, nearest


def rows(seed: int, count: int = 200, spread: float = 1.0) -> torch.Tensor:
    """Points around five centers."""
    draw = torch.Generator().manual_seed(seed)
    centers = 6 * torch.randn(5, 8, generator=torch.Generator().manual_seed(99))
    chosen = torch.randint(5, (count,), generator=draw)
    return centers[chosen] + spread * torch.randn(count, 8, generator=draw)


def outcome(generated: torch.Tensor, held_out: torch.Tensor, training: torch.Tensor) -> tuple[float, float]:
    distances = [nearest(side, [training]).distance_N for side in (generated, held_out)]
    test = copying_test(*distances, *cells_of(training, generated, held_out))
    return test.statistic, test.p_value


def test_the_nearest_is_found_over_blocks() -> None:
    training, query = rows(0), rows(1, 30)
    whole = torch.cdist(query.double(), training.double())
    found = nearest(query, training.split(7))
    assert torch.equal(found.index_N, whole.argmin(dim=1))
    torch.testing.assert_close(found.distance_N, whole.amin(dim=1))
    assert nearest(training[:3], [training]).distance_N.max() < 1e-5


def test_it_is_calibrated_where_nothing_is_copied() -> None:
    training = rows(0, 400)
    chances = [outcome(rows(2 * seed + 1), rows(2 * seed + 2), training)[1] for seed in range(60)]
    assert stats.kstest(chances, "uniform").pvalue > 0.01
    assert 0 <= np.mean(np.array(chances) < 0.05) < 0.17


def test_copies_and_noise_are_told() -> None:
    training, held_out = rows(0, 400), rows(1)
    copies = training[:200] + 0.05 * torch.randn(200, 8, generator=torch.Generator().manual_seed(5))
    statistic, chance = outcome(copies, held_out, training)
    assert statistic < -5 and chance < 1e-6
    some = torch.cat([copies[:80], rows(3, 120)])  # two fifths of them
    assert outcome(some, held_out, training)[1] < 0.01
    assert outcome(rows(4, spread=1.6), held_out, training)[0] > 3


def test_one_cell_is_scipys_test() -> None:
    one, other = torch.rand(40).double(), torch.rand(50).double()
    test = copying_test(one, other)
    known = stats.mannwhitneyu(
        one.numpy(), other.numpy(), alternative="less", use_continuity=False, method="asymptotic"
    )
    assert test.p_value == pytest.approx(known.pvalue)
    assert test.cells == 1 and test.closer == (one < other.quantile(0.05)).double().mean()


def test_small_cells_are_left_out() -> None:
    one, other = torch.rand(40).double(), torch.rand(50).double()
    small = torch.arange(40) >= 30, torch.arange(50) >= 30  # ten and twenty in the second cell
    test = copying_test(one, other, *(cell.long() for cell in small))
    assert test.cells == 1
    assert test.statistic == pytest.approx(copying_test(one[:30], other[:30]).statistic)
    scattered = copying_test(one, other, torch.arange(40), torch.arange(50))  # each alone: as one cell
    assert scattered == copying_test(one, other)


def test_wrong_input() -> None:
    with pytest.raises(UserError, match="it takes 20"):
        copying_test(torch.rand(19), torch.rand(50))
    with pytest.raises(UserError, match="no training"):
        nearest(torch.rand(3, 2), [])
    with pytest.raises(UserError, match="one extractor"):
        nearest(torch.rand(3, 2), [torch.rand(3, 4)])
