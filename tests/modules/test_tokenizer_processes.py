"""Two processes train the tokenizer together as one does alone, with and without a discriminator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("tokenizer_processes_run.py")


def run(out: Path, processes: int) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), str(out), str(processes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.mark.slow
def test_two_processes_equal_one_on_the_joined_batch(tmp_path: Path) -> None:
    """Under plain DDP: no search for unused parameters, though the discriminator starts a step later."""
    one, two = (run(tmp_path / f"{processes}.pt", processes) for processes in (1, 2))
    for name, steps in (("plain", 5), ("gan", 5), ("accumulated gan", 3)):
        ours, theirs = one[name], two[name]
        assert ours["steps"] == theirs["steps"] == steps
        for batch, (mine, joined) in enumerate(zip(ours["losses"], theirs["losses"], strict=True)):
            assert joined == pytest.approx(mine, abs=1e-5, rel=1e-4), f"{name}, batch {batch}"
        assert ("train/gradient_penalty" in ours["losses"][-1]) == ("gan" in name)
        assert ours["state"].keys() == theirs["state"].keys()
        for key, value in ours["state"].items():
            assert (theirs["state"][key].float() - value.float()).abs().mean() < 1e-5, f"{name}: {key}"
    assert one["gan"]["state"]["adversarial.lecam.updates"] == 4
    # a bad image on the second process stops both, each with the term and the step
    assert one["stopped"].startswith("loss term 'l1' is nan at step 3")
    told = [Path(f"{tmp_path / '2.pt'}.{rank}.txt").read_text() for rank in (0, 1)]
    assert told[0].startswith("loss term 'l1' is not finite on another process at step 3")
    assert told[1].startswith("loss term 'l1' is nan at step 3")
