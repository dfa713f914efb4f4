"""Measures the analyses of docs/analyses.yaml that docs/evidence/analyses/ lacks, one file an analysis, model and seed:
`python docs/analyses.py`, part of `make evidence`. Their tables are composed for docs/evidence.py."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from mvar_lightning.runs.told_apart import LEVEL
from mvar_lightning.tools.console import table_of
from mvar_lightning.tools.files import read_json, write_json

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "evidence" / "analyses"
WRITTEN = {"attention": "attention", "rfa": "rfa", "perturb": "perturbation"}
"""Analysis -> the name of the file that it writes."""

PICTURES = {"attention": ("attention_scales", "attention_windows"), "rfa": ("rfa",), "perturb": ("perturbation", "perturbed")}
HEADS = {
    "attention": "Attention on each scale as a multiple of an even spread over all tokens that are seen; mean over blocks",
    "windows": "Share of the attention on a query's own map inside a window around it, against an even spread's",
    "rfa": "Residual-feature alignment of {model}, sign(s) sqrt(|s|): residual of a scale (rows), input of a scale",
    "perturb": "Damage of one wrong token an image ({images} images a seed, FID against {fid_reference_images:,})",
}


def plan() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())


def measure(plan: dict[str, Any], analysis: str, model: str, seed: int, pictures: bool) -> dict[str, Any]:
    """One analysis of one run: its numbers, and its options."""
    options = f"{plan['analyses'][analysis]} {plan['options']}"
    out = ROOT / "runs" / "analyses" / model / f"seed{seed}"
    words = [sys.executable, "-m", "mvar_lightning", "analyze", analysis, "--data", plan["data"], "--out", str(out)]
    checkpoint = f"{plan['runs'][model]}/seed{seed}"
    subprocess.run([*words, "--checkpoint", checkpoint, *options.split()], check=True, cwd=ROOT)
    if pictures:
        for name in PICTURES[analysis]:
            shutil.copy(out / f"{name}.png", KEPT / f"{name}.png")
    return {"options": options, "checkpoint": checkpoint, "found": json.loads((out / f"{WRITTEN[analysis]}.json").read_text())}


# The tables, from the files alone.


def section() -> str:
    """Tables and pictures of docs/evidence.md."""
    wanted = plan()
    about = ", ".join(f"{model} `{run}`" for model, run in wanted["runs"].items())
    commands = "; ".join(f"`mvar analyze {name} {options} {wanted['options']}`" for name, options in wanted["analyses"].items())
    test = f"* told apart (t-test over the seeds, Bonferroni over the table's cells, p < {LEVEL})"
    lines = ["## analyses", "", f"{about}; {commands}.", "", f"Mean ± standard deviation over the seeds; {test}.", ""]
    found = {(name, model): _found(wanted, name, model) for name in WRITTEN for model in wanted["runs"]}
    first = next(iter(wanted["runs"]))
    for name, model in ((name, model) for name in WRITTEN for model in wanted["runs"]):
        seeds = found[name, model]
        if len(seeds) < len(wanted["seeds"]):
            lines += [f"Not measured yet: {name} of {model}, {len(wanted['seeds']) - len(seeds)} seeds.", ""]
        if len(seeds) > 1:
            lines += [line for head, table in TABLES[name](model, seeds) for line in (f"{head}:", "", table)]
            if model == first:
                pictures = [f"![{picture} of {model}, one seed](evidence/analyses/{picture}.png)" for picture in PICTURES[name]]
                lines += [*pictures, ""]
    return "\n".join(lines)


def _found(plan: dict[str, Any], analysis: str, model: str) -> list[dict[str, Any]]:
    files = [KEPT / f"{analysis}-{model}-seed{seed}.json" for seed in plan["seeds"]]
    kept = [read_json(file, "cannot be read ({error}); remove it") for file in files if file.exists()]
    if any(one["options"] != f"{plan['analyses'][analysis]} {plan['options']}" for one in kept):
        raise SystemExit(f"{KEPT}/{analysis}-*.json: are of other options than docs/analyses.yaml; remove them")
    return [one["found"] for one in kept]


def _attention(model: str, seeds: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    tokens = [side**2 for side in seeds[0]["scales"]]
    names = [f"{side}x{side}" for side in seeds[0]["scales"]]
    if any(seeds[0]["mass_on_scale_mean"][-1][:-1]):  # else all of it lies on the own scale by construction
        rows = [
            [
                [seed["mass_on_scale_mean"][query][key] * sum(tokens[: query + 1]) / tokens[key] for seed in seeds]
                for key in range(query + 1)
            ]
            for query in range(1, len(names))
        ]
        yield f"{HEADS['attention']}, {model} (* not 1)", _matrix("query scale", names, rows, 1.0, ".2f")
    rows = []
    for query, side in enumerate(seeds[0]["scales"]):
        shown = [number for number, kernel in enumerate(seeds[0]["kernels"]) if kernel < side]
        for number in shown if query >= len(names) - 2 else ():
            shares = [seed["mass_within_kernel_mean"][query][number] for seed in seeds]
            even = seeds[0]["mass_within_kernel_if_even"][query][number]
            kernel = seeds[0]["kernels"][number]
            rows.append([names[query], f"{kernel}x{kernel}", shares, even])
    cells = [[*row[:2], _cell(row[2], row[3], len(rows), ".1%"), f"{row[3]:.1%}"] for row in rows]
    yield f"{HEADS['windows']}, {model} (* not even)", table_of(["map", "window", "share", "even"], cells)


def _rfa(model: str, seeds: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    names = [f"{side}x{side}" for side in seeds[0]["scales"]]
    rows = [
        [[math.copysign(math.sqrt(abs(value)), value) for value in values] for values in zip(*row, strict=True)]
        for row in zip(*(seed["rfa"] for seed in seeds), strict=True)
    ]
    yield f"{HEADS['rfa'].format(model=model)} (columns; * not 0)", _matrix("residual", names, rows, 0.0, "+.2f")


def _perturb(model: str, seeds: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    names = ["none", *(f"{number + 1}" for number in range(len(seeds[0]["damages"]) - 1))]
    rows = []
    for number, name in enumerate(names):
        values = {kind: [seed["damages"][number][kind] for seed in seeds] for kind in ("mse", "l1", "fid")}
        more = [seed["damages"][number]["fid"] - seed["damages"][0]["fid"] for seed in seeds]
        star = " *" if number and _apart(more, 0.0, len(names) - 1) else ""
        cells = [_cell(values[kind], None, 1, form) for kind, form in (("mse", ".4f"), ("l1", ".3f"), ("fid", ".2f"))]
        rows.append([name, *cells, f"{_cell(more, None, 1, '+.2f')}{star}" if number else ""])
    head = ["perturbed scale", "MSE", "L1", "FID", "FID more than undisturbed"]
    yield f"{HEADS['perturb'].format(**seeds[0])}, {model} (* FID not as undisturbed)", table_of(head, rows)


TABLES = {"attention": _attention, "rfa": _rfa, "perturb": _perturb}


def _matrix(corner: str, names: Sequence[str], rows: Sequence[Sequence[Sequence[float]]], null: float, form: str) -> str:
    """The lower half of a matrix over scales; its last rows are given."""
    tests = sum(map(len, rows))
    body = [[_cell(values, null, tests, form) for values in row] for row in rows]
    named = zip(names[-len(rows) :], body, strict=True)
    return table_of([corner, *names], [[name, *row, *[""] * (len(names) - len(row))] for name, row in named])


def _cell(values: Sequence[float], null: float | None, tests: int, form: str) -> str:
    """Mean and spread, and whether it is told apart from a value."""
    star = " *" if null is not None and _apart(values, null, tests) else ""
    return f"{mean(values):{form}} ± {stdev(values):{form.removeprefix('+')}}{star}"


def _apart(values: Sequence[float], null: float, tests: int) -> bool:
    """Whether the mean differs from a value: Student's t over the seeds, Bonferroni over so many tests."""
    from scipy.stats import ttest_1samp

    if len(set(values)) == 1:
        return False
    return float(ttest_1samp(values, null).pvalue) * tests < LEVEL


if __name__ == "__main__":
    wanted = plan()
    KEPT.mkdir(parents=True, exist_ok=True)
    first = next(iter(wanted["runs"])), wanted["seeds"][0]
    for name in wanted["analyses"]:
        for model, run in wanted["runs"].items():
            for seed in wanted["seeds"]:
                if (file := KEPT / f"{name}-{model}-seed{seed}.json").exists():
                    continue
                if not (ROOT / run / f"seed{seed}").exists():
                    raise SystemExit(f"{run}/seed{seed}: is not trained here; run its sweep without --keep, or give another")
                write_json(file, measure(wanted, name, model, seed, (model, seed) == first))
                print(file)
