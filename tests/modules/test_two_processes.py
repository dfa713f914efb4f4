"""Two processes do together what one does alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("two_process_run.py")


def run(tokenizer: Path, out: Path, processes: int) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), str(tokenizer), str(out), str(processes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.mark.slow
def test_two_processes_equal_one_on_the_joined_batch(tokenizer: Path, tmp_path: Path) -> None:
    one, two = (run(tokenizer, tmp_path / f"{processes}.pt", processes) for processes in (1, 2))
    assert one["steps"] == two["steps"] == 2
    assert one["lr"] == two["lr"] == pytest.approx(0.01 * 16 / 256)
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert one["losses"][0] != one["losses"][1]
    for name, value in one["state"].items():
        assert (two["state"][name] - value).abs().mean() < 1e-6, name
