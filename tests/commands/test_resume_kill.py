"""A run that was killed and started again by the same command is the run that was never killed."""

from __future__ import annotations

import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sabotage import losses

from mvar_lightning.cli import main
from tests.faults.harness import completed

Recipe = dict[str, Any]

LAST = "runs/var/checkpoints/last.ckpt"


@pytest.fixture
def watched(recipe: Recipe, rewrite: Callable[[Recipe], None]) -> Recipe:
    """Eighteen steps in three epochs with chance in the model, averaged weights, and a log of losses."""
    recipe["model"]["init_args"] |= {"drop_path": 0.3, "label_drop": 0.3, "base_lr": 0.05}
    recipe["trainer"] |= {"max_epochs": 3, "callbacks": [callback("sabotage.LossLog"), callback("sabotage.Sabotage")]}
    recipe["trainer"]["callbacks"].append({"class_path": "mvar_lightning.callbacks.EMA", "init_args": {"decay": 0.9}})
    recipe["data"]["init_args"]["shuffle_buffer"] = 30
    recipe["checkpoint"] = {"every_steps": 4, "every_minutes": None}
    rewrite(recipe)
    return recipe


def callback(path: str) -> Recipe:
    return {"class_path": path, "init_args": {}}


def command(*arguments: str, sabotage: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """`mvar` in a process group of its own."""
    tests = Path(__file__).parents[1]
    paths = {"PYTHONPATH": str(tests), "CUDA_VISIBLE_DEVICES": ""}
    return completed(*arguments, env={**paths, "SABOTAGE": sabotage, **environment})


def result(folder: str) -> tuple[dict[Any, str], bytes]:
    """Losses of a run and the bytes of its final weights."""
    found = losses(Path("losses.txt"))
    Path("losses.txt").unlink()
    return found, Path(folder, "model", "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_goes_on_exactly(
    workers: int, watched: Recipe, rewrite: Callable[[Recipe], None], capfd: pytest.CaptureFixture[str]
) -> None:
    watched["data"]["init_args"]["num_workers"] = workers
    rewrite(watched)
    assert main(["train", "recipes/var.yaml", "--run-folder", "runs/whole"]) == 0
    whole = result("runs/whole")
    assert len(whole[0]) == 21
    step = random.randrange(5, 17)
    killed = command("train", "recipes/var.yaml", sabotage=f"SIGKILL@{step}")
    assert killed.returncode == -signal.SIGKILL, (step, killed.stderr)
    saved = torch.load(LAST, weights_only=True)["global_step"]
    assert step - 4 <= saved <= step
    capfd.readouterr()
    assert main(["train", "recipes/var.yaml"]) == 0
    assert f"runs/var: continuing from {LAST} (epoch {saved // 6}, step {saved})" in capfd.readouterr().out
    assert result("runs/var") == whole, step


@pytest.mark.slow
def test_a_run_that_is_stopped_twice_goes_on_exactly(
    watched: Recipe, rewrite: Callable[[Recipe], None], capfd: pytest.CaptureFixture[str]
) -> None:
    """Told to stop amid accumulated gradients, data workers included; then killed in a validation."""
    watched["data"]["init_args"]["num_workers"] = 2
    watched["trainer"]["accumulate_grad_batches"] = 2
    watched["checkpoint"]["every_steps"] = None
    rewrite(watched)
    assert main(["train", "recipes/var.yaml", "--run-folder", "runs/whole"]) == 0
    whole = result("runs/whole")
    stopped = command("train", "recipes/var.yaml", sabotage="group:SIGTERM@4")
    assert stopped.returncode == 130, stopped.stderr
    told = f"mvar: runs/var: told to stop at step 5; the same command continues from {LAST}\n"
    assert stopped.stderr.endswith(told), stopped.stderr
    assert "Traceback" not in stopped.stderr and "exited unexpectedly" not in stopped.stderr
    assert torch.load(LAST, weights_only=True)["global_step"] == 5
    killed = command("train", "recipes/var.yaml", sabotage="validation:SIGKILL@6")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert torch.load(LAST, weights_only=True)["global_step"] == 6
    capfd.readouterr()
    assert main(["train", "recipes/var.yaml"]) == 0
    assert f"continuing from {LAST} (epoch 1, step 6)" in capfd.readouterr().out
    assert result("runs/var") == whole
