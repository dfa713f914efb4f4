"""`mvar sweep`: variants and seeds are trained once, tabulated, and reused."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mvar_lightning.cli import main
from tests.faults.harness import as_here, ask, start

Recipe = dict[str, Any]
SWEEP: Recipe = {
    "recipe": "recipes/var.yaml",
    "overrides": {"trainer.limit_train_batches": 2, "trainer.log_every_n_steps": 1},
    "variants": {"full": None, "adjacent": {"model.attention": "AdjacentAttention"}},
    "columns": [{"metric": "val/loss"}, {"metric": "kv_cache_bytes_per_image"}],
    "curves": ["train/loss"],
}


@pytest.fixture
def sweep(recipe: Recipe, workplace: Path) -> Callable[..., str]:
    def write(**changes: Any) -> str:
        (workplace / "sweep.yaml").write_text(yaml.safe_dump({**SWEEP, **changes}, sort_keys=False))
        return "sweep.yaml"

    return write


@pytest.mark.slow
def test_a_sweep_trains_each_variant_and_reuses_it(
    sweep: Callable[..., str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["sweep", sweep()]) == 0
    content = json.loads(Path("runs/sweeps/sweep/sweep.json").read_text())
    values = {run["variant"]: run["values"]["kv_cache_bytes_per_image"] for run in content["runs"]}
    assert values["adjacent"] == 0 < values["full"]
    for name in ("sweep.md", "sweep.png", "curves.png"):
        assert Path("runs/sweeps/sweep", name).stat().st_size > 0
    before = Path("runs/sweeps/sweep/full/seed0/metrics.json").stat().st_mtime_ns
    capfd.readouterr()
    assert main(["sweep", "sweep.yaml", "--only", "full"]) == 0
    assert "already trained" in capfd.readouterr().out
    assert Path("runs/sweeps/sweep/full/seed0/metrics.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_sweep_that_ctrl_c_stops_is_continued(sweep: Callable[..., str], workplace: Path) -> None:
    path, run = sweep(variants={"full": None}), workplace / "runs/sweeps/sweep/full/seed0"
    argv = ["sweep", path, "--trainer.max_epochs=12"]
    env = as_here({"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"})
    begun = start(*argv, cwd=workplace, env=env, seconds=120)
    while not (run / "checkpoints/last.ckpt").exists() and not begun.ended():
        time.sleep(0.02)
    os.killpg(begun.pid, signal.SIGINT)  # as a terminal does: to the sweep and to its run
    stopped = begun.finish()
    assert stopped.status == 130 and "Traceback" not in stopped.err, stopped.err
    of_run, of_sweep = [line for line in stopped.err.splitlines() if line.startswith("mvar: ")]
    assert of_run.endswith("the same command continues from runs/sweeps/sweep/full/seed0/checkpoints/last.ckpt")
    assert of_sweep == "mvar: sweep: stopped in runs/sweeps/sweep/full/seed0; the same command goes on"
    assert not (run / "metrics.json").exists()
    step = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    answer = ask(*argv, cwd=workplace, env=env, seconds=120)
    assert answer.status == 0, answer.err
    steps = [json.loads(path.read_text())["steps"] for path in workplace.glob("runs/sweeps/sweep/*/*/metrics.json")]
    assert steps == [24] and 0 < step < 24


def test_mistakes_are_told_before_the_first_run(sweep: Callable[..., str], fails: Callable[..., str]) -> None:
    path = sweep(variants={"deep": {"model.depht": 3}})
    assert "variant deep: " in (said := fails("sweep", path)) and "model.depht is not a setting" in said
    path = sweep()
    assert "--only wide: no such variant; this sweep has full, adjacent" in fails("sweep", path, "--only", "wide")
    path = sweep(recipe="recipes/none.yaml")
    assert "recipe recipes/none.yaml: no such file" in fails("sweep", path)
    assert "cannot be read" in fails("sweep", "none.yaml")


@pytest.mark.slow
def test_a_run_that_diverges_leaves_a_gap_and_the_others_are_trained(
    sweep: Callable[..., str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    diverging = {"model.base_lr": 1e30, "trainer.gradient_clip_val": None, "trainer.limit_train_batches": 4}
    assert main(["sweep", sweep(variants={"wild": diverging, "tame": None})]) == 2
    told = capfd.readouterr().err
    assert "not finite" in told and "Traceback" not in told
    assert "mvar: error: sweep: 1 of 2 runs failed (see above): runs/sweeps/sweep/wild/seed0; " in told
    table = Path("runs/sweeps/sweep/sweep.md").read_text()
    assert "| wild | - | - |" in table and "failed: wild, seed 0" in table


def test_what_the_runs_answer_is_looked_at(
    sweep: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = sweep()
    monkeypatch.setattr("mvar_lightning.runs.sweep.check_runs", lambda runs: None)

    def answer(status: int) -> None:
        monkeypatch.setattr("mvar_lightning.runs.sweep._wait", lambda command: status)

    answer(130)
    assert main(["sweep", path]) == 130, "Ctrl-C is meant for the whole sweep"
    answer(1)
    assert main(["sweep", path]) == 2
    assert "none of the 2 runs came to its end" in capfd.readouterr().err
    for variant in ("full", "adjacent"):
        Path(f"runs/sweeps/sweep/{variant}/seed0").mkdir(parents=True)
        Path(f"runs/sweeps/sweep/{variant}/seed0/metrics.json").write_text("[]")
    answer(0)
    assert main(["sweep", path]) == 2
    assert "metrics.json: is no report of a run" in capfd.readouterr().err
