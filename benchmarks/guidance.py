"""Sampling with guidance against sampling without, in turn: what a model gains that needs none (CCA).

    python -m benchmarks guidance [--architecture var] [--depth 16] [--image-size 256] [--batch 2] [--repeats 3]

Random weights, tokens only, as the models' benchmark samples. Guidance runs each image twice at every scale; drawing
and the latent map are the same work on both sides.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from benchmarks.measure import alternate, settle
from benchmarks.results import check_numbers, write_figures
from benchmarks.sides import Case, Ours


def measure(case: Case) -> dict[str, Any]:
    """Medians of both sides, and the median of the ratios guided / unguided of neighboring runs."""
    settle(case)
    side = Ours(case)
    found = alternate({"reference": partial(side.run, "sample"), "ours": partial(side.run, "unguided")}, case.repeats)
    return {"guided": found.pop("reference"), "unguided": found.pop("ours"), **found}


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write the figures. Raises `UserError` for numbers below 1."""
    check_numbers(arguments, "depth", "batch", "repeats")
    sizes = {name: getattr(arguments, name) for name in ("architecture", "image_size", "depth", "batch", "repeats")}
    found = measure(Case(**sizes, device="cpu", threads=arguments.threads, parts=("sample",)))
    for name in ("guided", "unguided"):
        times = found[name]
        print(f"{name:10s} {times['seconds']:8.2f} s, of the processor {times['processor_seconds']:.2f} s")
    print(f"unguided is {found['ratio']:.2f}x as fast, by processor time {found['processor_ratio']:.2f}x")
    print(f"{write_figures({**sizes, **found}, 'guidance', arguments.out)}: all figures")
    return 0
