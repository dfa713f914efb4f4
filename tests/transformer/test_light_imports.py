"""Sampling and looking at a checkpoint wait for no library that they do not use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch._dynamo", "torchmetrics", "lightning", "scipy", "matplotlib", "webdataset")

INFO = "from mvar_lightning.commands.checkpoints import describe; describe(sys.argv[1])"


@pytest.mark.parametrize(
    "code",
    [
        "import mvar_lightning.transformer, mvar_lightning.tokenizer, mvar_lightning.checkpoints, "
        "mvar_lightning.sampling; mvar_lightning.generate",
        INFO,
    ],
    ids=["the rooms of sampling", "mvar info"],
)
def test_heavy_libraries_are_left_alone(code: str, tokenizer: Path) -> None:
    script = f"import sys\n{code}\nprint('loaded:', *(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script, str(tokenizer)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"
