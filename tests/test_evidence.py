"""The page of evidence: what is kept of runs and analyses is of today's files, and its tables say what these say."""

from __future__ import annotations

import json
import math
import shutil
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from token_files import token_job

from mvar_lightning.runs.run import run_of
from mvar_lightning.runs.sweep import read_sweep
from mvar_lightning.runs.sweep_kept import KeptRuns

ROOT = Path(__file__).parents[1]
SWEEPS = sorted((ROOT / "recipes/evidence").glob("*.yaml"))


@pytest.fixture
def analyses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """docs/analyses.py, with a copy of what is kept."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    module = import_module("analyses")
    shutil.copytree(module.KEPT, tmp_path / "kept", ignore=shutil.ignore_patterns("*.png"))
    monkeypatch.setattr(module, "KEPT", tmp_path / "kept")
    return module


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_what_is_kept_is_of_todays_recipes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the page could not be drawn; a changed recipe asks for new runs."""
    monkeypatch.chdir(ROOT)
    sweep = read_sweep(file)
    kept = KeptRuns(ROOT / "docs/evidence" / file.stem, sweep)
    named = set()
    for variant in sweep.variants:
        for seed in sweep.seeds:
            found = kept.read(variant, seed, run_of(ROOT / sweep.recipe, sweep.arguments(variant, seed), "unused"))
            named |= {kept.file(variant, seed).name} if found else set()
    assert named == {path.name for path in kept.folder.glob("*-seed*.json")}, "kept of variants that the sweep has not"


def test_the_tables_hold_what_the_analyses_found(analyses: ModuleType) -> None:
    wanted, page = analyses.plan(), analyses.section()
    assert page.count("![") == sum(map(len, analyses.PICTURES.values()))
    for name in wanted["analyses"]:
        for model in wanted["runs"]:
            assert len(analyses.found_of(wanted, name, model)) == len(wanted["seeds"])
            assert len(list(analyses.TABLES[name](analyses.found_of(wanted, name, model)))) >= 1
    reports = analyses.found_of(wanted, "perturb", "VAR")
    fids = [report["damages"][0]["fid"] for report in reports]
    assert f"{sum(fids) / len(fids):.2f} ±" in page


def test_what_is_missing_is_named(analyses: ModuleType) -> None:
    for file in analyses.KEPT.glob("rfa-VAR-*.json"):
        file.unlink()
    page = analyses.section()
    assert "Not measured yet: rfa of VAR." in page and "rfa of VAR, one seed" not in page


def test_files_of_other_options_are_refused(analyses: ModuleType) -> None:
    file = analyses.KEPT / "rfa-VAR-seed0.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"options": "--images 9"}))
    with pytest.raises(SystemExit, match="other options"):
        analyses.section()


def test_chance(analyses: ModuleType) -> None:
    assert analyses.chance_of([1.0, 2.0, 3.0], 0.0) == pytest.approx(0.0741799)
    assert analyses.chance_of([2.0, 2.0, 2.0], 2.0) == 1.0 and analyses.chance_of([2.0, 2.0], 1.0) == 0.0


def test_what_a_place_is_worth(analyses: ModuleType, tmp_path: Path) -> None:
    """Each place has a code of its own: knowing it leaves nearly nothing, not knowing it leaves all of four."""
    job = token_job(tmp_path / "tokens", train=(8, 4), val=(6,), vocab_size=4)
    job.begin()
    for task in job.todo():
        tokens = np.tile(np.array([0, 0, 1, 2, 3], np.uint32), (1, task.shard.samples, 1))
        job.write(task, tokens, np.zeros(task.shard.samples, np.int64), ())
    job.finish()
    found = analyses.places(str(tmp_path / "tokens"))
    assert found["scales"] == [1, 2]
    assert found["class"] == pytest.approx([math.log(14 / 12.5), math.log(4)])
    assert found["class and place"] == pytest.approx([math.log(14 / 12.5)] * 2)
