"""Measuring: both sides in turn in one process for time, each alone in a process of its own for memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.flops import MIB, attention_block_gflops, cache_mib, transformer_tflops
from benchmarks.sides import SIDES, Case, Ours, Side, Theirs
from mvar_lightning.tools.compute import set_precision_policy
from mvar_lightning.training.scale_groups import KeptForBackward
from mvar_lightning.transformer.blocks import LlamaBlocks

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


def in_own_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What ``function`` gives, run in a fresh process; ``{"failed": why}`` where it dies or raises."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            return {"failed": "the process was killed, most likely for memory"}
        except (RuntimeError, MemoryError) as error:
            return {"failed": " ".join(str(error).split())[:200]}


def counted(case: Case) -> dict[str, Any]:
    """What follows from the plan alone; see `flops`."""
    plan, width = case.plan, 64 * case.depth
    llama = case.architecture == "markov_var"
    hidden = int(width * LlamaBlocks().mlp_ratio * 2 / 3 + 255) // 256 * 256 if llama else 4 * width
    rows, bytes_each = 2 * case.batch, 4 if case.precision == "32" else 2
    parts = 3 if llama else 2
    return {
        "attention_gflops": round(attention_block_gflops(plan, width, case.depth), 2),
        "forward_tflop": round(transformer_tflops(plan, width, case.depth, hidden, parts, 4096), 4),
        "trained_tflop": round(transformer_tflops(case.trained_plan, width, case.depth, hidden, parts, 4096), 4),
        "cache_mib": round(cache_mib(plan, width, case.depth, rows, bytes_each), 1),
    }


def times(case: Case) -> dict[str, Any]:
    """Median seconds of each part and side, the ratios, and how far the sides' results are apart."""
    settle(case)
    sides = _load(case)
    result: dict[str, Any] = {"parameters": sum(p.numel() for p in sides["ours"].transformer.parameters())}
    if "reference" in sides:
        result["agreement"] = _agreement(sides, case)
    for part in case.parts:
        runs = {name: partial(sides[name].run, part) for name in sides if name in case.sides_of(part)}
        if part == "groups":
            runs["whole"] = partial(sides["ours"].run, "train")
        result[part] = alternate(runs, case.repeats)
    return result


def alternate(sides: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """Wall-clock and processor seconds (medians) of each side, run in turn so that a busy moment falls on both.

    A ratio is the median of the ratios of neighboring runs, another side (reference, whole) / ours. Processor seconds
    are those of all threads: on a busy machine their ratio is the steadier one.
    """
    wall: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, run in sides.items():
            started = time.perf_counter(), time.process_time()
            run()
            if repeat:  # the first one warms up
                wall[name].append(time.perf_counter() - started[0])
                processor[name].append(time.process_time() - started[1])
    result: dict[str, Any] = {
        name: {
            "seconds": round(statistics.median(wall[name]), 4),
            "processor_seconds": round(statistics.median(processor[name]), 4),
            "all_seconds": [round(value, 4) for value in wall[name]],
        }
        for name in sides
    }
    for other, prefix in (("reference", ""), ("whole", "whole_")):
        if other in sides:
            for key, values in (("ratio", wall), ("processor_ratio", processor)):
                pairs = zip(values[other], values["ours"], strict=True)
                result[prefix + key] = round(statistics.median(theirs / ours for theirs, ours in pairs), 3)
    return result


def memory(case: Case, side: str, part: str) -> dict[str, Any]:
    """Peak memory of one part of one side, MiB: above the loaded side on a CPU, the allocator's peak on a GPU."""
    settle(case)
    loaded: Side = SIDES[side](replace(case, parts=(part,)))
    loaded.keep_for(part)
    if part == "step":
        loaded.run(part)  # the optimizer's state and the gradients of the step before are part of every other step
    gc.collect()
    if case.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loaded.run(part)
        peak = torch.cuda.max_memory_allocated()
    else:
        before = reset_peak_resident()
        loaded.run(part)
        peak = peak_resident()
    figures = {"peak_mib": round(peak / MIB, 1), "above_loaded_mib": round((peak - before) / MIB, 1)}
    if part in ("train", "groups", "step"):
        with KeptForBackward(loaded.transformer) as kept:
            loaded.run(part)
        figures["activations_mib"] = round(kept.peak / MIB, 1)
    return figures


def reset_peak_resident() -> int:
    """Forget the peak where the system can (Linux); bytes resident now, or else the peak so far."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed and not given back would hide what comes
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return peak_resident()
    return _status("VmRSS")


def peak_resident() -> int:
    """Most bytes resident since `reset_peak_resident`, or since the start."""
    if STATUS.is_file():
        return _status("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _load(case: Case) -> dict[str, Side]:
    if case.repo is None:
        return {"ours": Ours(case)}
    theirs = Theirs(case)
    return {"reference": theirs, "ours": Ours(case, theirs.reference)}


def _agreement(sides: dict[str, Side], case: Case) -> dict[str, Any]:
    """Largest differences of logits, greedy sampling and images between the sides, before any is timed."""
    checks = {
        "sample": ("greedy",),
        "decode": ("decode",),
        "generate": ("greedy", "decode"),
        "train": ("logits",),
        "groups": ("logits",),
    }
    result = {}
    for check in dict.fromkeys(check for part in case.parts for check in checks.get(part, ())):
        ours, theirs = (sides[name].run(check).float() for name in ("ours", "reference"))
        result[check] = {
            "largest_difference": float((ours - theirs).abs().max()),
            "largest_value": float(theirs.abs().max()),
        }
    return result


def settle(case: Case) -> None:
    if case.threads:
        torch.set_num_threads(case.threads)
    set_precision_policy(torch.device(case.device))  # as ours run; the references take TF32 too
