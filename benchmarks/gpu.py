"""`python -m benchmarks.gpu --out DIR`: one call of at most ten minutes that tells what the suite does on a GPU.

Parts run one after the other, most telling first, each in a process of its own under a limit: one that fails or takes
too long is noted, and the next one begins. Results are written as they come, one JSON line each (``results.jsonl``),
and after each part a Markdown table beside the published figures and the goals (``table.md``). A part that is done is
not run again by a second call with the same folder on the same kind of device. Without a GPU all of it runs small
(depth 2, a few images), to show that it runs; such figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import now, write_whole
from mvar_lightning.errors import UserError
from mvar_lightning.tools.compute import set_precision_policy

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One part: its function in `benchmarks.gpu_parts`, and the seconds it may take."""

    name: str
    seconds: int


PARTS = tuple(
    Part(*each)
    for each in (
        ("attention", 60),
        ("tokens", 35),
        ("graphs", 55),
        ("step", 125),
        ("sample", 100),
        ("fit", 45),
        ("pytest", 60),
    )
)
"""In the order in which they run; 480 s if every one took all of its time. What starts them comes on top."""


SMALL = "CPU, small"
"""Stands for the device where there is no GPU."""

NO_GPU = (
    f"NO GPU: torch {torch.__version__} (CUDA {torch.version.cuda or 'left out'}) sees none. All runs small on a CPU, "
    "to show that it runs: NO FIGURE OF THIS CALL MEANS ANYTHING"
)


class Results:
    """What a part writes: one line a result, at once, so that a part which is ended leaves what it had."""

    def __init__(self, folder: Path, part: str, device: str) -> None:
        self.file, self.part, self.device = folder / "results.jsonl", part, device

    def add(
        self,
        what: str,
        value: float | None,
        unit: str = "",
        *,
        most: float | None = None,
        least: float | None = None,
        **beside: Any,
    ) -> None:
        """One figure. ``most`` and ``least`` are the bounds outside of which the part has failed; what stands beside it
        (a goal, a published figure) judges nothing."""
        lowest, highest = -math.inf if least is None else least, math.inf if most is None else most
        good = value is not None and lowest <= value <= highest  # NaN is not
        row = {"part": self.part, "what": what, "value": value, "unit": unit, "most": most, "least": least}
        self.write({**row, "good": good, **beside})

    def write(self, row: Row) -> None:
        line = json.dumps({**row, "device": self.device, "date": now()})
        with self.file.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def run(arguments: argparse.Namespace) -> int:
    """All parts that are not done; 1 where one failed."""
    folder: Path = arguments.out
    if folder.is_file():
        raise UserError(f"--out {folder}: is a file; name a folder")
    wanted = [part for part in PARTS if part.name in (arguments.parts or [part.name])]
    folder.mkdir(parents=True, exist_ok=True)
    _import_all()
    device = _gpu() or SMALL
    if device == SMALL:
        print(NO_GPU, file=sys.stderr, flush=True)
    for part in wanted:
        if not _done(folder, part.name, device):
            _run_part(part, folder, device)
            write_whole(folder / "table.md", markdown(_rows(folder)))
    rows = [row for row in _latest(_rows(folder)) if row["part"] in {part.name for part in wanted}]
    bad = sorted({row["part"] for row in rows if not row["good"]})
    print(f"{folder / 'table.md'}: " + (f"failed: {', '.join(bad)}" if bad else "all parts within their bounds"))
    if device == SMALL:
        print(NO_GPU, file=sys.stderr, flush=True)
    return int(bool(bad))


def _import_all() -> None:
    """What the parts import, before the first begins; forked processes then find it all there."""
    for name in ("benchmarks.gpu_parts", "benchmarks.gpu_fit", "torch._dynamo"):
        importlib.import_module(name)
    if importlib.util.find_spec("pytest") is None:  # imported, it could not look into what is imported after it
        raise UserError("pytest is not installed: pip install -e '.[dev]' in the clone first")


