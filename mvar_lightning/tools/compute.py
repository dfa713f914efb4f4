"""How a process computes: evaluation mode, device, precision, memory, and what is tuned on CPUs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import nn

from mvar_lightning.compat import constant_when_compiled
from mvar_lightning.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradient; afterwards every submodule has its own mode again."""
    training = [part for module in modules for part in module.modules() if part.training]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True


def table(maxsize: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Keeps the tables (masks, angles, matrices) that a function makes of plain arguments and a device.

    They are made when first asked for, not in constructors: a model built on the meta device has nothing to hold them.
    Made on the CPU and outside inference mode, or a validation before training would leave tensors that autograd
    refuses. A compiler takes them as constants instead of tracing how they are made.
    """

    def decorate(make: Callable[P, R]) -> Callable[P, R]:
        def made(*arguments: P.args, **named: P.kwargs) -> R:
            with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
                return make(*arguments, **named)

        cached: Callable[..., R] = lru_cache(maxsize)(made)

        @wraps(make)
        def kept(*arguments: P.args, **named: P.kwargs) -> R:
            return cached(*arguments, **named)

        return constant_when_compiled(kept)

    return decorate


TRIM_THRESHOLD, MMAP_THRESHOLD, NEVER = -1, -3, 2**31 - 1
"""Names of settings for ``mallopt`` (glibc, `malloc.h`), and the largest value."""


def cpu_tuning() -> bool:
    """Whether what is faster on CPUs alone may be taken: products of oneDNN, the decoder's layout and upsampling, and
    memory that is kept. ``MVAR_CPU_TUNING=0`` in the environment leaves all of it to torch."""
    return os.environ.get("MVAR_CPU_TUNING", "1") != "0"


def keep_freed_memory() -> bool:
    """Keep freed memory for the next tensor. By default glibc gives large blocks back at once, and every step gets them
    again page by page, filled with zeros: 10% to 15% of a training step (VAR-d16's sizes, two cores).

    The process stays as large as it was at its largest. Returns whether there was something to set.
    """
    if not sys.platform.startswith("linux") or not cpu_tuning():
        return False
    setting = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return setting is not None and all(setting(name, NEVER) for name in (TRIM_THRESHOLD, MMAP_THRESHOLD))


# One policy of precision, for training, sampling, evaluation and benchmarks alike (the table is in docs/speed.md). On a
# GPU float32 products and convolutions are TF32, but for those in `exact_float32`; on a CPU nothing changes.


def set_precision_policy(device: torch.device) -> None:
    """Take the suite's policy for a process that computes on ``device``."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        pinned = os.environ.get("MVAR_CUDNN_ATTENTION")  # its plans are of one shape each: measured, then chosen here
        if pinned is not None:
            torch.backends.cuda.enable_cudnn_sdp(pinned == "1")


@contextlib.contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """IEEE float32, without autocast and without TF32: for tokens, what they are made of and what is made of them.

    Whoever reads a token must find the code that was nearest: a residual rounded to TF32 has another one in 1 to 3% of
    all places. Of the calling thread's forward pass; a backward pass runs under the policy.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]


def choose_device(name: str) -> torch.device:
    """The device called ``name``, under the policy of precision. Raises `UserError` for a GPU that is not there."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("``device`` cuda: there is no usable GPU here; use ``device`` cpu")
    device = torch.device("cuda" if available and name != "cpu" else "cpu")
    set_precision_policy(device)
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """``32`` or ``bf16``; auto is bf16 on a GPU."""
    return name if name != "auto" else "bf16" if device.type == "cuda" else "32"


def runs_behind(device: torch.device) -> bool:
    """Whether reading a number back makes the host wait for the device; no training step should, but where it logs."""
    return device.type != "cpu"


def computing(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which the model computes in ``precision``."""
    set_precision_policy(device)  # a process that others started has chosen no device
    return contextlib.nullcontext() if precision == "32" else torch.autocast(device.type, dtype=torch.bfloat16)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory so far, in MB of 10^6 bytes, by its logged name."""
    name = "memory/peak_gpu_mb" if device.type == "cuda" else "memory/peak_resident_mb"
    return {name: peak_memory_bytes(device) / 1e6}


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: the allocator's on a GPU, the resident set of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak_memory(device: torch.device) -> None:
    """Begin `peak_memory_bytes` anew, where the system can: the allocator's, or on Linux the process' own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size


def plain_numbers(value: Any) -> Any:
    """A number out of its tensor (0-d, of any device) or array; of a list, each. All else as it is."""
    if isinstance(value, (list, tuple)):
        return [plain_numbers(each) for each in value]
    return value.item() if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim == 0 else value
