"""The papers' analyses, on models whose answers are known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mvar_lightning import (
    AdjacentAttention,
    FullAttention,
    MultiScaleTokenizer,
    NextScaleTransformer,
    ScalePyramid,
    SlidingWindowAttention,
    SpatialAttention,
)
from mvar_lightning.errors import UserError
from mvar_lightning.evaluation.papers.alignment import Alignment, alignment_of, residual_feature_alignment
from mvar_lightning.evaluation.papers.attention_mass import AttentionMass, _Sums, _Watcher, attention_mass
from mvar_lightning.evaluation.papers.breadth import breadth_of
from mvar_lightning.evaluation.papers.figures import _draw_windows, alignment_markdown, attention_markdown
from mvar_lightning.evaluation.papers.perturbation import Perturbation, _damages, perturb
from mvar_lightning.evaluation.papers.scaling import (
    Scaling,
    draw_scaling,
    fit_power_law,
    scaling_content,
    scaling_markdown,
    scaling_of,
)
from mvar_lightning.sampling.sampler import SamplingSettings

SCALES = [1, 2, 4]
Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def tokenizer() -> MultiScaleTokenizer:
    torch.manual_seed(0)
    made = MultiScaleTokenizer(
        SCALES, vocab_size=16, code_dim=8, channels=8, channel_multipliers=[1, 2], num_res_blocks=1, norm_groups=4
    )
    torch.nn.init.normal_(made.quantizer.codebook.weight)
    return made.eval()


def model_of(attention: Any, **changes: Any) -> NextScaleTransformer:
    torch.manual_seed(1)
    sizes = {"vocab_size": 16, "code_dim": 8, "num_classes": 3, "depth": 2, "width": 32, "heads": 2}
    return NextScaleTransformer(SCALES, attention=attention, gamma_init=0.5, **{**sizes, **changes})


@pytest.fixture(scope="module")
def batches() -> Batches:
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(6, 3, 8, 8, generator=generator) * 2 - 1
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    return [(images[:4], labels[:4]), (images[4:], labels[4:])]


# -- attention mass


def test_mass_of_a_query_sums_to_one_and_stays_where_it_may_look(
    tokenizer: MultiScaleTokenizer, batches: Batches
) -> None:
    mass = attention_mass(model_of(SlidingWindowAttention(scales=2)), tokenizer, batches)
    assert mass.images == 6
    torch.testing.assert_close(mass.on_scale.sum(dim=2), torch.ones(2, 3, dtype=torch.float64), check_dtype=False)
    assert (mass.on_scale[:, 2, 0] == 0).all(), "two scales are seen, the third back is not"
    assert (mass.on_scale[:, 2, 1] > 0).all()


def test_equal_scores_give_every_key_the_same_share(tokenizer: MultiScaleTokenizer, batches: Batches) -> None:
    model = model_of(FullAttention())
    for block in model.blocks:
        torch.nn.init.zeros_(block.attention.qkv.weight)
    mass = attention_mass(model, tokenizer, batches, kernels=(1, 3))
    expected = torch.tensor([[1, 0, 0], [1 / 5, 4 / 5, 0], [1 / 21, 4 / 21, 16 / 21]], dtype=torch.float64)
    torch.testing.assert_close(mass.on_scale.mean(dim=0), expected)
    within = mass.within.mean(dim=0)
    torch.testing.assert_close(within[2], torch.tensor([1 / 16, 9 / 16], dtype=torch.float64))
    assert within[0, 0] == 1 and math.isnan(within[0, 1]), "no 3 x 3 window in a map of one token"


def test_a_neighborhood_holds_all_mass_of_spatial_attention(tokenizer: MultiScaleTokenizer, batches: Batches) -> None:
    mass = attention_mass(model_of(SpatialAttention(kernel_size=3, scales=1)), tokenizer, batches, kernels=(1, 3))
    torch.testing.assert_close(mass.within[:, 2, 1], torch.ones(2, dtype=torch.float64))
    assert (mass.within[:, 2, 0] < 1).all()


def test_measuring_attention_leaves_the_model_as_it_was(tokenizer: MultiScaleTokenizer, batches: Batches) -> None:
    model = model_of(FullAttention()).train()
    backends = [block.attention.backend for block in model.blocks]
    attention_mass(model, tokenizer, batches)
    assert [block.attention.backend for block in model.blocks] == backends and model.training


def test_attention_does_not_depend_on_how_images_are_batched(tokenizer: MultiScaleTokenizer, batches: Batches) -> None:
    model = model_of(FullAttention())
    joined = [(torch.cat([image for image, _ in batches]), torch.cat([label for _, label in batches]))]
    one, other = attention_mass(model, tokenizer, batches), attention_mass(model, tokenizer, joined)
    torch.testing.assert_close(one.on_scale, other.on_scale, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(one.within, other.within, rtol=1e-5, atol=1e-7, equal_nan=True)


def test_each_head_counts_alike_in_windows_however_little_it_spends_on_its_own_block() -> None:
    model = NextScaleTransformer([1, 2], attention=FullAttention(), vocab_size=16, code_dim=8, num_classes=3, depth=1,
                                 width=32, heads=2)  # fmt: skip
    sums = _Sums(model, (1,))
    watcher = _Watcher(model.blocks[0].attention.backend, 0, sums.add)
    scores_HlS = torch.zeros(2, 5, 5)
    scores_HlS[0] = math.log(3) * torch.eye(5)  # of the four tokens of its map, half on itself: 3 / (3 + 1 + 1 + 1)
    scores_HlS[0, 1:, 0] = 200.0  # and all but nothing on its map
    k_BHSD = torch.eye(5).expand(1, 2, 5, 5)
    watcher(scores_HlS[None] / 2, k_BHSD, k_BHSD, range(2), softmax_scale=2.0)
    assert sums.within[0, 1, 0] == pytest.approx((1 / 2 + 1 / 4) / 2, rel=1e-6)
    assert sums.on_scale[0, 1].tolist() == pytest.approx([(1 + 1 / 5) / 2, (0 + 4 / 5) / 2], rel=1e-6)


def test_windows_up_to_15_and_every_block_apart() -> None:
    torch.manual_seed(0)
    sides = [1, 16]
    tokenizer = MultiScaleTokenizer(
        sides, vocab_size=16, code_dim=8, channels=8, channel_multipliers=[1, 2], num_res_blocks=1, norm_groups=4
    )
    model = NextScaleTransformer(sides, attention=FullAttention(), vocab_size=16, code_dim=8, num_classes=3, depth=2,
                                 width=32, heads=2, gamma_init=0.5)  # fmt: skip
    torch.nn.init.zeros_(model.blocks[0].attention.qkv.weight)
    torch.nn.init.normal_(model.blocks[1].attention.qkv.weight)
    mass = attention_mass(model, tokenizer, [(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))])
    assert mass.kernels == (1, 3, 5, 7, 9, 11, 13, 15)
    even = torch.tensor([kernel**2 / 256 for kernel in mass.kernels], dtype=torch.float64)
    torch.testing.assert_close(mass.within[0, 1], even, rtol=1e-5, atol=0)
    torch.testing.assert_close(mass.even[1].double(), even)
    assert mass.within[0, 0, 1:].isnan().all()
    torch.testing.assert_close(mass.on_scale[0, 1], torch.tensor([1, 256], dtype=torch.float64) / 257)
    assert (mass.within[1, 1] - even).abs().max() > 1e-3, "the other block looks where it likes"
    assert abs(mass.on_scale[1, 1, 0] - 1 / 257) > 1e-4


@pytest.mark.parametrize("attention", [FullAttention(), AdjacentAttention(), SpatialAttention(5, scales=1)], ids=repr)
def test_attention_without_weights_lies_on_the_even_spread(attention: Any) -> None:
    """Under a neighborhood a window is compared with what can be seen, not with the whole map."""
    sides = [1, 8]
    tokenizer = MultiScaleTokenizer(
        sides, vocab_size=16, code_dim=8, channels=8, channel_multipliers=[1, 2], num_res_blocks=1, norm_groups=4
    )
    model = NextScaleTransformer(sides, attention=attention, vocab_size=16, code_dim=8, num_classes=3, depth=1,
                                 width=32, heads=2)  # fmt: skip
    torch.nn.init.zeros_(model.blocks[0].attention.qkv.weight)
    mass = attention_mass(model, tokenizer, [(torch.rand(2, 3, 16, 16), torch.tensor([0, 1]))])
    torch.testing.assert_close(mass.within[0].float(), mass.even, equal_nan=True)
    assert isinstance(attention, SpatialAttention) == (float(mass.even[1, 2]) == 1.0), "5x5 is all of a neighborhood"


def test_the_even_spread_is_drawn_up_to_the_window_that_holds_all_that_is_visible() -> None:
    from matplotlib.figure import Figure

    kernels, even = (1, 3, 5, 7), torch.tensor([[1.0, *[math.nan] * 3], [1 / 25, 9 / 25, 1.0, 1.0]])
    within = torch.tensor([[[1.0, *[math.nan] * 3], [0.1, 0.5, 1.0, 1.0]]])
    mass = AttentionMass(1, (1, 8), kernels, torch.ones(1, 2, 2).tril(), within, even, torch.zeros(1, 2))
    axis = Figure().subplots()
    _draw_windows(axis, mass, within[0, 1], 1, "black", "8x8")
    measured, spread = axis.lines
    assert list(measured.get_xdata()) == [1, 3, 5, 7]
    assert list(spread.get_xdata()) == [1, 3, 5] and list(spread.get_ydata()) == pytest.approx([4, 36, 100])


def test_the_table_compares_with_an_even_spread() -> None:
    on_scale = torch.tensor([[[1, 0], [0.3, 0.7]], [[1, 0], [0.5, 0.5]]], dtype=torch.float64)
    within = torch.tensor([[[1.0], [0.25]], [[1.0], [0.75]]], dtype=torch.float64)
    mass = AttentionMass(4, (1, 2), (1,), on_scale, within, within[0], torch.zeros(1, 2))
    tables = [part.strip().splitlines()[2:] for part in attention_markdown(mass).split("| query scale ")[1:]]
    shares, over_even, windows = ([line for line in table if line.startswith("|")] for table in tables)
    assert shares == ["| 1x1 | 100.0% |  |", "| 2x2 | 40.0% | 60.0% |"]
    assert over_even == ["| 1x1 | 1.00 |  |", "| 2x2 | 2.00 | 0.75 |"], "0.4 over 1/5, 0.6 over 4/5"
    assert windows == ["| 1x1 | 100.0% |", "| 2x2 | 50.0% |"]


def test_attention_of_nothing_is_told(tokenizer: MultiScaleTokenizer, batches: Batches) -> None:
    with pytest.raises(UserError, match="not one image"):
        attention_mass(model_of(FullAttention()), tokenizer, [])
    with pytest.raises(UserError, match="odd sides"):
        attention_mass(model_of(FullAttention()), tokenizer, batches, kernels=(2,))


# -- alignment


def test_residuals_that_repeat_an_input_are_aligned_with_it() -> None:
    pyramid = ScalePyramid([1, 2])
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(64, 1, 16, generator=generator)
    fine = torch.randn(64, 4, 16, generator=generator)
    x_BLC = torch.cat([coarse, fine], dim=1) + 10.0  # what all features share does not count
    residual_BLC = torch.cat([torch.randn(64, 1, 16, generator=generator), -3 * coarse.expand(-1, 4, -1)], dim=1)
    rfa = alignment_of(x_BLC, residual_BLC, pyramid)
    assert rfa[1, 0] == pytest.approx(-1, abs=1e-5), "the finer scale takes back what the coarse input says"
    assert abs(rfa[1, 1]) < 0.1 and abs(rfa[0, 0]) < 0.1
    assert math.isnan(rfa[0, 1])


def test_every_cell_of_a_coarse_map_lies_over_its_own_four() -> None:
    pyramid = ScalePyramid([1, 2, 4])
    generator = torch.Generator().manual_seed(0)
    x_BLC, residual_BLC = (torch.randn(32, 21, 16, generator=generator) for _ in range(2))
    coarse = x_BLC[:, 1:5]
    over = [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    residual_BLC[:, 5:] = 2 * coarse[:, over] - 7
    rfa = alignment_of(x_BLC, residual_BLC, pyramid)
    assert rfa[2, 1] == pytest.approx(1, abs=1e-5)
    assert abs(rfa[2, 0]) < 0.1 and abs(rfa[2, 2]) < 0.1


def test_the_residual_is_what_all_blocks_have_added(tokenizer: MultiScaleTokenizer, batches: Batches) -> None:
    model = model_of(AdjacentAttention())
    for block, factor in zip(model.blocks, (2.0, 0.25), strict=True):  # x -> 2 x -> x / 2: -x / 2 is added
        block.forward = lambda x_BlC, *others, factor=factor: factor * x_BlC
    found = residual_feature_alignment(model, tokenizer, batches)
    assert found.rfa_KK.diag().tolist() == pytest.approx([-1, -1, -1], abs=1e-4)


def test_the_figure_shows_signed_square_roots() -> None:
    found = Alignment(2, (1, 2), torch.tensor([[-0.25, math.nan], [0.09, -1e-6]]))
    assert found.signed_sqrt_KK.flatten().tolist() == pytest.approx([-0.5, math.nan, 0.3, 0], nan_ok=True)
    rows = alignment_markdown(found).splitlines()[-2:]
    assert rows == ["| 1x1 | -0.50 |  |", "| 2x2 | +0.30 | +0.00 |"]
    assert found.content()["rfa"] == [[-0.25], [0.09, -1e-6]], "as they are"


def test_alignment_of_a_model(tokenizer: MultiScaleTokenizer, batches: Batches) -> None:
    found = residual_feature_alignment(model_of(AdjacentAttention()), tokenizer, batches)
    lower = found.rfa_KK[*torch.tril_indices(3, 3)]
    assert found.images == 6 and (lower.abs() <= 1).all()
    assert [len(row) for row in found.content()["rfa"]] == [1, 2, 3]
    with pytest.raises(UserError, match="at least two"):
        residual_feature_alignment(model_of(AdjacentAttention()), tokenizer, [])


# -- perturbation


def test_one_token_of_one_scale_is_replaced_by_another_code(tokenizer: MultiScaleTokenizer) -> None:
    idx_Bl = torch.randint(16, (5, 4))
    change = Perturbation(tokenizer, 1, seeds=[7, 8, 9, 10, 11])
    same, _ = change(0, idx_Bl, torch.zeros(5, 4, 8))
    assert same is idx_Bl
    changed, codes = change(1, idx_Bl, torch.zeros(5, 4, 8))
    assert (changed != idx_Bl).sum(dim=1).tolist() == [1] * 5
    assert torch.equal(codes, tokenizer.quantizer.lookup(changed))
    again, _ = Perturbation(tokenizer, 1, seeds=[9])(1, idx_Bl[2:3], torch.zeros(1, 4, 8))
    assert torch.equal(again, changed[2:3]), "the place and the code depend on the seed alone"


def test_place_and_code_vary_over_seeds(tokenizer: MultiScaleTokenizer) -> None:
    idx_Bl = torch.zeros(60, 4, dtype=torch.int64)
    changed, _ = Perturbation(tokenizer, 1, seeds=range(60))(1, idx_Bl, torch.zeros(60, 4, 8))
    places = changed.ne(0).nonzero()[:, 1]
    assert (places.bincount(minlength=4) >= 5).all(), "each of the four places is struck"
    assert set(changed[changed != 0].tolist()) > set(range(1, 14)), "by nearly all codes"


def test_damage_of_every_scale_against_the_clean_images(tokenizer: MultiScaleTokenizer) -> None:
    settings = SamplingSettings(top_k=None, top_p=None)
    model = model_of(AdjacentAttention())
    damages, pictures = perturb(model, tokenizer, settings, count=5, batch_size=2, keep=3)
    assert [damage.scale for damage in damages] == [None, 0, 1, 2]
    assert damages[0].mse == damages[0].l1 == 0 and damages[0].fid is None
    assert all(damage.mse > 0 and damage.l1 > 0 for damage in damages[1:])
    assert [tuple(picture.shape) for picture in pictures] == [(3, 3, 8, 8)] * 4
    other, _ = perturb(model, tokenizer, settings, count=5, batch_size=5, keep=3)
    assert [damage.mse for damage in other] == pytest.approx([damage.mse for damage in damages], rel=1e-4)


def test_damage_is_the_mean_square_and_the_mean_distance_of_pixels() -> None:
    clean = torch.full((2, 3, 4, 4), 0.25)
    changed = clean.clone()
    changed[0] += 0.5
    changed[1, :, :2] -= 0.1
    measured = _damages(changed, clean, None)
    assert measured["mse"].mean() == pytest.approx((0.5**2 + 0.1**2 / 2) / 2, rel=1e-5)
    assert measured["l1"].mean() == pytest.approx((0.5 + 0.1 / 2) / 2, rel=1e-5)


def test_a_perceptual_distance_is_averaged_over_images(tokenizer: MultiScaleTokenizer) -> None:
    damages, _ = perturb(
        model_of(AdjacentAttention()),
        tokenizer,
        SamplingSettings(),
        count=3,
        perceptual=lambda a, b: (a - b).abs().amax(dim=(1, 2, 3)),
    )
    assert damages[0].lpips == 0 and all((damage.lpips or 0) > 0 for damage in damages[1:])


# -- scaling


def test_a_power_law_is_found_again() -> None:
    law = fit_power_law([(size, (2e-6 * size) ** -0.2) for size in (1e5, 1e6, 1e7, 1e8)])
    assert law.alpha == pytest.approx(-0.2) and law.beta == pytest.approx(2e-6) and law.r_squared == pytest.approx(1)
    assert law.at(1e6) == pytest.approx(2**-0.2)


def test_the_interval_is_students_by_hand() -> None:
    points = [(1e5, 3.0), (1e6, 2.5), (1e6, 2.3), (1e7, 2.1)]
    x, y = ([math.log(point[which]) for point in points] for which in (0, 1))
    mean_x, mean_y = sum(x) / 4, sum(y) / 4
    square = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / square
    rest = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    reach = 4.302653 * math.sqrt(rest / 2 / square)  # Student's t of 0.975 with 4 - 2 degrees of freedom, from a table
    law = fit_power_law(points)
    assert (law.alpha, law.low, law.high) == pytest.approx((slope, slope - reach, slope + reach), rel=1e-6)
    assert law.r_squared == pytest.approx(1 - rest / sum((b - mean_y) ** 2 for b in y))
    for size in (1e4, 1e6, 1e8):
        off = 4.302653 * math.sqrt(rest / 2 * (1 / 4 + (math.log(size) - mean_x) ** 2 / square))
        bounds = [math.log(bound / law.at(size)) for bound in Scaling("loss", tuple(points), law).band(size)]
        assert bounds == pytest.approx([-off, off], rel=1e-6), "the band of a fitted line"


SIZES = (1e4, 1e5, 1e6, 1e7)


def runs_of(*losses: Any, accuracy: float = 0.25) -> list[dict[str, Any]]:
    return [
        {"variant": f"d{number}", "seed": 0, "report": {"parameters": size, "metrics": {
            "val/loss": loss, "val/loss_last": 2.0, "val/accuracy": accuracy, "val/accuracy_last": number / 10}}}
        for number, (size, loss) in enumerate(zip(SIZES, losses, strict=True))
    ]  # fmt: skip


def test_an_error_rate_is_what_accuracy_lacks() -> None:
    found = {scaling.name: scaling.points for scaling in scaling_of(runs_of(4.0, 3.0, 2.0, 1.0))}
    assert found["loss"] == tuple(zip(SIZES, (4.0, 3.0, 2.0, 1.0), strict=True))
    assert [value for _, value in found["error rate"]] == [0.75] * 4
    assert [value for _, value in found["error rate, last scale"]] == pytest.approx([1.0, 0.9, 0.8, 0.7])


@pytest.mark.parametrize("last", [2.0, 2.0 + 1e-9, 2.0 - 1e-9])
def test_a_loss_that_does_not_change_is_fitted_too(last: float, tmp_path: Path) -> None:
    found = scaling_of(runs_of(2.0, 2.0, 2.0, last))
    law = found[0].law
    assert law.alpha == pytest.approx(0, abs=1e-6) and law.at(1e8) == pytest.approx(2)
    assert law.low <= law.alpha <= law.high
    content = json.loads(json.dumps(scaling_content(found), allow_nan=False))
    assert content["loss"]["beta"] is None and content["loss"]["intercept"] == pytest.approx(math.log(2))
    assert (content["loss"]["r_squared"] is None) == (last == 2.0)
    markdown = scaling_markdown(found)
    assert "nan" not in markdown and "| loss | 0.000 | 0.000 to 0.000 | " in markdown
    draw_scaling(found, tmp_path / "scaling.png")


def test_planned_runs_that_are_not_finished_are_named() -> None:
    lacking = [*runs_of(4.0, 3.0, 2.0, 1.0), {"variant": "d9", "seed": 1, "report": None}]
    found = scaling_of(lacking)
    assert len(found[0].points) == 4
    assert scaling_markdown(found).startswith("Not finished, so not in the fits: d9, seed 1.")
    assert scaling_content(found)["loss"]["missing"] == ["d9, seed 1"]
    with pytest.raises(UserError, match=r"2 runs; a power law needs three or more.*; not finished: d9, seed 1"):
        scaling_of(lacking[2:])


def test_what_is_no_report_is_told() -> None:
    with pytest.raises(UserError, match="run d1, seed 0 has val/loss 'a', no number"):
        scaling_of(runs_of(1.0, "a", 2.0, 3.0))
    with pytest.raises(UserError, match="has val/loss True, no number"):
        scaling_of(runs_of(True, 1.0, 2.0, 3.0))
    with pytest.raises(UserError, match="must be positive"):
        scaling_of(runs_of(1.0, math.inf, 2.0, 3.0))
    for wrong in (3, {"variant": "a", "report": [1]}):
        with pytest.raises(UserError, match="is no run"):
            scaling_of([wrong])  # type: ignore[list-item]
    with pytest.raises(UserError, match="run a has no val/loss"):
        scaling_of([{"variant": "a", "report": {"parameters": 3, "metrics": 3}}])
    with pytest.raises(UserError, match="run a has no parameters"):
        scaling_of([{"variant": "a", "report": {"metrics": {"val/loss": 3}}}])


def test_what_cannot_be_fitted_is_told() -> None:
    with pytest.raises(UserError, match="three or more"):
        fit_power_law([(1.0, 2.0), (2.0, 1.0)])
    with pytest.raises(UserError, match="must be positive"):
        fit_power_law([(1.0, 2.0), (2.0, 1.0), (3.0, 0.0)])
    with pytest.raises(UserError, match="run a has no val/loss; give a sweep of next-scale models"):
        scaling_of([{"variant": "a", "report": {"parameters": 5, "metrics": {"val/psnr": 20.0}}}])
    with pytest.raises(UserError, match="run b has no val/loss"):
        scaling_of([{"variant": "b", "report": {"parameters": 5, "metrics": {"val/loss": None}}}])


# -- breadth


def test_breadth_is_the_whole_history_of_an_even_look_back_and_nothing_of_the_own_map() -> None:
    even = torch.zeros(2, 3, 4, 10)
    even[..., :6] = 1 / 6
    own, sharp = torch.zeros(2, 3, 4, 10), torch.zeros(2, 3, 4, 10)
    own[..., 6:], sharp[..., 0] = 0.25, 1.0
    found = [float(breadth_of(share, 4)) / 2 for share in (even, own, sharp, (even + own) / 2)]
    assert found == pytest.approx([6, 0, 1, 3], abs=1e-6)
    assert float(breadth_of(own[..., 6:], 4)) == 0


def test_drafters_are_the_layers_that_look_most_broadly(tokenizer: MultiScaleTokenizer, batches: Batches) -> None:
    model = model_of(FullAttention())
    with torch.no_grad():
        model.blocks[0].attention.log_scale.fill_(4.0)  # type: ignore[union-attr]  # sharp
        model.blocks[1].attention.log_scale.fill_(-4.0)  # type: ignore[union-attr]  # even
    mass = attention_mass(model, tokenizer, batches)
    history = torch.tensor([1 / 5, 5 * 5 / 21])
    torch.testing.assert_close(mass.breadth[1, 1:].float(), history, atol=0.01, rtol=0)
    assert mass.breadth[0, 2] < mass.breadth[1, 2] and (mass.breadth[:, 0] == 0).all()
    assert mass.content()["drafters"] == [1] and "--cache-drafters 1\n" in attention_markdown(mass)
    adjacent = attention_mass(model_of(AdjacentAttention()), tokenizer, batches)
    assert adjacent.content()["drafters"] == [] and "drafters" not in attention_markdown(adjacent)
