"""VAR, MVAR and Markov-VAR: sampling, decoding, training step, memory, counted cost; ours, the references, the papers.

    mvar bench --depths 16 --var-repo ../VAR --markov-var-repo ../Markov-VAR

Weights are random. Given a clone of a reference, its model is built first and imported into ours; results are compared
before anything is timed; then both run in turn in one process. Each run leaves one JSON file (the history), and prints
and writes one Markdown table.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mvar_lightning.errors import UserError

ARCHITECTURES = ("var", "mvar", "markov_var")
PARTS = {
    "sample": "sampling, tokens only",
    "decode": "decoding",
    "train": "train step",
    "groups": "train step in scale groups",
}
RESULTS = Path("benchmarks/results")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mvar bench`."""
    add = parser.add_argument
    add("--architectures", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES, metavar="NAME")
    add("--depths", nargs="+", type=int, default=[16], metavar="D", help="16 20 24 are the papers' (16)")
    add("--sizes", nargs="+", type=int, default=[256], choices=(256, 512, 1024), metavar="PX", help="pixels (256)")
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
    add("--profile", action="store_true", help="also time and memory by phase and scale, of ours")
    for name in ARCHITECTURES:
        option = f"--{name.replace('_', '-')}-repo"
        add(option, metavar="DIR", help=f"a clone of {name}'s published code, run beside ours")
    add("--out", type=Path, default=RESULTS, metavar="DIR", help=f"where runs are kept ({RESULTS})")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write. Raises `UserError` for options that mean nothing."""
    _check(args)
    from mvar_lightning.benchmarks.sides import Case

    device, precision = _machine(args)
    record = describe(device, precision, args)
    stem = f"models-{record['date'].replace(':', '')}"
    args.out.mkdir(parents=True, exist_ok=True)
    for architecture, depth, size in _rows(args):
        repo = getattr(args, f"{architecture}_repo")
        case = Case(architecture, depth, size, args.batch, device, precision, repo, args.repeats, args.threads)
        case = _with_parts(case, args)
        print(f"{architecture} d{depth}, {size} px ...", file=sys.stderr, flush=True)
        record["rows"].append(measure(case, with_memory=not args.no_memory, with_profile=args.profile))
        _write(args.out / f"{stem}.json", json.dumps(record, indent=1) + "\n")
    text = markdown(record)
    _write(args.out / f"{stem}.md", text)
    print(text)
    print(f"{args.out / stem}.json: all figures")
    return 0


def measure(case: Any, *, with_memory: bool, with_profile: bool) -> dict[str, Any]:
    """All figures of one model."""
    from mvar_lightning.benchmarks.measure import counted, in_own_process, memory, times
    from mvar_lightning.benchmarks.phases import profile
    from mvar_lightning.benchmarks.published import published_for

    model = case.architecture, case.depth, case.image_size
    row: dict[str, Any] = dict(zip(("architecture", "depth", "image_size"), model, strict=True))
    row["batch"] = case.batch
    row["counted"] = counted(case)
    row["published"] = [{"source": known.source, **known.figures()} for known in published_for(*model)]
    if case.parts:
        row["times"] = in_own_process(times, case)
    if with_memory:
        sides = ("ours",) if case.repo is None else ("ours", "reference")
        row["memory"] = {
            part: {side: in_own_process(memory, case, side, part) for side in sides} for part in case.parts
        }
    if with_profile:
        row["profile"] = in_own_process(profile, case)
    return row


def describe(device: str, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a reader of the history must know of a run."""
    import torch

    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _commit(),
        "machine": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": args.threads or torch.get_num_threads(),
        "torch": torch.__version__,
        "device": device,
        "precision": precision,
        "batch": args.batch,
        "repeats": args.repeats,
        "compiled": args.compile,
        "rows": [],
    }


