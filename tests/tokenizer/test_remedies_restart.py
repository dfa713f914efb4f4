"""Restarts of dead codes: from recent residuals, with fresh moments, the same after a resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from codebook_fits import fit, smooth_images, tiny, usage

from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer import DataDependentInit, DeadCodeRestart, EntropyLoss, MultiScaleTokenizer
from mvar_lightning.tokenizer.codebook import take_replaced_codes


def with_lost_codes() -> MultiScaleTokenizer:
    """All codes but four are far from any residual."""
    tokenizer = tiny()
    with torch.no_grad():
        tokenizer.quantizer.codebook.weight[4:] += 9
    return tokenizer


def test_lost_codes_stay_lost_without_it_and_not_with_it() -> None:
    images = smooth_images()
    plain, remedied = with_lost_codes(), with_lost_codes()
    fit(plain, images, steps=30, lr=1e-3)
    fit(remedied, images, steps=30, lr=1e-3, remedies=[DeadCodeRestart(every=5)])
    assert usage(plain, images)[-1] <= 4 / 32
    assert usage(remedied, images)[-1] > 0.7


def test_new_codes_are_residuals_and_have_no_moments() -> None:
    tokenizer, remedy = with_lost_codes(), DeadCodeRestart(every=3, rows=64)
    optimizer = fit(tokenizer, smooth_images(), steps=3, remedies=[remedy])
    weight = tokenizer.quantizer.codebook.weight
    [(name, replaced)] = take_replaced_codes(tokenizer)
    assert name == "quantizer.codebook.weight"
    assert set(range(4, 32)) <= set(replaced)
    known = remedy.reservoir_KRZ.flatten(0, 1)
    assert (weight[replaced].unsqueeze(1) == known).all(dim=2).any(dim=1).all()
    assert len(weight.unique(dim=0)) == 32
    for moment in ("exp_avg", "exp_avg_sq"):
        assert optimizer.state[weight][moment][replaced].abs().max() == 0
    assert list(take_replaced_codes(tokenizer)) == []


def test_a_code_that_was_used_before_loses_its_moments_and_the_others_keep_theirs() -> None:
    tokenizer, images, remedy = with_lost_codes(), smooth_images(), DeadCodeRestart(every=1)
    optimizer = fit(tokenizer, images, steps=1)
    weight = tokenizer.quantizer.codebook.weight
    for moment in ("exp_avg", "exp_avg_sq"):
        optimizer.state[weight][moment].fill_(1.0)
    remedy.attach(tokenizer)
    remedy.after_step(tokenizer, tokenizer(images), optimizer)
    [(_, replaced)] = take_replaced_codes(tokenizer)
    kept = sorted(set(range(32)) - set(replaced))
    assert replaced and kept
    for moment in ("exp_avg", "exp_avg_sq"):
        assert not optimizer.state[weight][moment][replaced].any() and optimizer.state[weight][moment][kept].all()


def test_new_codes_come_equally_from_each_scale() -> None:
    tokenizer, remedy = with_lost_codes(), DeadCodeRestart(every=1)
    remedy.attach(tokenizer)
    output, known = tokenizer(smooth_images()), tokenizer.quantizer.codebook.weight.detach().clone()
    rows = [len(rows_BlZ.detach().flatten(0, 1).unique(dim=0)) for rows_BlZ in output.residuals_BlZ]
    assert min(rows) >= 28, "each scale alone could replace all"
    remedy.after_step(tokenizer, output, torch.optim.SGD(tokenizer.parameters(), lr=0.0))
    new = [code for code in tokenizer.quantizer.codebook.weight.detach() if not (code == known).all(1).any()]
    of_scale = [sum((code == rows).all(1).any() for code in new) for rows in remedy.reservoir_KRZ]
    assert sum(of_scale) == len(new) >= 28 and max(of_scale) - min(of_scale) <= 1


def test_codes_in_use_stay_as_they_are() -> None:
    tokenizer, images = tiny(), smooth_images()
    remedy = DeadCodeRestart(every=1, threshold=0.0)
    optimizer = fit(tokenizer, images, steps=1, remedies=[remedy])
    before = tokenizer.quantizer.codebook.weight.detach().clone()
    remedy.after_step(tokenizer, tokenizer(images), optimizer)
    assert torch.equal(tokenizer.quantizer.codebook.weight, before)


def test_a_resume_replaces_the_same_codes_by_the_same_rows() -> None:
    images = smooth_images()
    runs = []
    for stop in (None, 4):
        tokenizer, remedy = with_lost_codes(), DeadCodeRestart(every=6)
        remedy.attach(tokenizer)
        optimizer = torch.optim.SGD(tokenizer.parameters(), lr=0.0)
        for step in range(6):
            if step == stop:
                state, remedy = remedy.state_dict(), DeadCodeRestart(every=6)
                remedy.attach(tokenizer)
                remedy.load_state_dict(state)
            remedy.after_step(tokenizer, tokenizer(images[step * 8 : step * 8 + 8]), optimizer)
        runs.append(tokenizer.quantizer.codebook.weight.detach())
    assert not torch.equal(runs[0], with_lost_codes().quantizer.codebook.weight)
    assert torch.equal(*runs)


def test_nothing_is_replaced_after_the_last_step() -> None:
    tokenizer = with_lost_codes()
    fit(tokenizer, smooth_images(), steps=8, remedies=[DeadCodeRestart(every=4, until=3)])
    assert list(take_replaced_codes(tokenizer)) == []


def test_one_image_goes_on_and_gives_no_equal_codes(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = with_lost_codes()
    fit(tokenizer, torch.full((1, 3, 8, 8), -1.0), steps=8, remedies=[DeadCodeRestart(every=2)], batch=4)
    weight = tokenizer.quantizer.codebook.weight
    assert torch.isfinite(weight).all() and len(weight.unique(dim=0)) == 32
    assert caplog.text.count("different residuals") == 1


def test_too_few_tokens_to_judge_are_said_once_and_replace_nothing(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = with_lost_codes()
    fit(tokenizer, smooth_images(4), steps=3, remedies=[DeadCodeRestart(every=1)], batch=1)
    assert list(take_replaced_codes(tokenizer)) == []
    assert caplog.text.count("21 tokens in 1 steps") == 1


@pytest.mark.parametrize("codes", ["euclidean", "cosine"])
@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_constant_images_train_with_all_remedies(codes: str, value: float) -> None:
    tokenizer, images = tiny(codes=codes), torch.full((4, 3, 8, 8), value)
    remedies = [DataDependentInit(), DeadCodeRestart(every=2)]
    fit(tokenizer, images, steps=12, remedies=remedies, losses=[EntropyLoss()], batch=4, scale_dropout=0.5)
    assert all(torch.isfinite(parameter).all() for parameter in tokenizer.parameters())
    assert (tokenizer(images).reconstruction_B3HW - images).abs().mean() < 1


def test_nan_never_enters_the_reservoir() -> None:
    tokenizer, remedy = tiny(), DeadCodeRestart(every=1)
    remedy.attach(tokenizer)
    images = smooth_images(8)
    images[0, 0, 0, 0] = torch.nan
    with torch.no_grad():
        remedy.after_step(tokenizer, tokenizer(images), torch.optim.SGD(tokenizer.parameters(), lr=0.0))
    assert torch.isfinite(remedy.reservoir_KRZ).all()
    assert torch.isfinite(tokenizer.quantizer.codebook.weight).all()


@pytest.mark.parametrize("arguments", [{"every": 0}, {"threshold": 1.0}, {"rows": 0}, {"rows_per_image": 0}])
def test_bad_arguments_are_named(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(arguments))):
        DeadCodeRestart(**arguments)
