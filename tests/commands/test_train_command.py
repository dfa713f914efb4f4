"""`mvar train` from data to report, and what a second run reuses."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mvar_lightning import VARModule, load
from mvar_lightning.cli import main
from mvar_lightning.data.making.embedded import digits
from mvar_lightning.runs.run import run_of
from mvar_lightning.tokenizer import fingerprint

Recipe = dict[str, Any]


@pytest.fixture
def whole_recipe(tokenizer_recipe: Recipe, recipe: Recipe, rewrite: Callable[[Recipe], None]) -> Recipe:
    """A next-scale recipe that trains its own tokenizer first."""
    recipe["tokenizer_recipe"] = "recipes/tok.yaml"
    recipe["model"]["init_args"]["tokenizer"] = "runs/tok/model"
    rewrite(recipe)
    return recipe


def stamp(path: str) -> int:
    return Path(path).stat().st_mtime_ns


@pytest.mark.slow
def test_from_data_to_report_and_again(
    whole_recipe: Recipe, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "recipes/var.yaml"]) == 0
    out = capsys.readouterr().out
    for name in ("metrics.json", "checkpoints/last.ckpt", "model", "tensorboard"):
        assert f"runs/var/{name}" in out and (workplace / "runs/var" / name).exists()
    report = json.loads(Path("runs/var/metrics.json").read_text())
    assert report["steps"] == 6 and report["attention"] == "FullAttention()"
    assert 0 < report["metrics"]["val/loss"] < 5 and 0 <= report["metrics"]["val/accuracy_last"] <= 1
    model, tokenizer = load("runs/var/model")
    assert model is not None and report["parameters"] == sum(p.numel() for p in model.parameters())
    assert fingerprint(tokenizer) == fingerprint(load("runs/tok/model")[1])
    assert "val/psnr" in json.loads(Path("runs/tok/metrics.json").read_text())["metrics"]
    assert list(Path("runs/var/tensorboard").glob("events*"))

    finished, tokenizer_finished = stamp("runs/var/metrics.json"), stamp("runs/tok/metrics.json")
    assert main(["train", "recipes/var.yaml"]) == 0
    assert "runs/var: already trained (train anew with --fresh)" in capsys.readouterr().out
    assert stamp("runs/var/metrics.json") == finished
    assert main(["train", "recipes/var.yaml", "--fresh"]) == 0
    assert stamp("runs/var/metrics.json") > finished and stamp("runs/tok/metrics.json") == tokenizer_finished


@pytest.mark.slow
def test_overrides_have_a_folder_of_their_own(recipe: Recipe, workplace: Path) -> None:
    names = set()
    for overrides in ([], ["--model.attention=AdjacentAttention"], ["--model.depth=1"]):
        assert main(["train", "recipes/var.yaml", *overrides]) == 0
        folder = run_of("recipes/var.yaml", overrides).folder
        names.add(folder.name)
        report = json.loads((folder / "metrics.json").read_text())
        assert report["overrides"] == overrides
        keeps_nothing = overrides == ["--model.attention=AdjacentAttention"]
        assert report["attention"] == ("AdjacentAttention()" if keeps_nothing else "FullAttention()")
        assert (report["kv_cache_bytes_per_image"] == 0) == keeps_nothing
    assert len(names) == 3 and {path.name for path in Path("runs").iterdir()} == names


@pytest.mark.slow
def test_a_changed_recipe_does_not_take_over_the_folder(
    recipe: Recipe, rewrite: Callable[[Recipe], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "recipes/var.yaml"]) == 0
    before = stamp("runs/var/metrics.json")
    recipe["model"]["init_args"]["depth"] = 1
    rewrite(recipe)
    assert main(["train", "recipes/var.yaml"]) == 2
    assert "belongs to another version of recipes/var.yaml" in capsys.readouterr().err
    assert stamp("runs/var/metrics.json") == before
    assert main(["train", "recipes/var.yaml", "--run-folder", "runs/other"]) == 0
    assert main(["train", "recipes/var.yaml", "--fresh"]) == 0
    assert load("runs/var/model")[0].depth == 1  # type: ignore[union-attr]


def test_a_run_without_its_report_continues_from_its_checkpoint(
    recipe: Recipe, rewrite: Callable[[Recipe], None], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe["trainer"]["callbacks"] = [{"class_path": "mvar_lightning.callbacks.EMA", "init_args": {"decay": 0.5}}]
    rewrite(recipe)
    assert main(["train", "recipes/var.yaml"]) == 0
    first, weights = json.loads(Path("runs/var/metrics.json").read_text()), load("runs/var/model")[0].state_dict()
    Path("runs/var/metrics.json").unlink()
    capsys.readouterr()
    assert main(["train", "recipes/var.yaml"]) == 0
    assert "runs/var: continuing from runs/var/checkpoints/last.ckpt" in capsys.readouterr().out
    again = json.loads(Path("runs/var/metrics.json").read_text())
    assert again["steps"] == 6 and again["metrics"]["val/loss"] == first["metrics"]["val/loss"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load("runs/var/model")[0].state_dict().items())


@pytest.mark.slow
def test_a_run_told_to_stop_says_so_and_continues(
    recipe: Recipe, rewrite: Callable[[Recipe], None], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The run is validated at its end alone, in an epoch that is none of its validations'."""
    recipe["trainer"] |= {"max_epochs": 3, "check_val_every_n_epoch": 2}
    rewrite(recipe)
    step = VARModule.training_step

    def stopped(module: VARModule, batch: Any, batch_idx: int) -> Any:
        if module.global_step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(module, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(VARModule, "training_step", stopped)
        assert main(["train", "recipes/var.yaml"]) == 130
    last = "runs/var/checkpoints/last.ckpt"
    told = f"mvar: runs/var: told to stop at step 9; the same command continues from {last}\n"
    assert told in capsys.readouterr().err
    assert torch.load(last, weights_only=True)["global_step"] == 9 and not Path("runs/var/metrics.json").exists()
    assert main(["train", "recipes/var.yaml"]) == 0
    assert f"runs/var: continuing from {last}" in capsys.readouterr().out
    report = json.loads(Path("runs/var/metrics.json").read_text())
    assert report["steps"] == 18
    model = load("runs/var/model")[0]
    again = ["--ckpt-path", last, "--run-folder", "runs/again"]
    assert main(["validate", "--config", "recipes/var.yaml", *again]) == 0
    assert model is not None and f"{report['metrics']['val/loss']:.6f}"[:6] in capsys.readouterr().out


@pytest.mark.slow
def test_stages_and_sampling_of_a_trained_run(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "recipes/var.yaml", "--run-folder", "runs/f"]) == 0
    last = "runs/f/checkpoints/last.ckpt"
    for stage in ("validate", "test"):
        assert main([stage, "--config", "recipes/var.yaml", "--ckpt-path", last, "--run-folder", f"runs/{stage}"]) == 0
    more = ["--ckpt-path", last, "--trainer.max_epochs=2", "--run-folder", "runs/g"]
    assert main(["fit", "--config", "recipes/var.yaml", *more]) == 0
    assert main(["sample", "--checkpoint", last, "--classes", "3,7", "--count", "2", "--out", "out"]) == 0
    assert sorted(path.name[:4] for path in Path("out").glob("0*.png")) == ["0003", "0003", "0007", "0007"]
    capsys.readouterr()
    assert main(["info", last]) == 0
    assert "1 2 4 (21 tokens)" in capsys.readouterr().out


@pytest.mark.slow
def test_a_folder_of_images_of_ones_own(
    whole_recipe: Recipe, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images to shards to tokenizer to model, with as many classes as there are folders."""
    for number, example in enumerate(digits().train[:150]):
        if example.label < 3:
            folder = workplace / "images" / f"digit {example.label}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.png").write_bytes(example.load())
    with Image.open(next((workplace / "images").rglob("*.png"))) as image:
        assert image.size == (16, 16)
    assert main(["shards", "make", "images", "mine", "--val-fraction", "0.3"]) == 0
    assert main(["train", "recipes/var.yaml", "--data", "mine"]) == 0
    run, tokenizer_run = (run_of(f"recipes/{name}.yaml", ["--data.path=mine"]).folder for name in ("var", "tok"))
    model, tokenizer = load(run / "model")
    assert model is not None and model.num_classes == 3
    assert fingerprint(tokenizer) == fingerprint(load(tokenizer_run / "model")[1])
    assert str(run / "metrics.json") in capsys.readouterr().out
    assert main(["sample", "--checkpoint", str(run / "model"), "--data", "mine", "--classes", "digit 2"]) == 0
    assert len(list(Path("samples").glob("0002_*.png"))) == 16