def markdown(record: dict[str, Any]) -> str:
    """The run as one table: ours, the reference and the papers side by side."""
    head = (
        f"{record['date']}, commit {record['commit']}, {record['machine']}, {record['threads']} threads, "
        f"torch {record['torch']}, {record['precision']}, batch {record['batch']}"
    )
    lines = [head, "", "| model | measure | ours | reference | ratio | published |", "|---|---|---|---|---|---|"]
    for row in record["rows"]:
        name = f"{row['architecture']} d{row['depth']}, {row['image_size']} px"
        for cells in _cells(row):
            lines.append(f"| {name} | {' | '.join(cells)} |")
            name = ""
    for row in record["rows"]:
        if "rows" in row.get("profile", {}):
            lines += ["", *_profile_lines(row)]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Measure, ours, reference, ratio, published."""
    times, counted = row.get("times", {}), row["counted"]
    if "failed" in times:
        yield "times", f"failed: {times['failed']}", "", "", ""
    for part, name in PARTS.items():
        known = _known(row, "sample_decode_s", " with decoding") if part == "sample" else ""
        known = _known(row, "train_s") if part == "train" else known
        if part in times:
            ours, theirs = times[part]["ours"], times[part].get("reference")
            ratio = f"{times[part]['ratio']:.2f} ({times[part]['processor_ratio']:.2f} cpu)" if theirs else ""
            yield f"{name}, s", f"{ours['seconds']:.3f}", f"{theirs['seconds']:.3f}" if theirs else "", ratio, known
        elif known:
            yield f"{name}, s", "", "", "", known
        if "whole" in times.get(part, {}):
            whole = times[part]["whole"]["seconds"]
            yield "  our whole step beside it, s", f"{whole:.3f}", "", f"{times[part]['whole_ratio']:.2f}", ""
    measured = row.get("memory", {})
    for part, name in _MEMORY_NAMES.items():
        if part not in measured and (known := _known(row, name)):
            yield f"{PARTS[part]}: peak (above loaded), MiB", "", "", "", known
    for part, sides in measured.items():
        cells = [_memory_cell(sides.get(side)) for side in ("ours", "reference")]
        both = [sides[side].get("peak_mib") for side in ("ours", "reference") if side in sides]
        ratio = f"{both[0] / both[1]:.2f}" if len(both) == 2 and all(both) else ""
        yield f"{PARTS[part]}: peak (above loaded), MiB", *cells, ratio, _known(row, _MEMORY_NAMES.get(part, ""))
        kept = [sides[side].get("activations_mib") for side in ("ours", "reference") if side in sides]
        if any(kept):
            ratio = f"{kept[0] / kept[1]:.2f}" if len(kept) == 2 and all(kept) else ""
            words = [f"{each:.0f}" if each else "" for each in kept]
            yield f"{PARTS[part]}: kept for backward, MiB", words[0], "".join(words[1:]), ratio, ""
    for check, apart in times.get("agreement", {}).items():
        yield f"{check}: largest difference", f"{apart['largest_difference']:.1e}", "", "", ""
    yield "key-value cache, MiB", f"{counted['cache_mib']:.0f}", "", "", _known(row, "cache_mib", " at their batch")
    gflops = f"{counted['attention_gflops']:.2f}"
    yield "attention blocks, GFLOPs counted", gflops, "", "", _known(row, "attention_gflops")


_MEMORY_NAMES = {"sample": "peak_mib", "train": "train_mib"}


def _known(row: dict[str, Any], name: str, note: str = "") -> str:
    return "; ".join(f"{known[name]:g}{note} ({known['source']})" for known in row["published"] if name in known)


def _memory_cell(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return ""
    if "failed" in figures:
        return f"failed: {figures['failed']}"
    return f"{figures['peak_mib']:.0f} ({figures['above_loaded_mib']:.0f})"


def _profile_lines(row: dict[str, Any]) -> Iterator[str]:
    from mvar_lightning.benchmarks.phases import table

    first, *rest = table(row["profile"]["rows"])
    yield f"{row['architecture']} d{row['depth']}, {row['image_size']} px: seconds by phase, memory above the model"
    yield ""
    yield f"| {' | '.join(first)} |"
    yield "|" + "---|" * len(first)
    yield from (f"| {' | '.join(line)} |" for line in rest)


def _check(args: argparse.Namespace) -> None:
    for name, least in (("batch", 1), ("repeats", 1), ("threads", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: must be {least} or more")
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
    return replace(case, parts=tuple(kept), compiled=args.compile)


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


def _write(path: Path, text: str) -> None:
    """Aside, then renamed: the history holds no half file."""
    aside = path.with_name(f".{path.name}.aside")
    aside.write_text(text)
    aside.replace(path)
