"""`mvar bench`: its members read their own options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mvar_lightning.cli import main


def test_a_member_runs_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "attention.json"
    assert main(["bench", "attention", "--heads", "1", "--repeats", "1", "--out", str(out)]) == 0
    assert "adjacent" in capsys.readouterr().out.lower() and json.loads(out.read_text())


@pytest.mark.parametrize("member", ["attention", "quantizer", "tokens"])
def test_a_member_tells_its_own_options(member: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", member, "--help"])
    assert f"usage: mvar bench {member}" in capsys.readouterr().out


def test_alone_it_measures_the_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--batch", "0"]) == 2 and "--batch 0" in capsys.readouterr().err
    assert main(["bench", "--parts", "--no-memory", "--out", str(tmp_path)]) == 0
    assert "attention blocks, GFLOPs counted | 43.61" in capsys.readouterr().out
