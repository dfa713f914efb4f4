"""Properties of the multi-scale quantizer: round trips, gradients, float32, the search itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import ScalePyramid, Scales
from mvar_lightning.tokenizer.nearest import NearestCode
from mvar_lightning.tokenizer.quantizer import MultiScaleQuantizer, phi_of_scales, resize

SQUARES = st.sets(st.integers(1, 7), min_size=1, max_size=5).map(sorted)
SCALES = SQUARES | SQUARES.map(lambda sides: [[side, side + side // 2] for side in sides])
few_examples = settings(max_examples=25, deadline=None)


def make(
    scales: Scales, vocab_size: int = 24, code_dim: int = 6, phi_layers: int = 4, phi_ratio: float = 0.5
) -> MultiScaleQuantizer:
    torch.manual_seed(0)
    return MultiScaleQuantizer(ScalePyramid(scales), vocab_size, code_dim, phi_layers, phi_ratio, codebook_std=0.5)


def latent_for(quantizer: MultiScaleQuantizer, seed: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, quantizer.codebook.embedding_dim, *quantizer.pyramid.last_shape, generator=generator)


@given(scales=SCALES, phi_layers=st.integers(0, 5), ratio=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 99))
@few_examples
def test_tokens_rebuild_the_latent_that_training_sees(scales: Scales, phi_layers: int, ratio: float, seed: int) -> None:
    quantizer = make(scales, phi_layers=phi_layers, phi_ratio=ratio)
    latent = latent_for(quantizer, seed)
    output = quantizer(latent)
    idx_BL = quantizer.encode(latent)
    assert torch.equal(idx_BL, output.idx_BL)
    assert idx_BL.dtype == torch.int64 and idx_BL.shape == (2, quantizer.pyramid.num_tokens)
    torch.testing.assert_close(quantizer.f_hat(idx_BL), output.f_hat_BZhw, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.f_hat_straight_through_BZhw, output.f_hat_BZhw, atol=1e-5, rtol=0)


@given(scales=SCALES, seed=st.integers(0, 99))
@few_examples
def test_step_by_step_equals_all_at_once(scales: Scales, seed: int) -> None:
    """Sampling accumulates scale by scale; training asks for all inputs at once."""
    quantizer = make(scales)
    pyramid = quantizer.pyramid
    idx_BL = torch.randint(0, 24, (2, pyramid.num_tokens), generator=torch.Generator().manual_seed(seed))
    teacher_BLZ = quantizer.teacher_input(idx_BL)
    assert teacher_BLZ.shape == (2, pyramid.num_tokens - pyramid.first_tokens, 6)
    f_hat = quantizer.empty_f_hat(2)
    for scale in range(pyramid.num_scales):
        if scale:
            start, stop = pyramid.offsets[scale] - pyramid.first_tokens, pyramid.offsets[scale + 1]
            expected = teacher_BLZ[:, start : stop - pyramid.first_tokens]
            assert torch.equal(quantizer.next_input(f_hat, scale), expected)
        f_hat = quantizer.accumulate(f_hat, quantizer.lookup(idx_BL[:, pyramid.slice_of(scale)]), scale)
    assert torch.equal(f_hat, quantizer.f_hat(idx_BL))


def test_soft_codes_reach_the_latent_with_gradients() -> None:
    quantizer = make([1, 2, 4])
    weights = torch.zeros(2, 4, 24, requires_grad=True)
    codes = weights.softmax(dim=-1) @ quantizer.codebook.weight
    quantizer.accumulate(quantizer.empty_f_hat(2), codes, 1).square().sum().backward()
    assert weights.grad is not None and weights.grad.abs().sum() > 0


def straightforward_loss(quantizer: MultiScaleQuantizer, f_BZhw: Tensor) -> Tensor:
    """The definition, written out on channel-first maps with all distances at once."""
    pyramid, codes_VZ = quantizer.pyramid, quantizer.codebook.weight
    rest, f_hat, loss = f_BZhw.detach(), torch.zeros_like(f_BZhw), torch.zeros(())
    for scale, shape in enumerate(pyramid.shapes):
        rows = F.interpolate(rest, size=shape, mode="area").permute(0, 2, 3, 1).flatten(0, 2)
        idx_Bhw = torch.cdist(rows, codes_VZ).argmin(dim=1).view(-1, *shape)
        codes = F.embedding(idx_Bhw, codes_VZ).permute(0, 3, 1, 2)
        h = F.interpolate(codes, size=pyramid.last_shape, mode="bicubic")
        phi = quantizer.phi[quantizer.phi_index[scale]]
        h = 0.5 * h + 0.5 * F.conv2d(h, phi.weight, phi.bias, padding=1)
        f_hat, rest = f_hat + h, rest - h.detach()
        loss = loss + F.mse_loss(f_hat, f_BZhw.detach()) + quantizer.beta * F.mse_loss(f_hat.detach(), f_BZhw)
    return loss / pyramid.num_scales


@pytest.mark.parametrize("scales", [[1, 2, 3, 5], [1, [1, 3], [2, 3], [5, 4]]], ids=str)
def test_loss_and_gradients_follow_the_definition(scales: Scales) -> None:
    quantizer = make(scales)
    latent = latent_for(quantizer, 3).requires_grad_()
    inputs = [latent, *quantizer.parameters()]
    ours, plain = quantizer(latent).loss, straightforward_loss(quantizer, latent)
    torch.testing.assert_close(ours, plain)
    for mine, other in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-4)


def test_straight_through_passes_the_gradient_unchanged() -> None:
    quantizer = make([1, 2, 3])
    latent = latent_for(quantizer, 0).requires_grad_()
    weight = torch.randn(2, 6, 3, 3)
    (quantizer(latent).f_hat_straight_through_BZhw * weight).sum().backward()
    torch.testing.assert_close(latent.grad, weight)
    assert quantizer.codebook.weight.grad is None


def test_autocast_leaves_the_quantizer_in_float32() -> None:
    quantizer = make([1, 2, 3, 4])
    latent = latent_for(quantizer, 5).bfloat16()
    plain = quantizer(latent.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = quantizer(latent)
        teacher = quantizer.teacher_input(output.idx_BL)
        f_hat = quantizer.f_hat(output.idx_BL)
    assert torch.equal(output.idx_BL, plain.idx_BL) and torch.equal(output.loss, plain.loss)
    assert {t.dtype for t in (output.loss, output.f_hat_BZhw, teacher, f_hat)} == {torch.float32}
    assert torch.equal(teacher, quantizer.teacher_input(output.idx_BL))


@given(
    rows=st.integers(1, 40), vocab=st.integers(2, 200), per_chunk=st.sampled_from([1, 7, 1000]), seed=st.integers(0, 99)
)
@few_examples
def test_nearest_code_is_the_argmin_of_distances(rows: int, vocab: int, per_chunk: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows_NZ = torch.randn(rows, 5, generator=generator)
    codebook_VZ = torch.randn(vocab, 5, generator=generator)
    search = NearestCode(codebook_VZ)
    search.rows_per_chunk = per_chunk
    expected = (rows_NZ.double().unsqueeze(1) - codebook_VZ.double()).square().sum(-1).argmin(dim=1)
    assert torch.equal(search(rows_NZ), expected)


def test_nearest_code_takes_the_first_of_equals_and_stays_in_range() -> None:
    codebook_VZ = torch.ones(70, 3)
    assert NearestCode(codebook_VZ)(torch.randn(4, 3)).tolist() == [0] * 4
    index = NearestCode(codebook_VZ)(torch.full((1, 3), torch.inf))
    assert 0 <= index.item() < 70


SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(source=SHAPES, target=SHAPES, mode=st.sampled_from(["area", "bicubic"]))
@few_examples
def test_resize_equals_interpolate(source: tuple[int, int], target: tuple[int, int], mode: str) -> None:
    maps = torch.randn(2, 3, *source)
    expected = F.interpolate(maps, size=target, mode=mode)
    actual = resize(maps.permute(0, 2, 3, 1), target, mode).permute(0, 3, 1, 2)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)


def test_resize_matrix_made_in_inference_mode_trains() -> None:
    with torch.inference_mode():
        resize(torch.ones(1, 8, 8, 1), (11, 11), "bicubic")
    maps = torch.ones(1, 8, 8, 1, requires_grad=True)
    resize(maps, (11, 11), "bicubic").sum().backward()
    assert maps.grad is not None


@pytest.mark.parametrize(
    ("num_scales", "num_phi", "expected"),
    [
        (10, 4, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),  # scales 2 and 7 lie halfway, up to rounding
        (5, 2, [0, 0, 0, 1, 1]),  # the middle lies halfway: the lower tick wins
        (4, 4, [0, 1, 2, 3]),
        (6, 1, [0] * 6),
        (1, 4, [0]),
    ],
)
def test_phi_of_each_scale(num_scales: int, num_phi: int, expected: list[int]) -> None:
    assert phi_of_scales(num_scales, num_phi) == expected


@given(num_scales=st.integers(1, 40))
def test_one_phi_for_each_scale(num_scales: int) -> None:
    assert phi_of_scales(num_scales, num_scales) == list(range(num_scales))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 1}, "vocab_size 1"),
        ({"phi_layers": -1}, "phi_layers -1"),
        ({"phi_ratio": 1.5}, "phi_ratio 1.5"),
        ({"code_dim": 0}, "code_dim 0"),
    ],
)
def test_bad_sizes_are_named(change: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MultiScaleQuantizer(ScalePyramid([1, 2]), **{"vocab_size": 8, "code_dim": 4, **change})


def test_latent_of_another_size_is_named() -> None:
    with pytest.raises(UserError, match=r"\(1, 6, 5, 5\)"):
        make([1, 2, 4]).encode(torch.zeros(1, 6, 5, 5))
