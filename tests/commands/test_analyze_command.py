"""`mvar analyze`: numbers, a table and pictures of each analysis."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mvar_lightning.cli import main

Fails = Callable[..., str]


def written(folder: Path, *names: str) -> None:
    for name in names:
        if name.endswith(".png"):
            with Image.open(folder / name) as picture:
                assert len(picture.convert("RGB").getcolors(1_000_000) or []) > 10, name
        else:
            assert (folder / name).stat().st_size > 0


def test_attention_and_alignment(checkpoint: Path, shards: Path, workplace: Path) -> None:
    common = ["--checkpoint", str(checkpoint), "--data", str(shards), "--images", "20", "--out", "out"]
    assert main(["analyze", "attention", *common]) == 0
    written(Path("out"), "attention.md", "attention_scales.png", "attention_windows.png")
    content = json.loads(Path("out/attention.json").read_text())
    assert content["images"] == 20 and content["attention"] == "FullAttention()"
    assert [sum(row) for row in content["mass_on_scale_mean"]] == pytest.approx([1, 1, 1], abs=1e-4)
    assert main(["analyze", "rfa", *common]) == 0
    written(Path("out"), "rfa.json", "rfa.md", "rfa.png")


@pytest.mark.slow
def test_perturbation_with_a_frechet_distance(checkpoint: Path, shards: Path, workplace: Path) -> None:
    common = ["--checkpoint", str(checkpoint), "--data", str(shards), "--images", "20", "--out", "out"]
    assert main(["analyze", "perturb", *common]) == 0
    written(Path("out"), "perturbation.md", "perturbation.png", "perturbed.png")
    content = json.loads(Path("out/perturbation.json").read_text())
    assert content["features"] == "classifier" and content["fid_reference_images"] == 32
    assert [damage["scale"] for damage in content["damages"]] == [None, 0, 1, 2]
    assert all(damage["fid"] > 0 for damage in content["damages"])


def test_perturbation_needs_no_data_without_features(checkpoint: Path, workplace: Path) -> None:
    assert main(["analyze", "perturb", "--checkpoint", str(checkpoint), "--images", "2", "--features", "none",
                 "--out", "out"]) == 0  # fmt: skip
    assert json.loads(Path("out/perturbation.json").read_text())["damages"][1]["fid"] is None


def test_scaling_of_a_sweep(workplace: Path, fails: Fails) -> None:
    assert "has no sweep.json" in fails("analyze", "scaling", "none")
    runs = [
        {"variant": f"d{size}", "report": {"parameters": 10.0**size, "metrics": {
            "val/loss": 4 - 0.3 * size, "val/loss_last": 5 - 0.3 * size,
            "val/accuracy": 0.05 * size, "val/accuracy_last": 0.04 * size}}}
        for size in (4, 5, 6, 7)
    ]  # fmt: skip
    (workplace / "sweep").mkdir()
    (workplace / "sweep" / "sweep.json").write_text(json.dumps({"runs": runs}))
    assert main(["analyze", "scaling", "sweep"]) == 0
    written(Path("sweep"), "scaling.md", "scaling.png")
    assert json.loads(Path("sweep/scaling.json").read_text())["loss"]["alpha"] < 0


def test_a_broken_sweep_is_told(workplace: Path, fails: Fails) -> None:
    (workplace / "sweep").mkdir()
    for content, said in (('{"runs": 3}', "holds no runs"), ('{"runs": [{"variant": "a"}]}', "run a has no val/loss")):
        (workplace / "sweep" / "sweep.json").write_text(content)
        assert said in fails("analyze", "scaling", "sweep")


def test_foreign_or_fewer_images_are_told(
    checkpoint: Path, shards: Path, workplace: Path, fails: Fails, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(checkpoint, "run/model")
    shutil.copytree(shards, "three")
    index = json.loads(Path("three/index.json").read_text())
    Path("three/index.json").write_text(json.dumps({**index, "class_names": index["class_names"][:3]}))
    assert "has 3 classes, the model 10" in fails("analyze", "attention", "--checkpoint", "run", "--data", "three")
    Path("run/config.yaml").write_text(f"data: {{init_args: {{path: {shards.parent / 'others'}}}}}")
    assert main(["analyze", "rfa", "--checkpoint", "run", "--data", str(shards), "--images", "50"]) == 0
    told = capfd.readouterr().out
    assert "has 32 validation images; all of them are used" in told
    assert f"was trained on {shards.parent / 'others'}" in told
    assert json.loads(Path("run/analysis/rfa.json").read_text())["images"] == 32


def test_mistakes_are_told(checkpoint: Path, shards: Path, fails: Fails) -> None:
    assert "--data: the analysis looks at real images" in fails("analyze", "rfa", "--checkpoint", checkpoint)
    assert "--images 0" in fails("analyze", "attention", "--checkpoint", checkpoint, "--data", shards, "--images", 0)
    assert "no such checkpoint" in fails("analyze", "attention", "--checkpoint", "none", "--data", shards)
