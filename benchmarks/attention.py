"""Attention per scale against attention with a mask, at VAR-d16 shapes: `make bench`.

Both sides run alternately in one process, forward and forward + backward, and the medians are compared. The
absolute times belong to this machine; the ratio is what carries over.

B batch, H heads, L tokens, D head dim.
"""

from __future__ import annotations

import argparse
import platform
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.quantizer import alternate
from benchmarks.results import write_figures
from mvar_lightning.attention import (
    AdjacentAttention,
    AttentionBackend,
    AttentionStrategy,
    FullAttention,
    SlidingWindowAttention,
    SpatialAttention,
    choose_backend,
)
from mvar_lightning.pyramid import PUBLISHED_SIDES, ScalePyramid

STRATEGIES: tuple[AttentionStrategy, ...] = (
    FullAttention(),
    SlidingWindowAttention(2),
    AdjacentAttention(),
    SpatialAttention(7),
)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write the figures."""
    pyramid = ScalePyramid(PUBLISHED_SIDES[arguments.image_size])
    shape = (arguments.batch, arguments.heads, pyramid.num_tokens, 64)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = [compare(strategy, pyramid, shape, device, dtype, arguments.repeats) for strategy in STRATEGIES]
    figures = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {device}, {dtype}",
        "torch": torch.__version__,
        "shape_BHLD": list(shape),
        "milliseconds": rows,
    }
    for row in rows:
        print(
            f"{row['strategy']:45s} forward {row['masked_forward']:7.2f} -> {row['per_scale_forward']:7.2f} ms "
            f"({row['forward_ratio']:.2f}x)   step {row['masked_step']:7.2f} -> {row['per_scale_step']:7.2f} ms "
            f"({row['step_ratio']:.2f}x)"
        )
    print(f"{write_figures(figures, 'attention', arguments.out)}: all figures")
    return 0


def compare(
    strategy: AttentionStrategy,
    pyramid: ScalePyramid,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
) -> dict[str, Any]:
    """Median milliseconds of both renderings, and the ratios masked / per scale."""
    names = {"masked": "dense", "per_scale": "auto"}
    backends = {side: choose_backend(name, strategy, pyramid) for side, name in names.items()}
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    scales = range(pyramid.num_scales)

    def forward(backend: AttentionBackend) -> Tensor:
        return backend(q, k, v, scales, 1.0)

    def forward_only(backend: AttentionBackend) -> None:
        with torch.no_grad():
            forward(backend)

    def step(backend: AttentionBackend) -> None:
        torch.autograd.grad(forward(backend).sum(), (q, k, v))

    row: dict[str, Any] = {"strategy": repr(strategy)}
    for name, work in (("forward", forward_only), ("step", step)):
        times = alternate({side: partial(work, backend) for side, backend in backends.items()}, repeats, device)
        for side, seconds in times.items():
            row[f"{side}_{name}"] = round(1000 * seconds, 3)
        row[f"{name}_ratio"] = round(times["masked"] / times["per_scale"], 3)
    return row
