"""Two processes on half a batch each equal one on the whole: codes, restarts, entropy term, usage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.faults.harness import script, start

SCRIPT = Path(__file__).with_name("two_process_remedies.py")


def run(folder: Path, processes: int) -> list[dict[str, Tensor]]:
    out, meeting = folder / f"{processes}.pt", folder / f"meeting{processes}"
    ranks = range(processes)
    started = [start(code=script(SCRIPT, out, meeting, rank, processes), seconds=300) for rank in ranks]
    for done in [process.finish() for process in started]:
        assert done.status == 0, done.err[-3000:]
    return [torch.load(f"{out}.{rank}", weights_only=True) for rank in ranks]


@pytest.mark.slow
def test_two_processes_equal_one_on_the_whole_batch(tmp_path: Path) -> None:
    [one] = run(tmp_path, 1)
    first, second = run(tmp_path, 2)
    assert len(one["replaced"]) > 0
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, atol=1e-5, rtol=1e-5, msg=name)
