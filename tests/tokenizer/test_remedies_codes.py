"""Cosine codes, small codes and scale dropout: what each is for, and that nothing else changes."""

from __future__ import annotations

import json

import pytest
import torch
from codebook_fits import dull_images, mean_usage, smooth_images, tiny
from torch import Tensor
from torch.nn import functional as F

from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import ScalePyramid
from mvar_lightning.tokenizer import (
    MultiScaleQuantizer,
    MultiScaleTokenizer,
    check_scale_dropout,
    draw_kept_scales,
    fingerprint,
)


def coarse_and_fine_latents(count: int = 64) -> Tensor:
    """Maps (count, 8, 4, 4) whose averages are large and whose details are small: residuals shrink with the scale."""
    generator = torch.Generator().manual_seed(3)
    coarse = 4 * torch.randn(count, 8, 1, 1, generator=generator)
    return coarse + 0.05 * torch.randn(count, 8, 4, 4, generator=generator)


def used(quantizer: MultiScaleQuantizer, latents: Tensor) -> list[int]:
    return [len(idx_Bl.unique()) for idx_Bl in quantizer.pyramid.split(quantizer.encode(latents))]


def quantizer(codes: str) -> MultiScaleQuantizer:
    """Codes of all lengths from 0.1 to 8 in random directions, exact for nothing; phi leaves them as they are."""
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(ScalePyramid([1, 4]), 64, 8, phi_ratio=0.0, codes=codes)
    length = torch.linspace(0.1, 8, 64).unsqueeze(1)
    quantizer.codebook.weight.data = length * F.normalize(torch.randn(64, 8), dim=1)
    return quantizer


