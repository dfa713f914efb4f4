"""`python -m benchmarks`: its members read their own options."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import models
from benchmarks import results as history
from benchmarks.__main__ import main
from mvar_lightning.pyramid import PUBLISHED_SIDES

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "lightning", "numpy", "matplotlib", "rich")


def test_a_member_runs_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "attention.json"
    assert main(["attention", "--heads", "1", "--repeats", "1", "--out", str(out)]) == 0
    assert "adjacent" in capsys.readouterr().out.lower() and json.loads(out.read_text())


@pytest.mark.parametrize("member", ["attention", "quantizer", "tokens", "data"])
def test_a_member_keeps_each_run(
    member: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --out a run writes a file of its own, with its date, beside those before."""
    monkeypatch.chdir(tmp_path)
    fakes: dict[str, list[tuple[str, Any]]] = {
        "attention": [("attention.STRATEGIES", ())],
        "quantizer": [("quantizer.measure", {"machine": "", "torch": "", "rows": [], "agreement": {}})],
        "tokens": [("tokens.TARGETS", {})],
        "data": [("data.measure", {}), ("data.synthetic_shards", None)],
    }
    for name, value in fakes[member]:
        fake = (lambda *_, made=value: made) if name.islower() else value
        monkeypatch.setattr(f"benchmarks.{name}", fake)
    monkeypatch.setattr("benchmarks.__main__._print_data", lambda figures: None)
    for second in (1, 2):
        monkeypatch.setattr(history, "now", lambda second=second: f"2026-11-28T08:00:0{second}Z")
        assert main([member]) == 0
    files = sorted(Path("benchmarks/results").iterdir())
    assert [file.name for file in files] == [f"{member}-2026-11-28T08000{second}Z.json" for second in (1, 2)]
    assert json.loads(files[0].read_text())["date"] == "2026-11-28T08:00:01Z"
    assert str(files[1]) in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("member", ["attention", "quantizer", "tokens"])
def test_a_member_tells_its_own_options(member: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([member, "--help"])
    assert f"usage: python -m benchmarks {member}" in capsys.readouterr().out


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from benchmarks.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0\n"
        f"print('heavy:', [name for name in {HEAVY} if name in sys.modules])"
    )
    for options in (["--help"], ["attention", "--help"]):
        start = time.monotonic()
        command = [sys.executable, "-c", code, *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert time.monotonic() - start < 2
        assert done.stdout.splitlines()[-1] == "heavy: []"


def test_sizes_are_those_with_published_scales() -> None:
    assert tuple(sorted(PUBLISHED_SIDES)) == models.SIZES


def test_alone_it_measures_the_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--batch", "0"]) == 2 and "--batch 0" in capsys.readouterr().err
    assert main(["--parts", "--no-memory", "--out", str(tmp_path)]) == 0
    assert "attention blocks, GFLOPs counted | 43.61" in capsys.readouterr().out
