"""Guidance and fidelity: what is compared is what the names say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.fidelity import Answers, compare
from benchmarks.guidance import measure
from benchmarks.sides import Case, Ours


def test_unguided_runs_half_of_the_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case("var", 2, 256, 2, "cpu", repeats=1, parts=("sample",), small=True)
    side, rows = Ours(case), []
    side.sampler.blocks[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    for part in ("sample", "unguided"):
        side.run(part)
    assert rows == [4] * 3 + [2] * 3
    found = measure(case)
    assert found["ratio"] > 0 and found["guided"]["processor_seconds"] > 0
    assert main(["guidance", "--batch", "0"]) == 2 and "--batch 0: must be 1 or more" in capsys.readouterr().err


def test_fidelity_counts_other_tokens_and_no_constant() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BLV = torch.randn(2, 5, 7, generator=generator)
    idx_BL = logits_BLV.argmax(dim=-1)
    exact = Answers(logits_BLV, idx_BL, idx_BL)
    same = compare(Answers(logits_BLV + 3, idx_BL, idx_BL), exact)
    assert same["most likely token"] == 1 and same["logit error"] == pytest.approx(0, abs=1e-6)
    changed = idx_BL.clone()
    changed[0, 0] += 1
    found = compare(Answers(logits_BLV.roll(1, dims=-1), changed, idx_BL), exact)
    assert found["most likely token"] == 0 and found["drawn greedily, guided"] == pytest.approx(0.9)
    assert found["logit error"] > 0.5 and found["divergence, nats a token"] > 0.1


def test_fidelity_of_the_shipped_model(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fidelity.json"
    assert main(["fidelity", "--data", str(shards), "--images", "12", "--out", str(out)]) == 0
    kinds = json.loads(out.read_text())["kinds"]
    assert list(kinds) == ["int8", "int8-weights", "int4-weights"]
    equal = [figures["most likely token"] for figures in kinds.values()]
    assert 0.9 < equal[0] < equal[1] < 1 and equal[2] < 0.9
    assert "| logit error |" in capsys.readouterr().out
    assert main(["fidelity", "--images", "0"]) == 2