def _gpu() -> str:
    """The GPU's name, if there is one. Asked in a process of its own: one that has looked at CUDA could not make others
    that use it."""
    if not torch.backends.cuda.is_built():
        return ""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return str(pool.apply(_name_of_gpu))


def _name_of_gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def _run_part(part: Part, folder: Path, device: str) -> None:
    small = device == SMALL
    # a forked process needs no imports; where CUDA is used it must be a fresh one
    context: Any = multiprocessing.get_context("fork" if small else "spawn")
    process = context.Process(target=_part, args=(part.name, folder, device))
    begun = time.perf_counter()
    process.start()
    process.join(part.seconds)
    why = None
    if process.is_alive():
        process.kill()
        process.join()
        why = f"ended after {part.seconds} s"
    elif process.exitcode:
        why = f"its process ended with status {process.exitcode}"
    results = Results(folder, part.name, device)
    if why is not None:
        results.write({"what": "part", "part": part.name, "value": None, "good": False, "failed": why})
    seconds = time.perf_counter() - begun
    results.write({"what": "done", "part": part.name, "value": round(seconds, 1), "unit": "s", "good": True})


def _part(name: str, folder: Path, device_name: str) -> None:
    """In the part's own process."""
    from benchmarks import gpu_parts

    if small := device_name == SMALL:
        torch.set_num_threads(1)
    device = torch.device("cpu" if small else "cuda")
    set_precision_policy(device)
    results = Results(folder, name, device_name)
    measure: Callable[[Results, torch.device, bool], None] = getattr(gpu_parts, name)
    try:
        torch.manual_seed(0)
        measure(results, device, small)
    except BaseException as error:
        traceback.print_exc()
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        results.write({"part": name, "what": "part", "value": None, "good": False, "failed": said})
        raise SystemExit(1) from error


def _rows(folder: Path) -> list[Row]:
    file = folder / "results.jsonl"
    rows = []
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a call that was killed
            continue
        if isinstance(row, dict) and row.keys() >= {"part", "what", "device"}:
            rows.append(row)
    return rows


def _done(folder: Path, name: str, device: str) -> bool:
    """Whether a part has run to its end on such a device and nothing of it was ended early."""
    rows = [row for row in _latest(_rows(folder)) if row["part"] == name and row["device"] == device]
    return any(row["what"] == "done" for row in rows) and not any("failed" in row for row in rows)


def _latest(rows: list[Row]) -> list[Row]:
    """Rows of each part's last run, which is on one device."""
    kept: dict[str, list[Row]] = {}
    ended: set[str] = set()
    for row in rows:
        if row["part"] in ended or any(before["device"] != row["device"] for before in kept.get(row["part"], [])[:1]):
            kept[row["part"]] = []
            ended.discard(row["part"])
        kept.setdefault(row["part"], []).append(row)
        if row["what"] == "done":
            ended.add(row["part"])
    return [row for part in kept.values() for row in part]


def markdown(rows: list[Row]) -> str:
    """A table of all figures, with their bounds, goals and published figures."""
    lines = ["| part | what | measured | bound | goal | published | device |", "|---|---|---|---|---|---|---|"]
    for row in _latest(rows):
        value = row.get("failed") or ("-" if row["value"] is None else f"{row['value']:.4g} {row.get('unit', '')}")
        signs = [(sign, row.get(name)) for name, sign in (("most", "<="), ("least", ">="))]
        bounds = [f"{sign} {bound:g}" for sign, bound in signs if bound is not None]
        verdict = "" if row["good"] else " **failed**"
        beside = [str(row.get(name) or "") for name in ("goal", "published")]
        cells = [row["part"], row["what"], f"{value}{verdict}", ", ".join(bounds), *beside, row.get("device", "")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    from benchmarks.__main__ import main

    sys.exit(main(["gpu", *sys.argv[1:]]))
