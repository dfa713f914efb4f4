"""Evaluation of a tokenizer: every number against a direct computation, every mistake told."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_run import TOKENIZER_SIZES
from torch import Tensor, nn
from torch.nn import functional as F

from mvar_lightning import MultiScaleTokenizer
from mvar_lightning.data.transforms import center_crop
from mvar_lightning.errors import UserError
from mvar_lightning.evaluation.image_sources import SizeWatch
from mvar_lightning.evaluation.reports import FILES, ScaleReport, write_evaluation
from mvar_lightning.evaluation.strips import progressive_picture, reconstruct_after_each_scale
from mvar_lightning.evaluation.tokenizer import evaluate_tokenizer
from mvar_lightning.metrics import FeatureExtractor, FrechetDistance, as_saved
from mvar_lightning.metrics.quality import psnr, ssim
from mvar_lightning.tools.drawing import broken, from_image, labeled_rows

NUM_IMAGES, SIDE = 12, 16


def make_tokenizer(**changes: Any) -> MultiScaleTokenizer:
    torch.manual_seed(0)
    tokenizer = MultiScaleTokenizer(**{**TOKENIZER_SIZES, **changes})
    nn.init.normal_(tokenizer.quantizer.codebook.weight, std=0.5)
    return tokenizer


def make_images(count: int = NUM_IMAGES, seed: int = 0) -> Tensor:
    """In [-1, 1], of 256 levels."""
    levels = torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(seed))
    return levels / 127.5 - 1


class Loader:
    """Batches of images; counts how often it was read."""

    def __init__(self, image_N3HW: Tensor, batch_size: int) -> None:
        self.batches = image_N3HW.split(batch_size)
        self.passes = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.passes += 1
        return ({"image": image_B3HW} for image_B3HW in self.batches)


class Colors(FeatureExtractor):
    """Mean and spread of each color."""

    def __init__(self) -> None:
        super().__init__("colors", 6)

    def extract(self, image_B3HW: Tensor) -> Tensor:
        return torch.cat([image_B3HW.mean(dim=(2, 3)), image_B3HW.std(dim=(2, 3))], dim=1)


class Distance(nn.Module):
    """Stands for LPIPS."""

    def forward(self, a_B3HW: Tensor, b_B3HW: Tensor) -> Tensor:
        assert a_B3HW.min() < -0.1 and a_B3HW.max() > 0.1, "not in [-1, 1]"
        return (a_B3HW - b_B3HW).abs().mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def tokenizer() -> MultiScaleTokenizer:
    return make_tokenizer()


@torch.no_grad()
def test_every_number_equals_a_direct_computation(tokenizer: MultiScaleTokenizer) -> None:
    images, loader = make_images(), Loader(make_images(), 5)
    report = evaluate_tokenizer(tokenizer, loader, extractor=Colors(), lpips=Distance())
    assert loader.passes == 1 and report.images == NUM_IMAGES
    idx_NL = tokenizer.encode(images)
    again, real = as_saved((tokenizer.decode(idx_NL) + 1) / 2), (images + 1) / 2
    errors = (again - real).square().mean(dim=(1, 2, 3))
    assert report.psnr == pytest.approx(float((-10 * errors.log10()).mean()), rel=1e-5)
    assert report.ssim == pytest.approx(float(ssim(real, again).mean()), rel=1e-4) and abs(report.ssim) < 1
    assert report.lpips == pytest.approx(float((again - real).abs().mean()) * 2, rel=1e-4)
    distance = FrechetDistance(Colors())
    distance.update(real, real=True)
    distance.update(again, real=False)
    assert report.frechet is not None and report.frechet.rfid == pytest.approx(distance.compute(), rel=1e-4)
    assert report.frechet.floor is None
    for scale, idx_Nl in zip(report.scales, tokenizer.pyramid.split(idx_NL), strict=True):
        _, counts = idx_Nl.unique(return_counts=True)
        share = counts / counts.sum()
        assert (scale.codes_used, scale.tokens_seen) == (len(counts), idx_Nl.numel())
        assert scale.usage == len(counts) / min(32, idx_Nl.numel())
        assert scale.bits_per_token == pytest.approx(-float((share * share.log2()).sum()), abs=1e-5)
    assert report.fixed_bits == 21 * 5
    assert report.entropy_bits == pytest.approx(sum(s.side**2 * s.bits_per_token for s in report.scales))
    assert 0 < report.entropy_bits < report.fixed_bits


@torch.no_grad()
def test_the_psnr_after_a_scale_is_of_the_codes_up_to_it(tokenizer: MultiScaleTokenizer) -> None:
    images, quantizer, sides = make_images(), tokenizer.quantizer, tokenizer.pyramid.sides
    report = evaluate_tokenizer(tokenizer, Loader(images, 5), progressive_images=7)
    images = images[:7]
    f_hat, found = torch.zeros(7, tokenizer.code_dim, sides[-1], sides[-1]), []
    for scale, idx_Nl in enumerate(tokenizer.pyramid.split(tokenizer.encode(images))):
        codes = quantizer.codebook.weight[idx_Nl].transpose(1, 2).reshape(7, -1, sides[scale], sides[scale])
        if scale < len(sides) - 1:
            codes = F.interpolate(codes, size=(sides[-1], sides[-1]), mode="bicubic")
        conv = quantizer.phi[quantizer.phi_index[scale]]
        f_hat = f_hat + 0.5 * codes + 0.5 * F.conv2d(codes, conv.weight, conv.bias, padding=1)
        again = tokenizer.decoder(tokenizer.post_quant_conv(f_hat)).clamp(-1, 1)
        errors = (as_saved((again + 1) / 2) - (images + 1) / 2).square().mean(dim=(1, 2, 3))
        found.append(float((-10 * errors.log10()).mean()))
    assert [scale.psnr for scale in report.scales] == pytest.approx(found, rel=1e-5)
    assert len({round(value, 2) for value in found}) == 3, "scales that change nothing would show nothing"


def test_the_batches_do_not_matter(tokenizer: MultiScaleTokenizer) -> None:
    contents = []
    for batch_size in (5, NUM_IMAGES):
        loader = Loader(make_images(), batch_size)
        report = evaluate_tokenizer(tokenizer, loader, num_images=11, progressive_images=7, extractor=Colors())
        contents.append(report.content())
        assert (report.images, report.progressive_images) == (11, 7)
        assert len(report.examples.image_N3HW) == 11 and report.examples.after_NK3HW.shape[:2] == (6, 3)
    one, other = contents
    for name in ("psnr", "ssim"):
        assert one[name] == pytest.approx(other[name], rel=1e-4)
    for mine, theirs in zip(one["scales"], other["scales"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert any("first 7 images" in note for note in one["notes"])


def test_the_last_scale_is_the_reconstruction(tokenizer: MultiScaleTokenizer) -> None:
    report = evaluate_tokenizer(tokenizer, Loader(make_images(), 4))
    assert report.scales[-1].psnr == pytest.approx(report.psnr)
    assert torch.equal(report.examples.after_NK3HW[:, -1], report.examples.again_N3HW[:6])
    assert report.frechet is None and report.lpips is None
    assert any("LPIPS left out" in note for note in report.notes)


def test_the_floor_is_of_as_many_other_images(tokenizer: MultiScaleTokenizer) -> None:
    others = make_images(40, seed=1)
    report = evaluate_tokenizer(
        tokenizer, Loader(make_images(), 4), extractor=Colors(), floor_loader=Loader(others, 7), num_images=9
    )
    distance = FrechetDistance(Colors())
    distance.update((make_images()[:9] + 1) / 2, real=True)
    distance.update((others[:9] + 1) / 2, real=False)
    assert report.frechet is not None
    assert (report.frechet.images, report.frechet.floor_images) == (9, 9)
    assert report.frechet.floor == pytest.approx(distance.compute(), rel=1e-4)


def test_a_single_image_has_no_rfid(tokenizer: MultiScaleTokenizer) -> None:
    report = evaluate_tokenizer(
        tokenizer, Loader(make_images(1), 1), extractor=Colors(), floor_loader=Loader(make_images(3), 3)
    )
    assert report.frechet is None and any("rFID left out" in note for note in report.notes)
    json.dumps(report.content(), allow_nan=False)


def test_any_tokenizer_and_its_mode_stays() -> None:
    tokenizer = make_tokenizer(codes="cosine", scales=[4], phi_ratio=0.0).train()
    report = evaluate_tokenizer(tokenizer, Loader(make_images(4), 4))
    assert tokenizer.training and [scale.side for scale in report.scales] == [4]


def test_constant_images(tokenizer: MultiScaleTokenizer) -> None:
    report = evaluate_tokenizer(tokenizer, Loader(torch.full((3, 3, SIDE, SIDE), -1.0), 3), extractor=Colors())
    json.dumps(report.content(), allow_nan=False)
    assert report.scales[0].perplexity == 1.0


def test_perfect_and_tiny_images() -> None:
    image = torch.zeros(2, 3, 4, 4)
    assert psnr(image, image).tolist() == [100.0, 100.0]
    assert psnr(image, image + 0.001).tolist() == [100.0, 100.0], "what a PNG cannot hold does not count"
    assert ssim(image, image).isnan().all()
    assert float(psnr(image, image + 1)[0]) == 0.0


def test_one_code_takes_no_bits() -> None:
    scale = ScaleReport(side=2, tokens_seen=8, codes_used=1, codes_possible=8, perplexity=1.0, psnr=9.0)
    assert (scale.usage, scale.bits_per_token, scale.entropy_bits) == (0.125, 0.0, 0.0)
    assert replace(scale, perplexity=4.0).entropy_bits == 8.0


def test_mistakes_are_told(tokenizer: MultiScaleTokenizer) -> None:
    with pytest.raises(UserError, match="not one image"):
        evaluate_tokenizer(tokenizer, [])
    with pytest.raises(UserError, match=r"takes \(B, 3, 16, 16\)"):
        evaluate_tokenizer(tokenizer, [{"image": torch.zeros(2, 3, 8, 8)}])
    with pytest.raises(UserError, match="NaN"):
        evaluate_tokenizer(tokenizer, [{"image": torch.full((2, 3, SIDE, SIDE), math.nan)}])
    with pytest.raises(UserError, match="images 0: give 1 or more"):
        evaluate_tokenizer(tokenizer, [], num_images=0)
    with pytest.raises(UserError, match="progressive images 0"):
        evaluate_tokenizer(tokenizer, [], progressive_images=0)


def test_damaged_weights_are_told() -> None:
    tokenizer = make_tokenizer()
    nn.init.constant_(tokenizer.decoder.conv_out.weight, 3e38)
    nn.init.constant_(tokenizer.decoder.norm_out.weight, 3e38)
    with pytest.raises(UserError, match="reconstruction of images 1 to 2"):
        evaluate_tokenizer(tokenizer, Loader(make_images(2), 2))
    nn.init.constant_(tokenizer.decoder.conv_out.weight, math.nan)
    with pytest.raises(UserError, match=r"decoder\.conv_out\.weight is NaN"):
        evaluate_tokenizer(tokenizer, Loader(make_images(2), 2))


def test_files(tokenizer: MultiScaleTokenizer, tmp_path: Path) -> None:
    report = evaluate_tokenizer(
        tokenizer, Loader(make_images(), 4), extractor=Colors(), floor_loader=Loader(make_images(20, 1), 4)
    )
    for _ in range(2):  # an earlier evaluation is replaced
        paths = write_evaluation(report, {"data": "here", "lpips_weights": None}, tmp_path / "new" / "out")
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == sorted(FILES)
    numbers, table, pairs, strips, usage = paths
    content = json.loads(numbers.read_text())
    assert content["data"] == "here" and content["psnr"] == report.psnr and len(content["scales"]) == 3
    text = table.read_text()
    assert f"| PSNR | {report.psnr:.2f} dB |" in text and "| FID of other real images | " in text
    assert "| 2 x 2 | " in text and "- data: here" in text and "lpips weights" not in text
    assert Image.open(pairs).size == (8 * 66 + 2, 4 * 68)
    assert Image.open(strips).width == 4 * 68 + 4
    assert Image.open(usage).width > 800


def test_a_folder_that_cannot_be_written(tokenizer: MultiScaleTokenizer, tmp_path: Path) -> None:
    report = evaluate_tokenizer(tokenizer, Loader(make_images(2), 2))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_evaluation(report, {}, tmp_path / "file")


def test_strips_hold_the_images_under_labels_and_above_captions() -> None:
    cells = torch.rand(2, 3, 3, 64, 64)
    picture = labeled_rows(cells, ["a", "b", "c"], [["1", "2", ""], ["", "", ""]])
    line = (picture.shape[1] - 2 * 72) // 3
    assert picture.shape == (3, 3 * line + 2 * 72, 3 * 68 + 4)
    levels = cells.mul(255).round() / 255
    for row in range(2):
        for column in range(3):
            y, x = line + row * (72 + line) + 4, 4 + column * 68
            assert torch.equal(picture[:, y : y + 64, x : x + 64], levels[row, column])
    ink = picture.amin(dim=0) < 0.5
    below = [ink[line + 72 : 2 * line + 72, 4 + 68 * column : 68 + 68 * column].any() for column in range(3)]
    assert ink[:line].any() and [bool(seen) for seen in below] == [True, True, False]
    assert not ink[2 * line + 2 * 72 :].any()


def test_labels_wider_than_a_column_take_lines_and_stay_apart() -> None:
    def picture(*labels: str) -> torch.Tensor:
        return labeled_rows(torch.zeros(1, 2, 3, 64, 64), labels, [["", ""]])

    short, wide = picture("a", "b"), picture("default with cosine codes", "a" * 30)
    head = wide.shape[1] - short.shape[1] + (short.shape[1] - 72) // 2
    ink = wide[:, :head].amin(dim=0) < 0.9
    assert not ink[:, [0, 1, 69, 70, 138, 139]].any()
    assert ink[:, 4:68].any() and ink[:, 72:136].any() and not wide[:, head + 4 : head + 68, 4:68].any()
    assert broken("default with cosine codes", len, 12) == ["default with", "cosine codes"]
    assert broken("of restarted codes", len, 6) == ["of", "restar", "ted", "codes"]
    assert broken("", len, 6) == [""]


def test_progressive_picture_ends_with_the_original(tokenizer: MultiScaleTokenizer) -> None:
    images = (make_images(2) + 1) / 2
    after = reconstruct_after_each_scale(tokenizer, images)
    assert after.shape == (2, 3, 3, SIDE, SIDE)
    again = (tokenizer.decode(tokenizer.encode(images * 2 - 1)) + 1) / 2
    assert torch.allclose(after[:, -1], again, atol=1e-5)
    picture = progressive_picture(images, after, tokenizer.pyramid.sides)
    line = (picture.shape[1] - 2 * 72) // 3
    original = images[0].repeat_interleave(4, 1).repeat_interleave(4, 2)
    shown = picture[:, line + 4 : line + 68, 3 * 68 + 4 : 3 * 68 + 68]
    assert torch.allclose(shown, original, atol=1 / 500)


def test_images_that_were_enlarged_are_noticed() -> None:
    watch: Any = SizeWatch(lambda image, rng: center_crop(image.resize((SIDE, SIDE)), SIDE), SIDE)
    picture = Image.new("RGB", (20, SIDE))
    assert from_image(watch(picture, None)).shape == (3, SIDE, SIDE) and not watch.enlarged
    watch(picture.resize((20, 8)), None)
    assert watch.enlarged
