"""Tiny recipes in a folder of their own, with digits, a tokenizer and a trained-looking model beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_run import MODEL_SIZES, TOKENIZER_SIZES

from mvar_lightning import NextScaleTransformer, load, save
from mvar_lightning.cli import main

Recipe = dict[str, Any]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """A model and its tokenizer in the suite's own format."""
    _, loaded = load(tokenizer)
    torch.manual_seed(0)
    model = NextScaleTransformer(TOKENIZER_SIZES["scales"], vocab_size=32, code_dim=8, **MODEL_SIZES)
    folder = tmp_path_factory.mktemp("commands") / "model"
    save(folder, model, loaded)
    return folder


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder; what a run seeds does not outlive the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    return tmp_path


@pytest.fixture
def data_section(shards: Path) -> Recipe:
    arguments = {"path": str(shards), "image_size": 16, "batch_size": 16, "num_workers": 0}
    return {"class_path": "mvar_lightning.ShardsDataModule", "init_args": arguments}


@pytest.fixture
def trainer_section() -> Recipe:
    return {
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


@pytest.fixture
def tokenizer_recipe(workplace: Path, data_section: Recipe, trainer_section: Recipe) -> Recipe:
    """Content of ``recipes/tok.yaml``, which is written."""
    model = {"class_path": "mvar_lightning.TokenizerModule", "init_args": dict(TOKENIZER_SIZES)}
    recipe = {"seed_everything": 0, "model": model, "data": data_section, "trainer": trainer_section}
    write_recipe(workplace / "recipes" / "tok.yaml", recipe)
    return recipe


@pytest.fixture
def recipe(workplace: Path, tokenizer: Path, data_section: Recipe, trainer_section: Recipe) -> Recipe:
    """Content of ``recipes/var.yaml``, which is written."""
    sizes = {name: value for name, value in MODEL_SIZES.items() if name != "num_classes"}
    model = {"class_path": "mvar_lightning.VARModule", "init_args": {"tokenizer": str(tokenizer), **sizes}}
    recipe = {"seed_everything": 0, "model": model, "data": data_section, "trainer": trainer_section}
    write_recipe(workplace / "recipes" / "var.yaml", recipe)
    return recipe


def write_recipe(path: Path, recipe: Recipe) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))


@pytest.fixture
def rewrite(workplace: Path) -> Callable[[Recipe], None]:
    """Writes ``recipes/var.yaml`` anew."""
    return lambda recipe: write_recipe(workplace / "recipes" / "var.yaml", recipe)


@pytest.fixture
def fails(workplace: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `mvar` on arguments that are wrong: exit status 2, one line, no new file. Gives the line."""

    def run(*arguments: object) -> str:
        before = sorted(workplace.rglob("*"))
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        error = capfd.readouterr().err
        told = [line for line in error.splitlines() if line.startswith("mvar: error: ")]
        assert len(told) == 1 and error.splitlines()[-1] == told[0], error
        assert "Traceback" not in error
        assert sorted(workplace.rglob("*")) == before, "something was left behind"
        return told[0].removeprefix("mvar: error: ")

    return run
