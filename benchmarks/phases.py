"""Where sampling, decoding and a training step spend time and memory: conditioning, parts of each scale, and so on.

Timed wrappers around a few methods mark the borders, so what runs is the sampler or the step itself, not a copy of it.
They go around methods that `compile_blocks` leaves alone: a hook on a compiled block would have it compiled again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.flops import MIB
from benchmarks.measure import peak_resident, reset_peak_resident, settle
from benchmarks.sides import Case, Ours
from mvar_lightning.transformer import NextScaleTransformer

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
    settle(case)
    ours = Ours(case)
    profiled = {"sample": sampled, "decode": _decoded, "train": trained}
    wanted = {*case.parts, *(("sample", "decode") if "generate" in case.parts else ())}
    parts = [part for part in profiled if part in wanted]
    for part in parts:
        ours.run(part)  # warm: what is made on first use is made, and blocks are compiled
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


def sampled(ours: Any, watch: Any) -> None:
    """One run of ``ours.sample()`` with the phases of ``ours.sampler`` marked."""
    phases = _SamplingPhases(watch)
    with phases.around(ours.sampler):
        ours.sample()
    watch.mark(phases.scale, CHOICE)


class _SamplingPhases:
    """Which scale and phase sampling is in. What none of the wrapped methods does is guidance, draw and next input."""

    def __init__(self, watch: Any) -> None:
        self.watch = watch
        self.scale = -1
        self._phase = CONDITION

    @contextlib.contextmanager
    def around(self, model: NextScaleTransformer) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for owner, name, phase in (
                (model, "begin", CONDITION),
                (model, "step_features", BLOCKS),
                (model, "step_input", EMBED),
                (model.head, "features", HEAD),
                (model.head, "classify", HEAD),
            ):
                stack.enter_context(replaced(owner, name, self._timed(getattr(owner, name), phase)))
            yield

    def _timed(self, method: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            outer = self._phase
            self.watch.mark(self.scale, outer)
            if phase == BLOCKS:  # a scale begins
                self.scale, outer = arguments[1], CHOICE
            self._phase = phase
            result = method(*arguments, **named)
            self.watch.mark(self.scale, phase)
            self._phase = outer
            return result

        return run


def trained(ours: Any, watch: Any) -> None:
    """Forward and backward pass as in ``train``; gradients that arrive at the blocks' ends mark the way back."""
    model: NextScaleTransformer = ours.trained
    inputs_of, features_of = model.inputs, model.features

    def inputs(*arguments: Any) -> Any:
        made = inputs_of(*arguments)
        watch.mark(-1, TRAIN["inputs"])
        return made

    def features(given: Any, scales: range) -> torch.Tensor:
        given.x_BlC.register_hook(lambda _: watch.mark(-1, TRAIN["back"]))
        h_BlC = features_of(given, scales)
        watch.mark(-1, TRAIN["blocks"])
        h_BlC.register_hook(lambda _: watch.mark(-1, TRAIN["loss"]))
        return h_BlC

    with replaced(model, "inputs", inputs), replaced(model, "features", features):
        ours.train()
    watch.mark(-1, TRAIN["rest"])


@contextlib.contextmanager
def replaced(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """A method of one object, replaced for the length of a block."""
    assert name not in vars(owner), f"{name} is replaced already"
    setattr(owner, name, method)
    try:
        yield
    finally:
        delattr(owner, name)


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
