"""`python -m benchmarks gpu --out DIR`: one call of at most ten minutes that tells what the suite does on a GPU.

Parts run one after the other, most telling first, each in a process of its own under a limit: one that fails or takes
too long is noted, and the next one begins. Results are written as they come, one JSON line each (``results.jsonl``),
and after each part a Markdown table beside the published figures and the goals (``table.md``). A part that is done is
not run again by a second call with the same folder. Without a GPU all of it runs small (depth 2, a few images), to show
that it runs; such figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
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
    small = not _has_gpu()
    if small:  # forked processes then find it all imported
        for name in ("benchmarks.gpu_parts", "benchmarks.gpu_fit", "torch._dynamo"):
            importlib.import_module(name)
    for part in wanted:
        if not _done(folder, part.name):
            _run_part(part, folder, small)
            write_whole(folder / "table.md", markdown(_rows(folder)))
    rows = [row for row in _latest(_rows(folder)) if row["part"] in {part.name for part in wanted}]
    bad = sorted({row["part"] for row in rows if not row["good"]})
    print(f"{folder / 'table.md'}: " + (f"failed: {', '.join(bad)}" if bad else "all parts within their bounds"))
    return int(bool(bad))


def _has_gpu() -> bool:
    """Asked in a process of its own: one that has looked at CUDA could not make others that use it."""
    if not torch.backends.cuda.is_built():
        return False
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return bool(pool.apply(torch.cuda.is_available))


def _run_part(part: Part, folder: Path, small: bool) -> None:
    # a forked process needs no imports; where CUDA is used it must be a fresh one
    context: Any = multiprocessing.get_context("fork" if small else "spawn")
    process = context.Process(target=_part, args=(part.name, folder, small))
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
    results = Results(folder, part.name, "")
    if why is not None:
        results.write({"what": "part", "part": part.name, "value": None, "good": False, "failed": why})
    seconds = time.perf_counter() - begun
    results.write({"what": "done", "part": part.name, "value": round(seconds, 1), "unit": "s", "good": True})


def _part(name: str, folder: Path, small: bool) -> None:
    """In the part's own process."""
    from benchmarks import gpu_parts

    if small:
        torch.set_num_threads(1)
    device = torch.device("cpu" if small else "cuda")
    set_precision_policy(device)
    results = Results(folder, name, "CPU, small" if small else torch.cuda.get_device_name())
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
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:  # the last line of a call that was killed
            continue
    return rows


def _done(folder: Path, name: str) -> bool:
    """Whether a part has run to its end and nothing of it was ended early."""
    rows = [row for row in _latest(_rows(folder)) if row["part"] == name]
    return any(row["what"] == "done" for row in rows) and not any("failed" in row for row in rows)


def _latest(rows: list[Row]) -> list[Row]:
    """Rows of each part's last run."""
    kept: dict[str, list[Row]] = {}
    ended: set[str] = set()
    for row in rows:
        if row["part"] in ended:
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
        bounds = [f"{sign} {row[name]:g}" for name, sign in (("most", "<="), ("least", ">=")) if row.get(name)]
        verdict = "" if row["good"] else " **failed**"
        beside = [str(row.get(name) or "") for name in ("goal", "published")]
        cells = [row["part"], row["what"], f"{value}{verdict}", ", ".join(bounds), *beside, row.get("device", "")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
