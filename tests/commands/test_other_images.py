"""Images that are neither square nor RGB, from arrays to pictures: trained, sampled, edited, rebuilt, evaluated."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from mvar_lightning import MultiScaleTokenizer, NextScaleTransformer, UserError, load, save
from mvar_lightning.checkpoints import export_official
from mvar_lightning.checkpoints.source import open_tokenizer
from mvar_lightning.cli import main
from mvar_lightning.commands import options
from mvar_lightning.runs.recipe_check import check_quickly

TOKENIZER: dict[str, Any] = {
    "scales": [[1, 1], [1, 2], [2, 4]],
    "vocab_size": 16,
    "code_dim": 4,
    "channels": 8,
    "channel_multipliers": [1, 1, 1],
    "num_res_blocks": 1,
    "norm_groups": 4,
}
"""8 x 16 pixels."""

CRITIC = {
    "class_path": "mvar_lightning.AdversarialLoss",
    "init_args": {
        "discriminator": {"class_path": "mvar_lightning.PatchDiscriminator", "init_args": {"layers": 1}},
        "augment": {"class_path": "mvar_lightning.DiffAugment"},
        "start": 0,
    },
}
MODEL: dict[str, Any] = {
    "tokenizer": "runs/tokenizer/model",
    "depth": 1,
    "width": 16,
    "heads": 2,
    "attention": {"class_path": "mvar_lightning.SpatialAttention", "init_args": {"kernel_size": 3, "scales": 1}},
}
SHARDS = {"path": "shards", "image_size": [8, 16], "batch_size": 8, "num_workers": 0, "resize_ratio": 1.0}
TOKENS = {"path": "tokens", "batch_size": 8, "num_workers": 0, "images": "shards"}
TRAINER: dict[str, Any] = {"max_epochs": 1, "accelerator": "cpu", "num_sanity_val_steps": 0}
SCALES = [1, [1, 2], [2, 4]]


class ChannelMeans(torch.nn.Module):
    """Features that know RGB alone: the mean of each channel."""

    def forward(self, image_B3HW: Tensor) -> Tensor:
        assert image_B3HW.shape[1] == 3
        return image_B3HW.mean(dim=(2, 3))


def write_recipe(file: str, model: str, settings: dict[str, Any], callbacks: list[str], **more: Any) -> None:
    recipe = {
        "seed_everything": 0,
        "model": {"class_path": f"mvar_lightning.{model}", "init_args": settings},
        "data": {"class_path": "mvar_lightning.ShardsDataModule", "init_args": SHARDS},
        "trainer": {**TRAINER, "callbacks": [{"class_path": f"mvar_lightning.callbacks.{each}"} for each in callbacks]},
        **more,
    }
    Path(file).write_text(yaml.safe_dump(recipe))


def mvar(words: str, status: int = 0) -> None:
    assert main(words.split()) == status, words


def test_sizes_of_a_wide_tokenizer(tmp_path: Path) -> None:
    """8 x 16 pixels, however a command or a script says so; a released file on maps that are no squares."""
    wide = MultiScaleTokenizer(**TOKENIZER)
    save(tmp_path / "wide", None, wide)
    for size in ([8, 16], (8, 16)):
        assert open_tokenizer(tmp_path / "wide", image_size=size).image_size == (8, 16)
    for size, words in (((16, 8), "16x8: this tokenizer takes images of 8 x 16"), ("wide", "or \\[height, width\\]")):
        with pytest.raises(UserError, match=words):
            open_tokenizer(tmp_path / "wide", image_size=size)  # type: ignore[arg-type]
    parser = argparse.ArgumentParser(exit_on_error=False)
    options.add_tokenizer(parser)
    words = ["--checkpoint", "x", "--image-size", "8x16", "--patch-nums", "1x1,1x2,2x4"]
    args = parser.parse_args(words)
    assert args.image_size == (8, 16) and args.patch_nums == (1, (1, 2), (2, 4))
    for wrong in ("--image-size=8x16x2", "--image-size=x8", "--image-size=-8", "--patch-nums=1,x", "--patch-nums=1,,2"):
        with pytest.raises(argparse.ArgumentError, match="x"):
            parser.parse_args([*words, wrong])
    square = MultiScaleTokenizer(**{**TOKENIZER, "scales": [1, 2], "channels": 32, "norm_groups": 32})
    model = NextScaleTransformer([1, 2], vocab_size=16, code_dim=4, num_classes=3, depth=1, width=16, heads=2)
    export_official(model, square, tmp_path / "m.pth", tmp_path / "t.pth")
    assert open_tokenizer(tmp_path / "t.pth", args.patch_nums, args.image_size).image_size == (8, 16)


def test_channels_are_the_datas() -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "tokenizer" / "digits.yaml"
    with pytest.raises(UserError, match=r"override --model.image_channels=1: .* is told by the data"):
        check_quickly(recipe, ["--model.image_channels=1"])


@pytest.mark.slow
def test_wide_transparent_images_from_arrays_to_pictures(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 12, 20, 4), dtype=np.uint8)
    np.savez("arrays.npz", images=pixels, labels=np.arange(48) % 3)
    mvar("shards make arrays.npz shards --channels 4 --val-fraction 0.25")
    pictures = ["ReconstructionGrid", "ReconstructionStrips"]
    write_recipe("tokenizer.yaml", "TokenizerModule", {**TOKENIZER, "adversarial": CRITIC}, pictures)
    pictures = ["SampleGrid", "CoarseToFine", "AttentionMaskPicture"]
    write_recipe("var.yaml", "VARModule", MODEL, pictures, tokenizer_recipe="tokenizer.yaml")
    mvar("train var.yaml")
    model, tokenizer = load("runs/var")
    assert model is not None and tokenizer.image_shape == (4, 8, 16) and model.num_classes == 3
    config = json.loads(Path("runs/var/model/config.json").read_text())
    assert config["model"]["scales"] == config["tokenizer"]["scales"] == SCALES
    assert config["tokenizer"]["image_channels"] == 4

    mvar("sample --checkpoint runs/var --out samples --classes 0,2 --count 2 --format npz --device cpu")
    made = sorted(Path("samples").glob("0*.png"))
    with Image.open(made[0]) as picture:
        assert (picture.mode, picture.size, len(made)) == ("RGBA", (16, 8), 4)
    assert np.load("samples/samples.npz")["arr_0"].shape == (4, 8, 16, 3)

    Image.fromarray(pixels[0]).resize((40, 30)).save("given.png")
    capsys.readouterr()
    mvar("edit --checkpoint runs/var --image given.png --box 20,0,40,30 --count 1 --out edits --device cpu")
    assert "the middle 40 x 20 (width x height) are used, at 16 x 8" in capsys.readouterr().out
    mvar("reconstruct --checkpoint runs/var given.png --out strip.png --device cpu")
    mvar("reconstruct --checkpoint runs/var strip.png --out no.png --device cpu", status=2)
    assert "it is RGB of 8 bits, not RGBA" in capsys.readouterr().err and not Path("no.png").exists()
    mvar("info runs/var")
    assert "8 x 16 pixels" in capsys.readouterr().out

    mvar("evaluate tokenizer --checkpoint runs/var --data shards --features none --out report --device cpu")
    torch.jit.save(torch.jit.script(ChannelMeans()), "means.pt")
    mvar(
        "evaluate images --checkpoint runs/var --reference shards --count 3 --features means.pt --out report "
        "--device cpu"
    )
    assert json.loads(Path("report/images.json").read_text())["fid"] >= 0
    report = json.loads(Path("report/tokenizer.json").read_text())
    assert report["image_size"] == [8, 16] and report["tokens_per_image"] == 11
    assert [scale["side"] for scale in report["scales"]] == SCALES


@pytest.mark.slow
def test_a_token_cache_of_wide_gray_scans(workplace: Path) -> None:
    """16 bits to tokens, a model trained on these, and pictures of its own as 8-bit gray."""
    pixels = np.random.default_rng(0).integers(0, 2**16, (48, 8, 16), dtype=np.uint16)
    np.savez("arrays.npz", images=pixels, labels=np.arange(48) % 3)
    mvar("shards make arrays.npz shards --channels 1 --bits 16 --val-fraction 0.25")
    write_recipe("tokenizer.yaml", "TokenizerModule", TOKENIZER, [])
    mvar("train tokenizer.yaml")
    mvar("tokens make --checkpoint runs/tokenizer --data shards --out tokens --accelerator cpu --num-workers 0")
    settings = json.loads(Path("tokens/tokens.json").read_text())["settings"]
    assert settings["scales"] == SCALES and settings["image_size"] == [8, 16]
    mvar("tokens check tokens")
    cached = {"class_path": "mvar_lightning.TokenShards", "init_args": TOKENS}
    write_recipe("var.yaml", "VARModule", MODEL, ["SampleGrid"], data=cached)
    mvar("train var.yaml")
    mvar("sample --checkpoint runs/var --out samples --classes 0 --count 1 --device cpu")
    (made,) = Path("samples").glob("0*.png")
    with Image.open(made) as picture:
        assert (picture.mode, picture.size) == ("L", (16, 8))
    mvar("evaluate tokenizer --checkpoint runs/tokenizer --data data/digits --features none", status=2)
