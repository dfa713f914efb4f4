"""Data-dependent codes: they lie where the residuals are, once, the same after a resume."""

from __future__ import annotations

import logging

import pytest
import torch
from codebook_fits import mean_usage, smooth_images, tiny

from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer import DataDependentInit, MultiScaleTokenizer
from mvar_lightning.tokenizer.codebook import draw_distinct, k_means, shared_generator
from mvar_lightning.tokenizer.nearest import code_metric
from mvar_lightning.tools import processes as ranks


def far_from_its_codes(codes: str = "euclidean", seed: int = 0) -> MultiScaleTokenizer:
    """A frozen encoder with latents around 3, and codes around 0: one code is nearest to everything."""
    tokenizer = tiny(seed, codes=codes)
    with torch.no_grad():
        tokenizer.quant_conv.bias += 3
    tokenizer.encoder.requires_grad_(False)
    tokenizer.quant_conv.requires_grad_(False)
    return tokenizer


def test_codes_far_from_the_data_collapse_without_it_and_not_with_it() -> None:
    """Seen: 0.05 and less without it, 0.32 at 2x2 and 0.44 at 4x4 with it."""
    plain, remedied = (
        mean_usage(10, lambda seed: far_from_its_codes("cosine", seed), remedies=remedies)
        for remedies in (list, lambda: [DataDependentInit()])
    )
    assert max(plain) < 0.12
    assert min(remedied[1:]) > 0.22


@pytest.mark.parametrize("codes", ["euclidean", "cosine"])
def test_every_code_is_taken_and_the_error_falls(codes: str) -> None:
    images = smooth_images()
    tokenizer = far_from_its_codes(codes)
    before = tokenizer(images)
    DataDependentInit().before_step(tokenizer, images)
    after = tokenizer(images)
    assert len(after.idx_BL.unique()) >= 0.9 * tokenizer.vocab_size
    assert after.quantizer_loss < 0.3 * before.quantizer_loss


def test_it_happens_once_and_never_after_a_resume() -> None:
    tokenizer, remedy = tiny(), DataDependentInit()
    remedy.before_step(tokenizer, smooth_images())
    codes = tokenizer.quantizer.codebook.weight.detach().clone()
    resumed = DataDependentInit()
    resumed.load_state_dict(remedy.state_dict())
    for again in (remedy, resumed):
        again.before_step(tokenizer, smooth_images(seed=2))
        assert torch.equal(tokenizer.quantizer.codebook.weight, codes)


def test_two_batches_are_one_large_batch() -> None:
    images = smooth_images()
    one, two = tiny(), tiny()
    DataDependentInit().before_step(one, images)
    remedy = DataDependentInit(batches=2)
    remedy.before_step(two, images[:32])
    assert not remedy.done
    remedy.before_step(two, images[32:])
    torch.testing.assert_close(one.quantizer.codebook.weight, two.quantizer.codebook.weight)


@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_equal_images_are_said_and_give_no_equal_codes(value: float, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny()
    with caplog.at_level(logging.WARNING):
        DataDependentInit().before_step(tokenizer, torch.full((8, 3, 8, 8), value))
    assert "different residuals for 32 codes" in caplog.text
    weight = tokenizer.quantizer.codebook.weight
    assert torch.isfinite(weight).all() and len(weight.unique(dim=0)) == 32


def test_nan_pixels_are_named_and_no_code_is_nan() -> None:
    tokenizer, images = tiny(), smooth_images(8)
    images[3, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        DataDependentInit().before_step(tokenizer, images)
    assert torch.isfinite(tokenizer.quantizer.codebook.weight).all()


@pytest.mark.parametrize("arguments", [{"batches": 0}, {"iterations": -1}])
def test_bad_arguments_are_named(arguments: dict[str, int]) -> None:
    with pytest.raises(UserError, match="DataDependentInit"):
        DataDependentInit(**arguments)


def test_k_means_lowers_the_error_of_its_start() -> None:
    rows = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) ** 3
    start, found = (k_means(rows, 9, code_metric("euclidean"), n, shared_generator(4)) for n in (0, 20))
    assert (
        torch.cdist(rows, found).amin(dim=1).square().mean()
        < 0.7 * torch.cdist(rows, start).amin(dim=1).square().mean()
    )


def test_distinct_rows_are_distinct_and_deterministic() -> None:
    rows = torch.tensor([[1.0], [1.0], [2.0], [3.0], [3.0]])
    drawn = draw_distinct(rows, 10, shared_generator(1))
    assert sorted(drawn.flatten().tolist()) == [1.0, 2.0, 3.0]
    assert torch.equal(drawn, draw_distinct(rows, 10, shared_generator(1)))
    assert len(draw_distinct(rows, 2, shared_generator(1))) == 2
    assert len(draw_distinct(rows[:0], 2, shared_generator(1))) == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_the_first_alone_warns(
    rank: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
    remedy = DataDependentInit(batches=2)
    remedy.after_fit()
    assert ("batches 2" in caplog.text) == (rank == 0)
