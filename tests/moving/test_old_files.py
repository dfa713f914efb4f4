"""Files that version 0.1.0 wrote before its own were moved are read, and give what they gave.

`make_old_files.py` says what they are and how they were made; ``expected.json`` beside them is what 0.1.0 made of them.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from mvar_lightning import ShardsDataModule, TokenShards, generate, load
from mvar_lightning.cli import main

FILES = Path(__file__).with_name("made_by_0_1")
EXPECTED: dict[str, Any] = json.loads((FILES / "expected.json").read_text())
MODELS = ("var", "markov_var")
RUNS = ("tokenizer", *MODELS)
ROOM = {"tokenizer": 1e-3, "var": 1e-5, "markov_var": 1e-5}
"""Of losses, whose sums of floats have another order on another CPU; a tokenizer's codes are chosen anew every step."""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files as the current folder; what a run seeds does not outlive the test."""
    shutil.copytree(FILES, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    return tmp_path / "old"


def resumed(run: str, recipe: str) -> list[float]:
    """Losses of two more steps from a run's checkpoint, by a recipe."""
    logger = "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: again, name: log, version: ''}}"
    checkpoint = f"runs/{run}/checkpoints/last.ckpt"
    more = ["--trainer.max_epochs=4", "--trainer.max_steps=12", f"--trainer.logger={logger}"]
    assert main(["fit", "--config", recipe, "--ckpt-path", checkpoint, "--run-folder", "again", *more]) == 0
    with Path("again/log/metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def few_others(found: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> bool:
    """Whether rows of tokens are those of 0.1.0, but for one in a hundred that another CPU may draw otherwise."""
    pairs = [pair for rows in zip(found, expected, strict=True) for pair in zip(*rows, strict=True)]
    return sum(one != other for one, other in pairs) <= len(pairs) // 100


def equal(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(state) == list(other) and all(torch.equal(tensor, other[name]) for name, tensor in state.items())


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("part", ["", "model", "checkpoints/last.ckpt"])
def test_info_describes_an_old_checkpoint(run: str, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(Path(f"runs/{run}/model/config.json").read_text())
    assert main(["info", str(Path("runs", run, part))]) == 0
    told = dict(
        line.split(maxsplit=1) for line in capsys.readouterr().out.replace("tokenizer hash", "hash").splitlines()
    )
    assert told["hash"] == record["tokenizer_hash"] and told["kind"] == record["kind"]
    design = {
        "tokenizer": {},
        "var": {"attention": "FullAttention()", "depth": "1 (width 16, heads 2)"},
        "markov_var": {"attention": "AdjacentAttention()", "depth": "1 (width 8, heads 2)"},
    }
    assert design[run].items() <= told.items()


@pytest.mark.parametrize("run", RUNS)
def test_a_lightning_checkpoint_holds_the_weights_of_the_saved_folder(run: str) -> None:
    (saved, saved_tokenizer), (model, tokenizer) = load(f"runs/{run}/model"), load(f"runs/{run}/checkpoints/last.ckpt")
    assert equal(tokenizer.state_dict(), saved_tokenizer.state_dict())
    assert (model is None) == (saved is None) == (run == "tokenizer")
    if model is not None and saved is not None:
        assert equal(model.state_dict(), saved.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("recipe", ["recipes", "config.yaml"])
def test_an_old_run_resumes_with_the_losses_it_had(run: str, recipe: str) -> None:
    """By its recipe, and by the resolved one that the run wrote: weights, optimizers, averages and the place in the
    data are all restored, or the losses would be others."""
    name = f"recipes/{run}.yaml" if recipe == "recipes" else f"runs/{run}/config.yaml"
    assert resumed(run, name) == pytest.approx(EXPECTED["resumed"][run], rel=ROOM[run])
    where = "again" if recipe == "recipes" else f"runs/{run}"  # a resolved recipe says where its run was
    assert torch.load(f"{where}/checkpoints/last.ckpt", weights_only=True)["global_step"] == 12


@pytest.mark.slow
def test_a_recipe_with_the_old_class_paths_resumes_as_well() -> None:
    """``mvar_lightning.modules`` and ``mvar_lightning.data.modules`` are where the classes of 0.1.0 were."""
    text = Path("recipes/var_inner_paths.yaml").read_text()
    assert "mvar_lightning.modules.VARModule" in text and "mvar_lightning.data.modules.ShardsDataModule" in text
    found = resumed("var", "recipes/var_inner_paths.yaml")
    assert found == pytest.approx(EXPECTED["resumed"]["var"], rel=ROOM["var"])


@pytest.mark.parametrize("run", RUNS)
def test_a_finished_run_is_reported_again(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path(f"runs/{run}/metrics.json").read_text()
    assert main(["train", f"recipes/{run}.yaml", "--run-folder", f"runs/{run}"]) == 0
    out = capsys.readouterr().out
    assert f"runs/{run}: already trained (train anew with --fresh)" in out
    assert "val/loss" in out and f"runs/{run}/checkpoints/last.ckpt" in out
    assert Path(f"runs/{run}/metrics.json").read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_a_run_without_its_report_is_finished(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = Path(f"runs/{run}/metrics.json")
    before = json.loads(report.read_text())
    report.unlink()
    assert main(["train", f"recipes/{run}.yaml", "--run-folder", f"runs/{run}"]) == 0
    assert f"runs/{run}: continuing from runs/{run}/checkpoints/last.ckpt" in capsys.readouterr().out
    after = json.loads(report.read_text())
    assert after["steps"] == before["steps"] == 10
    assert after["metrics"]["val/loss"] == pytest.approx(before["metrics"]["val/loss"], rel=1e-5)


def test_old_tokenizers_give_the_tokens_they_gave() -> None:
    data = ShardsDataModule("data/digits", 8, batch_size=10, num_workers=0)
    data.prepare_data()
    data.setup("fit")
    images = next(iter(data.val_dataloader()))["image"]
    if images.dtype == torch.uint8:
        images = images / 127.5 - 1
    for path in ("runs/tokenizer", "runs/tokenizer/checkpoints/last.ckpt", "runs/var/model"):
        assert few_others(load(path)[1].encode(images).tolist(), EXPECTED["tokens"]), path


@pytest.mark.parametrize("run", MODELS)
def test_old_models_draw_the_tokens_they_drew(run: str) -> None:
    model, tokenizer = load(f"runs/{run}/model")
    assert model is not None
    _, drawn = generate(model, tokenizer, [0, 1, 2, -1], cfg=1.5, top_k=8, top_p=0.9, seeds=[1, 2, 3, 4])
    assert few_others(drawn.tolist(), EXPECTED["samples"][run])


@pytest.mark.parametrize("run", MODELS)
def test_images_are_sampled_from_an_old_folder(run: str) -> None:
    where = ["--checkpoint", f"runs/{run}", "--data", "data/digits", "--out", "samples"]
    assert main(["sample", *where, "--classes", "0,2", "--count", "2", "--top-k", "8", "--device", "cpu"]) == 0
    assert len([path for path in Path("samples").rglob("*.png") if "grid" not in path.name]) == 4


def test_old_shards_and_caches_are_sound(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "check", "data/digits", "--decode", "--workers", "1"]) == 0
    assert main(["tokens", "check", "data/tokens", "--checkpoint", "runs/tokenizer"]) == 0
    out = capsys.readouterr().out
    assert "8 shards are sound" in out and "8 parts are sound" in out


def labels_of_two_epochs(data: Any) -> list[list[int]]:
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    return [batch["label"].tolist() for _ in range(2) for batch in loader]


def test_old_shards_are_streamed_in_the_order_they_were() -> None:
    data = ShardsDataModule("data/digits", 8, batch_size=8, num_workers=0, shuffle_buffer=20, seed=1)
    assert labels_of_two_epochs(data) == EXPECTED["order of images"]


def test_an_old_cache_is_streamed_in_the_order_it_was() -> None:
    data = TokenShards("data/tokens", batch_size=8, num_workers=0, shuffle_window=20, seed=1)
    assert labels_of_two_epochs(data) == EXPECTED["order of tokens"]
    assert [row for batch in data.val_dataloader() for row in batch["tokens"].tolist()] == EXPECTED["cached"]


@pytest.mark.slow
def test_a_model_trains_on_an_old_cache_with_an_old_tokenizer() -> None:
    recipe = yaml.safe_load(Path("recipes/var.yaml").read_text())
    cached = {"path": "data/tokens", "batch_size": 8, "num_workers": 0, "images": "data/digits"}
    recipe["data"] = {"class_path": "mvar_lightning.TokenShards", "init_args": cached}
    Path("recipes/cached.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", "recipes/cached.yaml", "--run-folder", "cached"]) == 0
    report = json.loads(Path("cached/metrics.json").read_text())
    assert report["steps"] == 10 and 0 < report["metrics"]["val/loss"] < 2.7, "uniform guesses have 2.77"
