"""`mvar evaluate tokenizer` and `mvar reconstruct`: every kind of checkpoint, and mistakes told in one line."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden_formula import load_case
from PIL import Image
from reference_files import write_case

from mvar_lightning import load, save
from mvar_lightning.checkpoints.source import open_tokenizer
from mvar_lightning.cli import main
from mvar_lightning.data.index import read_index
from mvar_lightning.evaluation import features as judge
from mvar_lightning.evaluation.reports import FILES
from mvar_lightning.tokenizer import fingerprint, perceptual

Fails = Callable[..., str]


def evaluate(*arguments: object) -> int:
    return main(["evaluate", "tokenizer", *(str(argument) for argument in arguments)])


def content(folder: Path) -> dict[str, object]:
    return json.loads((folder / "tokenizer.json").read_text())


@pytest.fixture
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TorchScript file: four numbers an image."""
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    path = tmp_path_factory.mktemp("features") / "means.pt"
    torch.jit.save(torch.jit.trace(network, torch.zeros(1, 3, 16, 16)), str(path))
    return path


def test_a_saved_tokenizer(
    tokenizer: Path, shards: Path, workplace: Path, features: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--checkpoint", tokenizer, "--data", shards, "--features", features, "--out", "out/here"]
    assert evaluate(*options) == 0
    assert sorted(path.name for path in Path("out/here").iterdir()) == sorted(FILES)
    found = content(Path("out/here"))
    assert found["images"] == read_index(shards).split("val").samples == 32
    assert found["tokenizer_hash"] == fingerprint(load(tokenizer)[1])
    assert found["rfid"]["floor_images"] == 32 and found["rfid"]["features"] == "means"  # type: ignore[index]
    printed = capsys.readouterr().out
    assert "PSNR" in printed and "4 x 4" in printed and "out/here/usage.png" in printed
    # the same again, in other batches
    assert evaluate(*options[:-1], "again", "--batch-size", 7) == 0
    again = content(Path("again"))
    assert again["psnr"] == pytest.approx(found["psnr"]) and again["scales"][2] == pytest.approx(found["scales"][2])  # type: ignore[index]


def test_other_split_and_few_images(tokenizer: Path, shards: Path, workplace: Path) -> None:
    shutil.copytree(tokenizer, "run/model")
    options = ["--data", shards, "--features", "none", "--split", "train", "--images", 9, "--progressive-images", 2]
    assert evaluate("--checkpoint", "run", *options) == 0
    found = content(Path("run/evaluation"))
    assert (found["images"], found["progressive_images"], found["rfid"]) == (9, 2, None)
    assert evaluate("--checkpoint", "run/model", *options[:-2], "--crop", "adm") == 0
    assert content(Path("run/evaluation"))["crop"] == "adm", "a run's folder and its model go to the same place"


def test_features_of_the_data(tokenizer: Path, shards: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "STEPS", (2, 2))
    shutil.copytree(shards, "shards")
    for _ in range(2):
        assert evaluate("--checkpoint", tokenizer, "--data", "shards", "--out", "out", "--images", 8) == 0
        assert len(list(Path("shards/classifier").glob("*.safetensors"))) == 1
    found = content(Path("out"))
    assert found["rfid"]["features"] == "classifier"  # type: ignore[index]
    assert any("8 images are too few for 64 features" in note for note in found["notes"])  # type: ignore[attr-defined]


def test_lpips_where_weights_are_given(
    tokenizer: Path, shards: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Constant(torch.nn.Module):
        def __init__(self, vgg_weights: str) -> None:
            super().__init__()
            assert vgg_weights == "vgg.pth"

        def forward(self, a_B3HW: torch.Tensor, b_B3HW: torch.Tensor) -> torch.Tensor:
            return a_B3HW.new_full((len(a_B3HW),), 0.25)

    monkeypatch.setattr(perceptual, "LPIPS", Constant)
    options = ["--data", shards, "--features", "none", "--images", 3, "--lpips", "vgg.pth", "--out", "out"]
    assert evaluate("--checkpoint", tokenizer, *options) == 0
    found = content(Path("out"))
    assert found["lpips"] == 0.25 and not any("LPIPS" in note for note in found["notes"])  # type: ignore[attr-defined]


def test_the_tokenizer_of_a_next_scale_model(checkpoint: Path, tokenizer: Path) -> None:
    assert fingerprint(open_tokenizer(checkpoint)) == fingerprint(open_tokenizer(tokenizer))


def test_a_released_tokenizer(workplace: Path, shards: Path, fails: Fails) -> None:
    model, released = write_case("var_tiny", workplace)
    case, _ = load_case("var_tiny")
    sides = ",".join(map(str, case["patch_nums"]))
    options = ["--data", shards, "--features", "none", "--images", 2, "--out", "out"]
    assert evaluate("--checkpoint", released, "--patch-nums", sides, *options) == 0
    found = content(Path("out"))
    assert found["tokens_per_image"] == sum(side**2 for side in case["patch_nums"])
    assert any("enlarged" in note for note in found["notes"]) == (found["image_size"] > 16)  # type: ignore[attr-defined, operator]
    shutil.rmtree("out")
    start = ["evaluate", "tokenizer", *options, "--checkpoint"]
    assert "not like the tokenizer" in fails(*start, model, "--patch-nums", sides)
    assert "published scales are known for 256, 512, 1024" in fails(*start, released, "--image-size", 100)
    assert "no such file" in fails(*start, "vae_ch160v4096z32.pth")


def test_wrong_input(workplace: Path, tokenizer: Path, shards: Path, fails: Fails) -> None:
    start = ["evaluate", "tokenizer", "--features", "none", "--checkpoint"]
    here = [*start, tokenizer, "--data", shards]
    assert "no such checkpoint" in fails(*start, "nothing", "--data", shards)
    assert "not a checkpoint folder" in fails(*start, shards, "--data", shards)
    part = f"{tokenizer}/tokenizer.safetensors"
    assert f"{part}: is one file of a saved folder" in fails(*start, part, "--data", shards)
    assert "takes images of 16 x 16" in fails(*here, "--image-size", 32)
    assert "--patch-nums: only released files" in fails(*here, "--patch-nums", "1,2")
    assert "does not exist" in fails(*start, tokenizer, "--data", "nowhere")
    assert "is a file; choose another folder" in fails(*here, "--out", tokenizer / "config.json")
    for option in ("--images", "--batch-size", "--progressive-images"):
        assert f"{option} 0: must be at least 1" in fails(*here, option, 0)
    assert "below 1 no crop fits" in fails(*here, "--resize-ratio", 0.5)
    assert "VGG16 weights vgg.pth: no such file" in fails(*here, "--lpips", "vgg.pth")
    start = ["evaluate", "tokenizer", "--checkpoint", tokenizer, "--data", shards, "--features"]
    assert "download weights-inception" in fails(*start, "inception")
    assert "give a TorchScript file" in fails(*start, "net.pt")
    assert "TorchScript files alone" in fails(*start, "none", "--feature-size", 8)


def test_an_empty_split(workplace: Path, tokenizer: Path, shards: Path, fails: Fails) -> None:
    shutil.copytree(shards, "shards")
    index = json.loads(Path("shards/index.json").read_text())
    del index["splits"]["val"]
    Path("shards/index.json").write_text(json.dumps(index))
    start = ["evaluate", "tokenizer", "--checkpoint", tokenizer, "--data", "shards"]
    assert "--split val: shards has no such images; it has train" in fails(*start)
    assert "needs both splits" in fails(*start, "--split", "train")
    assert evaluate(*start[2:], "--split", "train", "--features", "none", "--images", 2, "--out", "out") == 0


def test_damaged_weights(workplace: Path, tokenizer: Path, shards: Path, fails: Fails) -> None:
    _, broken = load(tokenizer)
    with torch.no_grad():
        broken.decoder.conv_out.bias[0] = math.nan
    save("broken", None, broken)
    told = fails("evaluate", "tokenizer", "--checkpoint", "broken", "--data", shards, "--features", "none")
    assert "decoder.conv_out.bias is NaN" in told


def test_reconstruct(workplace: Path, tokenizer: Path, fails: Fails, capfd: pytest.CaptureFixture[str]) -> None:
    for number, size in enumerate([(40, 20), (16, 30)]):
        Image.effect_noise(size, 90).convert("RGB").save(f"{number}.png")
    start = ["reconstruct", "--checkpoint", str(tokenizer)]
    assert main([*start, "0.png", "1.png", "--out", "new/strip.png"]) == 0
    told = capfd.readouterr().out
    assert "2 images after each of 3 scales" in told and "enlarged" not in told
    assert Image.open("new/strip.png").width == 4 * 68 + 4
    Image.effect_noise((40, 9), 90).convert("RGB").save("small.png")
    assert main([*start, "small.png", "--out", "small_strip.png"]) == 0
    assert "less than 16 pixels were enlarged" in capfd.readouterr().out
    assert "image 2.png: cannot be read" in fails(*start, "2.png")
    Path("text.png").write_text("no picture")
    assert "image text.png: not a readable" in fails(*start, "0.png", "text.png")
    assert "ends in .png" in fails(*start, "0.png", "--out", "strip.jpg")
