"""The ten-minute call runs whole on a CPU, small, so that no second of a GPU goes to a slip."""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_parts
from benchmarks.gpu import PARTS, Part, Results

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="small, as without a GPU")


def call(folder: Path, *parts: str) -> int:
    return gpu.run(argparse.Namespace(out=folder, parts=list(parts) or None))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_the_whole_call_runs_on_a_cpu(tmp_path: Path) -> None:
    assert call(tmp_path) == 0
    rows, table = rows_of(tmp_path), (tmp_path / "table.md").read_text()
    assert [row["part"] for row in rows if row["what"] == "done"] == [part.name for part in PARTS]
    assert all(row["good"] for row in rows) and "0.608 s (H200)" in table and "| 0.203 |" in table
    assert sum(part.seconds for part in PARTS) <= 480


def test_the_call_runs_every_test_of_the_tier() -> None:
    tests = Path(__file__).parents[1]
    marked = {file for file in tests.rglob("test_*.py") if re.search(r"mark\.gpu\b|\bDEVICES\b", file.read_text())}
    run = [tests / each for each in gpu_parts.GPU_TESTS]
    assert {file for file in marked if not any(file.is_relative_to(each) for each in run)} <= {Path(__file__)}


def test_a_part_that_fails_or_hangs_goes_on_to_the_next_and_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(results: Results, device: torch.device, small: bool) -> None:
        results.add("before", 1.0)
        raise RuntimeError("broken on purpose")

    def hangs(results: Results, device: torch.device, small: bool) -> None:
        time.sleep(60)

    def works(results: Results, device: torch.device, small: bool) -> None:
        results.add("sound", 1.0, "s", most=2.0, published="3 s")

    monkeypatch.setattr(gpu, "PARTS", (Part("attention", 20), Part("step", 1), Part("fit", 20)))
    for name, function in (("attention", fails), ("step", hangs), ("fit", works)):
        monkeypatch.setattr(gpu_parts, name, function)
    assert call(tmp_path) == 1
    table = (tmp_path / "table.md").read_text()
    assert "RuntimeError: broken on purpose" in table and "ended after 1 s" in table
    assert "| fit | sound | 1 s | <= 2 |  | 3 s |" in table
    monkeypatch.setattr(gpu_parts, "attention", works)
    monkeypatch.setattr(gpu_parts, "step", works)
    assert call(tmp_path) == 0
    done = [row["part"] for row in rows_of(tmp_path) if row["what"] == "done"]
    assert done == ["attention", "step", "fit", "attention", "step"], "what was done is not run again"
    assert "broken" not in (tmp_path / "table.md").read_text() and "all parts" in capsys.readouterr().out


def test_a_figure_outside_its_bounds_is_a_failure(tmp_path: Path) -> None:
    results = Results(tmp_path, "step", "CPU")
    for value in (0.1, 3.0, float("nan")):
        results.add("seconds", value, most=0.14)
    assert [row["good"] for row in rows_of(tmp_path)] == [True, False, False]
