"""Where sampling, decoding and a training step spend their time and memory: conditioning, each scale's parts, and so on.

Hooks on the modules mark the borders, so what runs is the sampler or the step itself, not a copy of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mvar_lightning.benchmarks.flops import MIB
from mvar_lightning.benchmarks.measure import peak_resident, reset_peak_resident
from mvar_lightning.benchmarks.sides import Case, Ours

EMBED, BLOCKS, HEAD, CHOICE = "embed", "blocks", "head", "guide, draw, next input"
CONDITION, DECODE = "conditioning", "decode"
TRAIN = {
    "inputs": "train: inputs",
    "blocks": "train: blocks",
    "loss": "train: head and loss, with their gradients",
    "back": "train: blocks, backward",
    "rest": "train: inputs, backward",
}


class Stopwatch:
    """Seconds, and memory above the start, by (scale, phase)."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.seconds: dict[tuple[int, str], float] = {}
        self.memory: dict[tuple[int, str], float] = {}
        self.base = self._fresh_peak()
        self.last = time.perf_counter()

    def mark(self, scale: int, phase: str) -> None:
        """What has passed since the last mark belongs to this phase."""
        if self.cuda:
            torch.cuda.synchronize()
        key, now = (scale, phase), time.perf_counter()
        peak = torch.cuda.max_memory_allocated() if self.cuda else peak_resident()
        self.seconds[key] = self.seconds.get(key, 0.0) + now - self.last
        self.memory[key] = max(self.memory.get(key, 0.0), (peak - self.base) / MIB)
        self._fresh_peak()
        self.last = time.perf_counter()

    def _fresh_peak(self) -> int:
        if not self.cuda:
            return reset_peak_resident()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()


def profile(case: Case) -> dict[str, Any]:
    """Rows of (scale, phase, seconds, MiB above the loaded model): sampling, decoding and a training step, of the
    case's parts. Phases of no scale have -1."""
    if case.threads:
        torch.set_num_threads(case.threads)
    ours = Ours(case)
    profiled = {"sample": _sampled, "decode": _decoded, "train": _trained}
    parts = [part for part in profiled if part in case.parts]
    for part in parts:
        ours.run(part)  # warm: what is made on first use is made
    watch = Stopwatch(case.device == "cuda")
    for part in parts:
        with case.autocast():
            profiled[part](ours, watch)
    rows = [
        {"scale": scale, "phase": phase, "seconds": round(seconds, 5), "mib": round(watch.memory[scale, phase], 1)}
        for (scale, phase), seconds in watch.seconds.items()
    ]
    return {"rows": rows, "seconds": round(sum(watch.seconds.values()), 4)}


def _decoded(ours: Ours, watch: Stopwatch) -> None:
    ours.decode()
    watch.mark(-1, DECODE)


def _sampled(ours: Ours, watch: Stopwatch) -> None:
    handles = _hooks(ours, watch)
    ours.sample()
    watch.mark(ours.case.pyramid.num_scales - 1, CHOICE)
    for handle in handles:
        handle.remove()


def _trained(ours: Ours, watch: Stopwatch) -> None:
    """Forward and backward pass as in ``train``; gradients that arrive at the blocks' ends mark the way back."""
    first, last = ours.trained.blocks[0], ours.trained.blocks[-1]

    def before_blocks(module: nn.Module, inputs: Any) -> None:
        watch.mark(-1, TRAIN["inputs"])
        inputs[0].register_hook(lambda _: watch.mark(-1, TRAIN["back"]))

    def after_blocks(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        watch.mark(-1, TRAIN["blocks"])
        output.register_hook(lambda _: watch.mark(-1, TRAIN["loss"]))

    handles = [first.register_forward_pre_hook(before_blocks), last.register_forward_hook(after_blocks)]
    ours.train()
    watch.mark(-1, TRAIN["rest"])
    for handle in handles:
        handle.remove()


def _hooks(ours: Ours, watch: Stopwatch) -> list[Any]:
    """Marks between the phases of sampling. The scale is counted by the backend's view of it: a block is told which it runs."""
    model = ours.sampler
    scale = -1

    def before_blocks(module: nn.Module, inputs: Any) -> None:
        nonlocal scale
        scale = inputs[2].start
        watch.mark(scale, EMBED)

    def after(phase: str) -> Callable[..., None]:
        return lambda *_: watch.mark(scale, phase)

    def before_words(*_: Any) -> None:
        watch.mark(scale, CHOICE)

    def before_positions(*_: Any) -> None:
        if scale < 0:
            watch.mark(-1, CONDITION)

    return [
        model.positions.register_forward_pre_hook(before_positions),
        model.word_embedding.register_forward_pre_hook(before_words),
        model.blocks[0].register_forward_pre_hook(before_blocks),
        model.blocks[-1].register_forward_hook(after(BLOCKS)),
        model.head.linear.register_forward_hook(after(HEAD)),
    ]


def table(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One line for each scale: seconds of its phases, and its peak."""
    phases = (EMBED, BLOCKS, HEAD, CHOICE)
    lines: list[tuple[str, ...]] = [("scale", *phases, "MiB")]
    for scale in sorted({row["scale"] for row in rows if row["scale"] >= 0}):
        of_scale = {row["phase"]: row for row in rows if row["scale"] == scale}
        seconds = [f"{of_scale[phase]['seconds']:.4f}" if phase in of_scale else "" for phase in phases]
        lines.append((str(scale), *seconds, f"{max(row['mib'] for row in of_scale.values()):.0f}"))
    once = [row for row in rows if row["scale"] < 0]
    return lines + [(row["phase"], f"{row['seconds']:.4f}", "", "", "", f"{row['mib']:.0f}") for row in once]
