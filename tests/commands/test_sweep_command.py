"""`mvar sweep`: variants and seeds are trained once, tabulated, and reused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mvar_lightning.cli import main

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


def test_mistakes_are_told_before_the_first_run(sweep: Callable[..., str], fails: Callable[..., str]) -> None:
    path = sweep(variants={"deep": {"model.depht": 3}})
    assert "variant deep: " in (said := fails("sweep", path)) and "model.depht is not a setting" in said
    path = sweep()
    assert "--only wide: no such variant; this sweep has full, adjacent" in fails("sweep", path, "--only", "wide")
    path = sweep(recipe="recipes/none.yaml")
    assert "recipe recipes/none.yaml: no such file" in fails("sweep", path)
    assert "cannot be read" in fails("sweep", "none.yaml")
