"""The entropy term: its value, its gradient, and what it does to a fit that collapses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from codebook_fits import dull_images, mean_usage, tiny

from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer import EntropyLoss, TokenizerOutput

IMAGE = torch.zeros(1, 3, 8, 8)


def output(codes: torch.Tensor, *rows: torch.Tensor, metric: str = "euclidean") -> TokenizerOutput:
    """An output in which nothing but residuals (one image) and codes is filled."""
    template = tiny(codes=metric)(IMAGE)
    return template._replace(residuals_BlZ=tuple(r.unsqueeze(0) for r in rows), codes_VZ=codes)


@pytest.mark.parametrize("codes", ["euclidean", "cosine"])
def test_a_fit_collapses_without_it_and_not_with_it(codes: str) -> None:
    """Seen at 2x2: 0.12 and 0.95 (euclidean), 0.24 and 0.97 (cosine)."""
    plain, remedied = (
        mean_usage(80, lambda seed: tiny(seed, codes=codes), dull_images, losses=losses)
        for losses in ([], [EntropyLoss(0.1)])
    )
    assert plain[1] < 0.45
    assert min(remedied[1:]) > 0.8 and remedied[1] > plain[1] + 0.4


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_sure_tokens_on_all_codes_are_best_and_one_code_worst(metric: str) -> None:
    codes = torch.eye(4)
    loss = EntropyLoss(temperature=0.01, diversity=1.0)
    assert loss(output(codes, codes, metric=metric), IMAGE).item() == pytest.approx(-math.log(4), abs=1e-3)
    assert loss(output(codes, codes[:1].expand(4, 4), metric=metric), IMAGE).item() == pytest.approx(0.0, abs=1e-3)


def test_the_temperature_fits_any_size_of_residuals() -> None:
    rows, codes = torch.randn(9, 4), torch.randn(6, 4)
    loss = EntropyLoss()
    torch.testing.assert_close(loss(output(codes, rows), IMAGE), loss(output(1e-3 * codes, 1e-3 * rows), IMAGE))


def test_it_equals_its_definition_scale_by_scale() -> None:
    codes, scales = torch.randn(6, 4), [torch.randn(1, 4), torch.randn(9, 4)]
    expected = 0.0
    for rows in scales:
        unit = rows.square().sum(1).mean() + codes.square().sum(1).mean()
        share = (-torch.cdist(rows, codes).square() / (0.1 * unit)).softmax(dim=1)
        mean = share.mean(dim=0)
        each = -(share * share.log()).sum(dim=1).mean()
        expected += (each + 0.7 * (mean * mean.log()).sum()) / 2
    torch.testing.assert_close(EntropyLoss(temperature=0.1, diversity=0.7)(output(codes, *scales), IMAGE), expected)


def test_gradients_stay_finite_for_codes_that_are_never_near() -> None:
    codes = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1e4, 1e4]], requires_grad=True)
    rows = torch.tensor([[0.1, 0.9], [0.0, 0.0]], requires_grad=True)
    for metric in ("euclidean", "cosine"):
        EntropyLoss(temperature=1e-3)(output(codes, rows, metric=metric), IMAGE).backward()
    assert codes.grad is not None and torch.isfinite(codes.grad).all()
    assert rows.grad is not None and torch.isfinite(rows.grad).all()


def test_few_rows_stand_for_many_in_training_only() -> None:
    seen = output(torch.randn(6, 4), torch.randn(500, 4))
    loss = EntropyLoss(max_rows=400)
    whole = loss.eval()(seen, IMAGE)
    part = loss.train()(seen, IMAGE)
    assert part != whole and part.item() == pytest.approx(whole.item(), abs=0.05)


@pytest.mark.parametrize("arguments", [{"temperature": 0.0}, {"diversity": -1.0}, {"max_rows": 0}, {"weight": -1.0}])
def test_bad_arguments_are_named(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(arguments))):
        EntropyLoss(**arguments)
