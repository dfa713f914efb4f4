"""Import needs little memory beside the model: a file is mapped and copied out tensor by tensor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mvar_lightning import MultiScaleTokenizer, NextScaleTransformer, export_official
from mvar_lightning.pyramid import PUBLISHED_SIDES

SIDES = PUBLISHED_SIDES[256]

MEASURE = """
import resource, sys
import torch
from mvar_lightning import import_official
import mvar_lightning.checkpoints.official

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.ones(64, 64) @ torch.ones(64, 64)
before = peak()
pair = import_official(sys.argv[1], sys.argv[2], "var")
held = sum(tensor.nbytes for module in pair for tensor in module.state_dict().values())
print(peak() - before - held)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss")
@pytest.mark.parametrize("zipped", [True, False], ids=["wrapped", "old torch"])
def test_import_needs_at_most_the_file_and_a_fifth(zipped: bool, tmp_path: Path) -> None:
    files = tmp_path / "m.pth", tmp_path / "t.pth"
    tokenizer = MultiScaleTokenizer(SIDES, vocab_size=64, code_dim=8, channels=32, num_res_blocks=1)
    sizes = {"vocab_size": 64, "code_dim": 8, "num_classes": 10, "depth": 4, "width": 1024, "heads": 16}
    export_official(NextScaleTransformer(SIDES, **sizes), tokenizer, *files)
    state = torch.load(files[0], weights_only=True)
    if zipped:  # as VAR's trainer does
        torch.save({"trainer": {"var_wo_ddp": {f"module.{name}": tensor for name, tensor in state.items()}}}, files[0])
    else:
        torch.save(state, files[0], _use_new_zipfile_serialization=False)
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, files)], capture_output=True, text=True, check=True
    )
    size = sum(file.stat().st_size for file in files)
    assert size > 250e6, "too small to measure"
    assert int(process.stdout) < 1.2 * size
