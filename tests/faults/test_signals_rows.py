"""Rows of signals and of runs that nobody watches: what is said when a run is stopped, and while it goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from small_run import MODEL_SIZES

from mvar_lightning.callbacks import monitors
from tests.faults.harness import ask

Recipe = dict[str, Any]

AT = """
import os, signal, sys
from mvar_lightning import cli
import {module} as place
owner, name = {owner}, {name!r}
inner = getattr(owner, name)
def struck(*args, **kwargs):
    os.kill(os.getpid(), {signal})
    return inner(*args, **kwargs)
setattr(owner, name, struck)
sys.exit(cli.main({argv!r}))
"""
PLACES = {
    "judging": ("mvar_lightning.runs.recipe", "place.RecipeCheck", "instantiate_classes"),
    "making": ("mvar_lightning.runs.recipe", "place.SuiteCLI", "instantiate_trainer"),
    "fit start": ("mvar_lightning.callbacks", "place.EMA", "setup"),
    "step": ("mvar_lightning.training.next_scale", "place.NextScaleModule", "training_step"),
    "validation": ("mvar_lightning.training.next_scale", "place.NextScaleModule", "validation_step"),
    "saving": ("mvar_lightning.checkpoints.folder", "place", "save"),
}
"""Phases of a run, and a function that is called in each."""

ONE = [(phase, ("signal.SIGINT", "signal.SIGTERM")[index % 2]) for index, phase in enumerate(PLACES)]
OTHER = [(phase, ("signal.SIGTERM", "signal.SIGINT")[index % 2]) for index, phase in enumerate(PLACES)]
CASES = [*ONE, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHER)]
"""Every phase with one signal in the fast tests, with both in the slow ones."""


@pytest.fixture
def recipe(tmp_path: Path, tokenizer: Path, shards: Path) -> Callable[..., Path]:
    def write(*callbacks: Recipe) -> Path:
        sizes = {name: value for name, value in MODEL_SIZES.items() if name != "num_classes"}
        data = {"path": str(shards), "image_size": 16, "batch_size": 16, "num_workers": 0}
        trainer = {"max_epochs": 1, "num_sanity_val_steps": 0, "log_every_n_steps": 1, "enable_model_summary": False}
        content = {
            "model": {"class_path": "mvar_lightning.VARModule", "init_args": {"tokenizer": str(tokenizer), **sizes}},
            "data": {"class_path": "mvar_lightning.ShardsDataModule", "init_args": data},
            "trainer": {**trainer, "callbacks": [{"class_path": "mvar_lightning.callbacks.EMA"}, *callbacks]},
        }
        (tmp_path / "var.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "var.yaml"

    return write


@pytest.mark.parametrize(("phase", "number"), CASES)
def test_a_run_that_is_stopped_says_what_and_how_to_go_on(
    phase: str, number: str, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe()
    module, owner, name = PLACES[phase]
    argv = ["train", "var.yaml", "--run-folder", "run"]
    code = AT.format(module=module, owner=owner, name=name, signal=number, argv=argv)
    answer = ask(code=code, cwd=tmp_path, seconds=60)
    assert answer.status == 130, (answer.status, answer.err)
    last = answer.err.splitlines()[-1]
    way_on = "the same command (continues from run/checkpoints/last.ckpt|starts anew)"
    assert re.fullmatch(rf"mvar: run: (interrupted|told to stop.*); .*{way_on}", last), answer.err
    assert "Traceback" not in answer.err
    assert not (tmp_path / "run/metrics.json").exists()
    assert ("continues from" in last) == (tmp_path / "run/checkpoints/last.ckpt").exists()


def test_a_run_without_a_terminal_says_how_far_it_is(recipe: Callable[..., Path], tmp_path: Path) -> None:
    lines = {"class_path": "mvar_lightning.callbacks.ProgressLines", "init_args": {"seconds": 0}}
    answer = ask("train", recipe(lines), "--run-folder", "run", cwd=tmp_path)
    assert answer.status == 0, answer.err
    form = r"epoch 1/1, step (\d): loss \d\S+, learning rate \d\S+, [\d,.]+ images a second, 0 min left"
    assert re.findall(form, answer.err) == ["1", "2", "3", "4", "5", "6"], answer.err
    assert "epoch 1, step 6: validating, batch 1" in answer.err


def test_the_time_left_counts_the_batches_of_a_step() -> None:
    trainer = SimpleNamespace(max_epochs=-1, max_steps=700, global_step=100, current_epoch=0, num_training_batches=5)
    assert monitors._left(cast(Any, trainer), batches=1, batches_of_step=4, per_second=1.0) == "40 min"


@pytest.mark.parametrize("streams", [{"stdout": "closed", "stderr": "closed"}, {"stderr": "full"}])
def test_progress_does_not_end_a_run_whose_reader_has_gone(
    streams: dict[str, str], recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """All files are written; what the command itself prints then is its own affair."""
    lines = {"class_path": "mvar_lightning.callbacks.ProgressLines", "init_args": {"seconds": 0}}
    ask("train", recipe(lines), "--run-folder", "run", cwd=tmp_path, **streams)
    assert json.loads((tmp_path / "run/metrics.json").read_text())["steps"] == 6
    assert (tmp_path / "run/model/config.json").is_file()
