"""The ten-minute call runs whole on a CPU, small, so that no second of a GPU goes to a slip."""

from __future__ import annotations

import argparse
import json
import re
import runpy
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import gpu, gpu_parts
from benchmarks.gpu import PARTS, Part, Results
from benchmarks.sides import Ours

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
    assert "| fit | VAR, resumed: losses finite |" in table and all(row["device"] == gpu.SMALL for row in rows)


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
    results.add("waits", 0.0, most=0)
    assert [row["good"] for row in rows_of(tmp_path)] == [True, False, False, True]
    assert "| waits | 0  | <= 0 |" in gpu.markdown(rows_of(tmp_path)), "a bound of 0 is one, too"


def test_what_a_cpu_has_done_is_not_done_for_a_gpu_and_is_told_loudly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def works(results: Results, device: torch.device, small: bool) -> None:
        results.add("sound", 1.0)

    monkeypatch.setattr(gpu, "PARTS", (Part("fit", 20),))
    monkeypatch.setattr(gpu_parts, "fit", works)
    assert call(tmp_path) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("NO GPU" in line for line in said)
    assert gpu._done(tmp_path, "fit", gpu.SMALL) and not gpu._done(tmp_path, "fit", "NVIDIA H100")
    Results(tmp_path, "fit", "NVIDIA H100").add("sound", 2.0)  # a call that was ended
    assert [row["value"] for row in gpu._latest(rows_of(tmp_path))] == [2.0], "figures of two devices are not mixed"
    assert not gpu._done(tmp_path, "fit", "NVIDIA H100")


def test_the_issues_own_words_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[argparse.Namespace] = []
    monkeypatch.setattr(gpu, "run", lambda arguments: asked.append(arguments) or 1)
    monkeypatch.setattr("sys.argv", ["gpu", "--out", str(tmp_path), "--parts", "fit"])
    with warnings.catch_warnings(), pytest.raises(SystemExit, match="1"):
        warnings.simplefilter("ignore", RuntimeWarning)  # it is imported here, too
        runpy.run_module("benchmarks.gpu", run_name="__main__")
    assert [(each.out, each.parts) for each in asked] == [(tmp_path, ["fit"])]


def test_sampling_waits_as_often_as_its_bound_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, which is told that it runs behind: numbers that are read, and what is sent to the device."""
    found: list[str] = []

    class Reading(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                found.append("read")
            return func(*args, **(kwargs or {}))

    class Sending(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ours = "mvar_lightning" in sys._getframe(1).f_code.co_filename  # torch's own move what is there already
            if func is torch.Tensor.to and ours and any(isinstance(arg, torch.device) for arg in args):
                found.append("sent")
            return func(*args, **(kwargs or {}))

    device = torch.device("cpu")
    for room in ("sampling.draws", "tokenizer.tokenizer", "transformer.transformer"):
        monkeypatch.setattr(f"mvar_lightning.{room}.runs_behind", lambda device: True)
    side = Ours(gpu_parts.case_of("markov_var", 16, 4, device, True, parts=("step", "sample")))
    for part, expected in (("step", []), ("sample", ["sent", "read"])):
        side.run(part)
        found.clear()
        with Sending(), Reading():
            side.run(part)
        assert found == expected and len(found) == gpu_parts.WAITS[part]


def test_lines_that_are_no_results_are_passed_over(tmp_path: Path) -> None:
    good = {"part": "tokens", "what": "done", "device": "cpu"}
    lines = ["[]", "null", "{}", '"x"', '{"part": 1}', json.dumps(good)]
    (tmp_path / "results.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe")
    assert gpu._rows(tmp_path) == [good]
