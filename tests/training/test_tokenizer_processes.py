"""Two processes train the tokenizer together as one does alone, with and without a discriminator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.harness import script, start_ranks

SCRIPT = Path(__file__).with_name("tokenizer_processes_run.py")


def run(out: Path, processes: int) -> dict[str, Any]:
    code = script(SCRIPT, out, processes)
    for process in start_ranks(processes, code=code, seconds=600, env={"CUDA_VISIBLE_DEVICES": ""}):
        done = process.finish()
        assert done.status == 0, done.err[-3000:]
    return torch.load(out, weights_only=True)


@pytest.mark.slow
def test_two_processes_equal_one_on_the_joined_batch(tmp_path: Path) -> None:
    """Under plain DDP: no search for unused parameters, though the discriminator starts a step later.

    With plain gradient steps every weight agrees to 1e-5. AdamW divides a gradient by its own size: where the gradient
    of a weight is no more than rounding, that weight's step is a matter of luck, so there it is the mean that agrees.
    """
    one, two = (run(tmp_path / f"{processes}.pt", processes) for processes in (1, 2))
    for name in one.keys() - {"stopped"}:
        ours, theirs, plain_steps = one[name], two[name], "PlainSteps" in name
        assert ours["steps"] == theirs["steps"] == (3 if "accumulated" in name or "dropout" in name else 5)
        for batch, (mine, joined) in enumerate(zip(ours["losses"], theirs["losses"], strict=True)):
            close = pytest.approx(mine, abs=1e-5, rel=1e-5 if plain_steps else 1e-4)
            assert joined == close, f"{name}, batch {batch}"
        assert ("train/gradient_penalty" in ours["losses"][-1]) == ("gan" in name)
        assert ours["state"].keys() == theirs["state"].keys()
        for key, value in ours["state"].items():
            apart = (theirs["state"][key].float() - value.float()).abs()
            assert (apart.max() if plain_steps else apart.mean()) < 1e-5, f"{name}: {key} {apart.max()}"
        if "remedies" in name:
            assert ours["state"]["remedies.0.done"] and ours["state"]["remedies.1.steps"] == ours["steps"]
    assert one["gan, TokenizerModule"]["state"]["adversarial.lecam.updates"] == 4
    # a bad image on the second process stops both, each with the term and the step
    assert one["stopped"].startswith("loss term 'l1' is nan at step 3")
    told = [Path(f"{tmp_path / '2.pt'}.{rank}.txt").read_text() for rank in (0, 1)]
    assert told[0].startswith("loss term 'l1' is not finite on another process at step 3")
    assert told[1].startswith("loss term 'l1' is nan at step 3")
