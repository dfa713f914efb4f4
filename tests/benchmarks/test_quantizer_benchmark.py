"""The benchmark compares the same thing on both sides."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import quantizer as benchmark
from benchmarks.__main__ import main


def test_both_sides_give_the_same_tokens_latents_loss_and_gradient() -> None:
    sides, f_BZhw = benchmark.build(benchmark.Shapes(vocab_size=64, code_dim=8, batch=2), torch.device("cpu"))
    agreement = benchmark.check_equal(sides, f_BZhw)
    assert agreement["equal_tokens"] == 1.0 and agreement["largest_difference_of_f_hat"] < 1e-5
    losses, gradients = [], []
    for name in benchmark.SIDES:
        _, f_hat_BZhw, loss = benchmark.parts_of(sides[name](f_BZhw))
        losses.append(float(loss.detach()))
        gradients.append(torch.autograd.grad(f_hat_BZhw.square().sum() + loss, f_BZhw)[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert torch.allclose(*gradients, atol=1e-4)


def test_figures_are_written(tmp_path: Path) -> None:
    out = tmp_path / "new" / "quantizer.json"
    options = ["--vocab-size", "16", "--code-dim", "4", "--batch", "1", "--repeats", "1"]
    main(["quantizer", *options, "--out", str(out)])
    figures = json.loads(out.read_text())
    assert [row["work"] for row in figures["rows"]] == ["forward", "forward + backward"]
    assert all(row["peak_mebibytes"][name] > 0 for row in figures["rows"] for name in benchmark.SIDES)
    assert figures["agreement"]["equal_tokens"] == 1.0


def test_all_distances_at_once_take_more_memory() -> None:
    sides, f_BZhw = benchmark.build(benchmark.Shapes(batch=8), torch.device("cpu"))
    cpu = torch.device("cpu")
    peaks = {name: benchmark.peak_bytes(partial(sides[name], f_BZhw), cpu) / 2**20 for name in benchmark.SIDES}
    # 2,048 rows of the last scale x 4,096 codes x 4 bytes are 32 MiB
    assert peaks["straightforward"] > 32 > peaks["ours"] > 1


def test_peak_memory_counts_what_is_freed_on_the_way() -> None:
    def work() -> None:
        for _ in range(3):
            torch.ones(2**18).mul(2).sum()

    assert benchmark.peak_bytes(work, torch.device("cpu")) == pytest.approx(2 * 2**20, rel=0.01)