def test_small_residuals_share_the_shortest_codes_unless_codes_are_cosine() -> None:
    residuals = 0.05 * torch.randn(64, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    assert used(quantizer("euclidean"), residuals)[1] <= 6
    assert used(quantizer("cosine"), residuals)[1] >= 40


def test_a_fit_loses_fine_codes_unless_they_are_cosine() -> None:
    """Seen at 4x4: 0.50 and 0.96. At 2x2 cosine codes help some starts (0.53) and not others (0.06)."""
    plain, remedied = (
        mean_usage(100, lambda seed, codes=codes: tiny(seed, codes=codes), dull_images)
        for codes in ("euclidean", "cosine")
    )
    assert plain[2] < 0.65
    assert remedied[2] > 0.8 and remedied[2] > plain[2] + 0.25


@pytest.mark.slow
def test_a_fit_with_long_codes_uses_fewer_than_one_with_shorter() -> None:
    """Seen at 2x2: 0.17 with Z 64 and 0.37 with Z 16. It is no rule: Z 4 and Z 8 are no better here than Z 64 (0.18,
    0.20), and on photographs Z 8 alone was no better than Z 16 (docs/tokenizer.md)."""
    long, short = (
        mean_usage(100, lambda seed, code_dim=code_dim: tiny(seed, code_dim=code_dim), dull_images)
        for code_dim in (64, 16)
    )
    assert long[1] < 0.3 and short[1] > long[1] + 0.08


def test_cosine_takes_the_smallest_angle_and_adds_the_code_itself() -> None:
    ours = quantizer("cosine")
    latents = coarse_and_fine_latents(8)
    idx_B = ours.encode(latents)[:, 0]
    codes_VZ = ours.codebook.weight
    rows_BZ = latents.mean(dim=(2, 3))
    expected_B = F.cosine_similarity(rows_BZ.unsqueeze(1), codes_VZ.unsqueeze(0), dim=2).argmax(dim=1)
    assert torch.equal(idx_B, expected_B)
    torch.testing.assert_close(ours.f_hats(ours.encode(latents))[0][:, :, 0, 0], codes_VZ[idx_B])


def test_zero_rows_and_zero_codes_have_a_place() -> None:
    ours = quantizer("cosine")
    with torch.no_grad():
        ours.codebook.weight[3] = 0
    idx_BL = ours.encode(torch.zeros(2, 8, 4, 4))
    assert ((idx_BL >= 0) & (idx_BL < 64)).all()


def test_unknown_codes_are_named() -> None:
    with pytest.raises(UserError, match=r"'angular'.*euclidean, cosine"):
        tiny(codes="angular")


def test_old_configurations_build_and_keep_their_hash() -> None:
    sizes = {"scales": [1, 2], "vocab_size": 8, "code_dim": 4, "channels": 2, "channel_multipliers": [1, 2]}
    tokenizer = MultiScaleTokenizer(**sizes, num_res_blocks=1, norm_groups=2)
    written_then = {key: value for key, value in tokenizer.config.items() if key != "codes"}
    old = MultiScaleTokenizer(**json.loads(json.dumps(written_then)))
    old.load_state_dict(tokenizer.state_dict())
    assert old.config["codes"] == "euclidean"
    old.config = written_then
    assert fingerprint(old) == fingerprint(tokenizer)
    cosine = MultiScaleTokenizer(**{**tokenizer.config, "codes": "cosine"})
    cosine.load_state_dict(tokenizer.state_dict())
    assert fingerprint(cosine) != fingerprint(tokenizer)


def test_residuals_are_what_was_quantized_and_reach_the_encoder() -> None:
    tokenizer, images = tiny(), smooth_images(4)
    output = tokenizer(images)
    f_hats = [torch.zeros_like(output.f_hat_BZhw), *tokenizer.quantizer.f_hats(output.idx_BL)[:-1]]
    for scale, (rows_BlZ, f_hat_BZhw) in enumerate(zip(output.residuals_BlZ, f_hats, strict=True)):
        expected = tokenizer.quantizer.next_input(output.latent_BZhw - f_hat_BZhw, scale)
        torch.testing.assert_close(rows_BlZ, expected, atol=1e-5, rtol=1e-4)
    assert output.codes_VZ is tokenizer.quantizer.codebook.weight
    sum(rows_BlZ.sum() for rows_BlZ in output.residuals_BlZ).backward()
    assert tokenizer.quant_conv.bias.grad.abs().sum() > 0
    assert tokenizer.quantizer.codebook.weight.grad is None


def test_kept_scales_cut_the_latent_and_the_loss_image_by_image() -> None:
    tokenizer, images = tiny(), smooth_images(3)
    whole, cut = tokenizer(images), tokenizer(images, torch.tensor([1, 3, 2]))
    f_hats = tokenizer.quantizer.f_hats(whole.idx_BL)
    for image, kept in enumerate([1, 3, 2]):
        torch.testing.assert_close(cut.f_hat_BZhw[image], f_hats[kept - 1][image], atol=1e-5, rtol=0)
    assert torch.equal(cut.idx_BL, whole.idx_BL)
    alone = [tokenizer(images[i : i + 1], torch.tensor([n])).quantizer_loss for i, n in enumerate([1, 3, 2])]
    torch.testing.assert_close(cut.quantizer_loss, torch.stack(alone).mean())
    # the loss of image 0 is that of its first scale alone
    error = (f_hats[0][:1] - whole.latent_BZhw[:1]).square().mean()
    torch.testing.assert_close(alone[0], (1 + tokenizer.quantizer.beta) * error)


def test_keeping_all_scales_changes_nothing() -> None:
    tokenizer, images = tiny(), smooth_images(3)
    whole, kept = tokenizer(images), tokenizer(images, torch.tensor([3, 3, 3]))
    assert torch.equal(whole.reconstruction_B3HW, kept.reconstruction_B3HW)
    torch.testing.assert_close(whole.quantizer_loss, kept.quantizer_loss)


@pytest.mark.parametrize(
    ("kept", "message"), [([0, 1], "each image keeps 1 to 3"), ([1, 4], "1 to 3"), ([1], r"give int64 \(2,\)")]
)
def test_bad_numbers_of_scales_are_named(kept: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny()(smooth_images(2), torch.tensor(kept))


def test_draws_keep_three_scales_or_more_and_follow_the_global_seed() -> None:
    assert draw_kept_scales(8, 6, 0.0) is None
    torch.manual_seed(0)
    kept_B = draw_kept_scales(4000, 6, 0.25)
    torch.manual_seed(0)
    assert torch.equal(kept_B, draw_kept_scales(4000, 6, 0.25))
    assert set(kept_B.tolist()) == {3, 4, 5, 6}
    assert (kept_B < 6).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_coarse_scales_fall_out_of_use_unless_scales_are_dropped() -> None:
    """Half of the images keep one scale or two. Seen at 1x1: 0.36 and 0.57; at 2x2: 0.80 and 0.98."""
    plain, remedied = (mean_usage(100, scale_dropout=probability) for probability in (0.0, 0.5))
    assert remedied[0] > plain[0] + 0.1 and remedied[1] > plain[1] + 0.05


@pytest.mark.parametrize(("probability", "scales"), [(-0.1, 6), (1.1, 6), (0.1, 3)])
def test_scale_dropout_that_cannot_be_is_named(probability: float, scales: int) -> None:
    with pytest.raises(UserError, match="scale_dropout"):
        check_scale_dropout(probability, scales)
