"""ONNX files: onnxruntime gives what the modules give, of each family and at any batch, and needs nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faults.small_models import SCALES, SIZES, small_tokenizer

from mvar_lightning import generate
from mvar_lightning.attention import AdjacentAttention, FullAttention, SpatialAttention
from mvar_lightning.checkpoints.programs import export_programs
from mvar_lightning.cli import main
from mvar_lightning.transformer import LlamaBlocks, NextScaleTransformer, SlidingWindowHistory

FAMILIES = {
    "var": {"attention": FullAttention()},
    "mvar": {"attention": SpatialAttention(kernel_size=3, scales=1)},
    "markov_var": {"attention": AdjacentAttention(), "history": SlidingWindowHistory(3), "blocks": LlamaBlocks()},
}
ALONE = """
import json, sys
import numpy as np, onnxruntime
folder = sys.argv[1]
record = json.load(open(f"{folder}/programs.json"))
run = {name: onnxruntime.InferenceSession(f"{folder}/{name}.onnx").run for name in record["programs"]}
rows, label = record["tensors"]["tokens"]["shape"][1], np.array([7, 3, 1])
tokens, start = np.zeros((3, rows), np.int64), 0
for side in record["scales"]:
    (logits,) = run["transformer"](None, {"tokens": tokens, "label": label})
    tokens[:, start : start + side**2] = logits[:, start : start + side**2].argmax(-1)
    start += side**2
(image,) = run["decode"](None, {"tokens": tokens})
assert "torch" not in sys.modules and "mvar_lightning" not in sys.modules
print(json.dumps({"tokens": tokens.tolist(), "image": image.tolist()}))
"""

pytestmark = pytest.mark.ship


@pytest.mark.parametrize("family", FAMILIES)
def test_onnxruntime_gives_the_modules_numbers(family: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    tokenizer = small_tokenizer()
    torch.manual_seed(1)
    sizes = {"num_classes": 3, "depth": 2, "width": 16, "heads": 2, "gamma_init": 0.1}
    model = NextScaleTransformer(SCALES, **SIZES, **sizes, **FAMILIES[family]).eval()
    export_programs(tmp_path / "out", model, tokenizer)
    run = {file.stem: onnxruntime.InferenceSession(file).run for file in (tmp_path / "out").glob("*.onnx")}
    for batch in (1, 5):
        image = torch.rand(batch, 3, tokenizer.image_size, tokenizer.image_size) * 2 - 1
        idx_BL, label_B = tokenizer.encode(image), torch.arange(batch) % (model.num_classes + 1)
        feed = {"tokens": idx_BL.numpy(), "label": label_B.numpy()}
        (tokens,) = run["encode"](None, {"image": image.numpy()})
        (decoded,) = run["decode"](None, {"tokens": feed["tokens"]})
        (logits,) = run["transformer"](None, feed)
        assert tokens.dtype == "int64" and (tokens == feed["tokens"]).mean() > 0.99  # a tie may fall the other way
        torch.testing.assert_close(torch.tensor(decoded), tokenizer.decode(idx_BL), atol=1e-4, rtol=0)
        with torch.no_grad():
            expected = model(tokenizer.teacher_input(idx_BL), label_B)
        torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-3, rtol=0)
    assert str(Path.cwd()).encode() not in b"".join(file.read_bytes() for file in (tmp_path / "out").iterdir())


def test_the_shipped_model_samples_without_torch(tmp_path: Path) -> None:
    from mvar_lightning import load

    assert main(["export", "digits", "--onnx", str(tmp_path / "out")]) == 0
    done = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "out"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    answer = json.loads(done.stdout)
    model, tokenizer = load("digits")
    assert model is not None
    made = generate(model, tokenizer, [7, 3, 1], cfg=None, top_k=1)
    assert (torch.tensor(answer["tokens"]) == made.tokens).float().mean() > 0.99
    torch.testing.assert_close(torch.tensor(answer["image"]) / 2 + 0.5, made.images, atol=1e-3, rtol=0)
