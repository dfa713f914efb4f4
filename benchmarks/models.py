"""VAR, MVAR and Markov-VAR: sampling, decoding, training step, memory, counted cost; ours, the references, the papers.

    python -m benchmarks --depths 16 --var-repo ../VAR --markov-var-repo ../Markov-VAR

Weights are random. Given a clone of a reference, its model is built first and imported into ours; results are compared
before anything is timed; then both run in turn in one process. Each run leaves one JSON file (the history) and one
Markdown table, both written after every model, and prints the table.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, dated, now, write_whole
from benchmarks.table import PARTS, markdown
from mvar_lightning.errors import UserError

ARCHITECTURES = ("var", "mvar", "markov_var")
SIZES = (256, 512, 1024)
"""Pixels for which scales are published (`pyramid.PUBLISHED_SIDES`, not asked here, where it would load torch)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks`."""
    add = parser.add_argument
    add("--architectures", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES, metavar="NAME")
    add("--depths", nargs="+", type=int, default=[16], metavar="D", help="16 20 24 are the papers' (16)")
    add("--sizes", nargs="+", type=int, default=[256], choices=SIZES, metavar="PX", help="pixels (256)")
    add("--batch", type=int, default=2, metavar="N", help="images; guidance doubles the rows (2)")
    add(
        "--parts", nargs="*", default=list(PARTS), choices=tuple(PARTS), metavar="PART", help=f"{' '.join(PARTS)} (all)"
    )
    add("--no-memory", action="store_true", help="leave out the peak memory (a process for each side and part)")
    add("--repeats", type=int, default=5, metavar="N", help="of each side, after one warm-up (5)")
    add("--threads", type=int, default=0, metavar="N", help="of torch on a CPU (0: torch's own choice)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto takes a GPU where there is one")
    add("--precision", default="auto", choices=("auto", "32", "bf16"), help="auto: bf16 on a GPU, 32 on a CPU")
    add("--compile", action="store_true", help="compile our blocks (the first run of each scale is slow)")
    add("--graphs", action="store_true", help="sample from CUDA graphs of the scales, where no cache is kept")
    add("--profile", action="store_true", help="also time and memory by phase and scale, of ours")
    add("--peak-tflops", type=float, metavar="N", help="the machine's; a column tells what training reaches of it")
    for name in ARCHITECTURES:
        option = f"--{name.replace('_', '-')}-repo"
        add(option, metavar="DIR", help=f"a clone of {name}'s published code, run beside ours")
    add("--out", type=Path, default=RESULTS, metavar="DIR", help=f"where runs are kept ({RESULTS})")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write. Raises `UserError` for options that mean nothing."""
    _check(args)
    from benchmarks.sides import Case

    device, precision = _machine(args)
    record = describe(device, precision, args)
    figures, table = (dated("models", record["date"], suffix, args.out) for suffix in ("json", "md"))
    for architecture, depth, size in _rows(args):
        repo = getattr(args, f"{architecture}_repo")
        case = Case(architecture, depth, size, args.batch, device, precision, repo, args.repeats, args.threads)
        case = _with_parts(case, args)
        print(f"{architecture} d{depth}, {size} px ...", file=sys.stderr, flush=True)
        row = measure(case, with_memory=not args.no_memory, with_profile=args.profile)
        if args.peak_tflops is not None:
            row["of_peak"] = shares_of_peak(row, args.peak_tflops)
        record["rows"].append(row)
        write_whole(figures, json.dumps(record, indent=1) + "\n")
        write_whole(table, markdown(record))
    print(markdown(record))
    print(f"{figures}: all figures")
    return 0


def measure(case: Any, *, with_memory: bool, with_profile: bool) -> dict[str, Any]:
    """All figures of one model."""
    from benchmarks.measure import counted, in_own_process, memory, times
    from benchmarks.phases import profile
    from benchmarks.published import published_for

    model = case.architecture, case.depth, case.image_size
    row: dict[str, Any] = dict(zip(("architecture", "depth", "image_size"), model, strict=True))
    row["batch"] = case.batch
    row["counted"] = counted(case)
    row["published"] = [{"source": known.source, **known.figures()} for known in published_for(*model)]
    if case.parts:
        row["times"] = in_own_process(times, case)
    if with_memory:
        row["memory"] = {
            part: {side: in_own_process(memory, case, side, part) for side in case.sides_of(part)}
            for part in case.parts
        }
    if with_profile:
        row["profile"] = in_own_process(profile, case)
    return row


def shares_of_peak(row: dict[str, Any], peak_tflops: float) -> dict[str, float]:
    """What part of the machine's peak the products of training take, backward counted as two forward passes."""
    counted, times = row["counted"], row.get("times", {})
    forward = {"train": "trained_tflop", "groups": "trained_tflop", "step": "forward_tflop"}
    return {
        part: round(3 * counted[name] * row["batch"] / times[part]["ours"]["seconds"] / peak_tflops, 4)
        for part, name in forward.items()
        if part in times
    }


def describe(device: str, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a reader of the history must know of a run."""
    import torch

    return {
        "date": now(),
        "commit": _commit(),
        "machine": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": args.threads or torch.get_num_threads(),
        "torch": torch.__version__,
        "device": device,
        "precision": precision,
        "batch": args.batch,
        "repeats": args.repeats,
        "compiled": args.compile,
        "graphs": args.graphs,
        "peak_tflops": args.peak_tflops,
        "rows": [],
    }


def _check(args: argparse.Namespace) -> None:
    for name, least in (("batch", 1), ("repeats", 1), ("threads", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: must be {least} or more")
    if args.peak_tflops is not None and not args.peak_tflops > 0:
        raise UserError(f"--peak-tflops {args.peak_tflops:g}: must be more than 0 (an H200's in bf16 is 790 to 989)")
    if min(args.depths) < 1:
        raise UserError(f"--depths {min(args.depths)}: must be 1 or more (the papers' are 16, 20, 24)")
    for name in ARCHITECTURES:
        repo = getattr(args, f"{name}_repo")
        if repo is not None and not Path(repo).is_dir():
            raise UserError(f"--{name.replace('_', '-')}-repo {repo}: no such folder; give a clone of the reference")


def _machine(args: argparse.Namespace) -> tuple[str, str]:
    import torch

    has_gpu = torch.cuda.is_available()
    if args.device == "cuda" and not has_gpu:
        raise UserError("--device cuda: torch sees no GPU here; leave it out to run on the CPU")
    device = "cuda" if has_gpu and args.device != "cpu" else "cpu"
    automatic = "bf16" if device == "cuda" else "32"
    return device, automatic if args.precision == "auto" else args.precision


def _with_parts(case: Any, args: argparse.Namespace) -> Any:
    from dataclasses import replace

    kept = [part for part in args.parts if part != "groups" or not case.plan.crosses_scales]
    return replace(case, parts=tuple(kept), compiled=args.compile, graphs=args.graphs)


def _rows(args: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    for size in args.sizes:
        for depth in args.depths:
            for architecture in args.architectures:
                yield architecture, depth, size


def _commit() -> str | None:
    """The commit of this package's work tree, marked where it has changes; None where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
