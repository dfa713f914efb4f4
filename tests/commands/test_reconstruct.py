"""`mvar reconstruct` of several tokenizers side by side, and of images of a shard folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from small_run import TOKENIZER_SIZES

from mvar_lightning import MultiScaleTokenizer, ShardsDataModule, load, normalize, save
from mvar_lightning.cli import main
from mvar_lightning.commands.reconstruct import named_path
from mvar_lightning.evaluation.strips import comparison_picture
from mvar_lightning.metrics.quality import psnr
from mvar_lightning.tools.drawing import from_image

Fails = Callable[..., str]
CELL, GAP = 64, 4


def cells(path: Path, rows: int, columns: int) -> torch.Tensor:
    """The images of a picture: (rows, columns, 3, 64, 64)."""
    with Image.open(path) as image:
        picture = from_image(image)
    line = (picture.shape[1] - rows * (CELL + 2 * GAP)) // (rows + 1)
    assert picture.shape[2] == columns * (CELL + GAP) + GAP
    found = []
    for row in range(rows):
        y = line + row * (CELL + 2 * GAP + line) + GAP
        lefts = [GAP + column * (CELL + GAP) for column in range(columns)]
        found.append(torch.stack([picture[:, y : y + CELL, x : x + CELL] for x in lefts]))
    return torch.stack(found)


@torch.no_grad()
def test_tokenizers_side_by_side(
    tokenizer: Path, other_tokenizer: Path, shards: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = ["--checkpoint", f"one={tokenizer}", "--checkpoint", f"the other={other_tokenizer}"]
    assert main(["reconstruct", *named, "--data", str(shards), "--images", "3", "--out", "strip.png"]) == 0
    assert "strip.png: 3 images beside those of one, the other" in capsys.readouterr().out
    found = cells(Path("strip.png"), 3, 3)
    batches = ShardsDataModule(str(shards), 16, 32, num_workers=0).ordered_dataloader("val")
    images = torch.cat([normalize(batch["image"]) for batch in batches])[:3]
    expected = [images]
    for path in (tokenizer, other_tokenizer):
        loaded = load(path)[1]
        expected.append(loaded.decode(loaded.encode(images)))
    for column, image_N3HW in enumerate(expected):
        large = ((image_N3HW + 1) / 2).clamp(0, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
        assert torch.allclose(found[:, column], large, atol=2 / 255), column


def test_captions_are_the_psnr(monkeypatch: pytest.MonkeyPatch) -> None:
    from mvar_lightning.evaluation import strips

    written: list[object] = []
    monkeypatch.setattr(strips, "labeled_rows", lambda *arguments: written.extend(arguments[1:]))
    images, again = torch.rand(2, 3, 16, 16), {"a": torch.rand(2, 3, 16, 16), "b": torch.rand(2, 3, 16, 16)}
    comparison_picture(images, again)
    expected = [["", *(f"{float(psnr(images, again[name])[row]):.1f} dB" for name in "ab")] for row in range(2)]
    assert written == [["image", "a", "b"], expected]


def test_images_of_a_shard_folder_after_each_scale(
    tokenizer: Path, shards: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reconstruct", "--checkpoint", str(tokenizer), "--data", str(shards)]) == 0
    assert "strip.png: 8 images after each of 3 scales" in capsys.readouterr().out
    cells(Path("strip.png"), 8, 4)


def test_names() -> None:
    assert named_path("plain=runs/x/seed0") == ("plain", "runs/x/seed0")
    assert named_path("runs/tokenizer/photos") == ("photos", "runs/tokenizer/photos")
    assert named_path("runs/a=b/model") == ("model", "runs/a=b/model")


def test_mistakes(tokenizer: Path, other_tokenizer: Path, shards: Path, workplace: Path, fails: Fails) -> None:
    start = ["reconstruct", "--checkpoint", tokenizer]
    assert "give either files of images or --data SHARDS" in fails(*start)
    assert "give either files of images or --data SHARDS" in fails(*start, "a.png", "--data", shards)
    assert "--images 3: counts images of --data" in fails(*start, "a.png", "--images", 3)
    assert "--images 0: must be at least 1" in fails(*start, "--data", shards, "--images", 0)
    assert "two are called tokenizer; give each a name" in fails(*start, "--checkpoint", tokenizer, "--data", shards)
    Path("folder.png").mkdir()
    assert "--out folder.png: is a folder" in fails(*start, "--data", shards, "--out", "folder.png")
    save("large", None, MultiScaleTokenizer(**{**TOKENIZER_SIZES, "scales": [1, 2, 8]}))
    told = fails(*start, "--checkpoint", "large", "--data", shards)
    assert "--checkpoint large: takes images of 32 x 32, tokenizer of 16 x 16" in told
    shutil.copytree(other_tokenizer, "run/model")
    data = {"init_args": {"resize_ratio": 1.0, "val_crop": "center"}}
    Path("run/config.yaml").write_text(yaml.safe_dump({"data": data}))
    told = fails(*start, "--checkpoint", "run", "--data", shards)
    assert "--checkpoint run: cuts images with --resize-ratio 1.0 --crop center" in told and "give both options" in told
    options = ["--data", str(shards), "--images", "1", "--resize-ratio", "1", "--crop", "center"]
    assert main([*map(str, start), "--checkpoint", "run", *options]) == 0
