"""Rows of library use: sampling from Python, filters, backends, other packages."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from .rows_kit import Case, first, picture, row, write_files
from .rows_training import RUN

USES: dict[str, str] = {
    "seeds=5": "tell(list(m.generate(model, tok, 3 % 2, seeds=5).images.shape))",
    "np.int64": "import numpy\ntell(list(m.generate(model, tok, numpy.int64(1), seeds=[5]).images.shape))",
    "half": "tell(list(m.generate(model, tok.to(torch.bfloat16), [1], seeds=[5]).images.shape))",
}
PAIRS = """
class Pairs(L.LightningDataModule):
    batch_size = 4
    def train_dataloader(self):
        images = torch.rand(8, 3, 8, 8) * 2 - 1
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.arange(8) % 2), batch_size=4)
    val_dataloader = predict_dataloader = train_dataloader
"""


@row("python-arguments", "a bare seed, numpy's label, a half-precision tokenizer, (image, label) tuples, predict")
def _(case: Case) -> str | None:
    case.take("tok", "shards", "var")
    reasons = []
    for name, use in USES.items():
        said = case.script("model, tok = m.load('var')\n" + use)
        reasons.append(said.failed and f"{name}: {said.failed}")
    fit = RUN + PAIRS + "run = trainer(limit_val_batches=1.0)\nrun.fit(module(), Pairs())\ntell(run.global_step)"
    predict = RUN + "tell(len(trainer().predict(module(), data())))"
    for name, use in (("tuples", fit), ("predict", predict)):
        said = case.script(use)
        reasons.append(said.failed and f"{name}: {said.failed}")
    return first(*reasons)


@row("natten-limits", "neighborhoods of 1 and heads of 12 numbers where NATTEN's kernels are at hand")
def _(case: Case) -> str | None:
    code = """
import inspect
from mvar_lightning.attention import SpatialAttention, backends
from mvar_lightning.pyramid import ScalePyramid
backends.natten_has_kernels = lambda: True
if "natten" not in sys.modules and backends.importlib.util.find_spec("natten") is None:
    tell(None)
    raise SystemExit
found = {}
for size, dim in ((1, 16), (3, 12)):
    given = ("auto", SpatialAttention(size), ScalePyramid([1, 2, 4]), dim)
    takes_dim = len(inspect.signature(backends.choose_backend).parameters) > 3
    try:
        found[f"kernel_size {size}, head dim {dim}"] = backends.choose_backend(*given[: 3 + takes_dim]).name
    except m.UserError as error:
        found[f"kernel_size {size}, head dim {dim}"] = "a line"
tell(found)
"""
    said = case.script(code)
    if not isinstance(said.value, dict):
        return said.failed
    return first(*[f"{name}: NATTEN is chosen" for name, chosen in said.value.items() if chosen == "natten"])


@row("ties-of-top-k", "logits 3, 2.9, 2.9, 2.9 with top_k 2 and top_p 0.5")
def _(case: Case) -> str | None:
    code = """
from mvar_lightning.sampling.filters import filter_logits
tell(filter_logits(torch.tensor([3.0, 2.9, 2.9, 2.9, 0.0]), 2, 0.5).isfinite().nonzero().flatten().tolist())
"""
    said = case.script(code)
    # of four tokens that top-k keeps (3 alone has 27%), the nucleus of half ends in a tie: all of it stays
    return None if said.value == [0, 1, 2, 3] else f"kept tokens {said.value}: {said.reason}"


@row("other-torchvision", "a torchvision of another build than torch's, which cannot be imported")
def _(case: Case) -> str | None:
    broken = "raise RuntimeError('operator torchvision::nms does not exist')"
    write_files(case.folder, {"other/torchvision/__init__.py": broken.encode(), "x.png": picture()})
    given: dict[str, Any] = {"cwd": case.folder, "capture_output": True, "text": True, "timeout": 90}
    case.take("tok", "shards", "recipes")
    path = f"{case.folder / 'other'}:{case.product}"
    command = [sys.executable, "-m", "mvar_lightning.cli", "train", "recipes/var.yaml", "--data.batch_size=0"]
    done = subprocess.run(command, env={**case.harness.environment, "PYTHONPATH": path}, check=False, **given)
    if "Traceback" in done.stderr:
        return f"traceback {done.stderr.strip().splitlines()[-1]}"
    return None if "mvar: " in done.stderr else f"status {done.returncode} without a line"
