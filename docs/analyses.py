"""Measures the analyses of docs/analyses.yaml that docs/evidence/analyses/ lacks, one file an analysis, model and seed:
`python docs/analyses.py`, part of `make evidence`. Their tables are drawn from these files alone."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import yaml

from mvar_lightning.data.tokens.cache import open_part, read_cache
from mvar_lightning.pyramid import ScalePyramid
from mvar_lightning.runs.told_apart import LEVEL
from mvar_lightning.tools.console import table_of
from mvar_lightning.tools.files import read_json, write_json

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "evidence" / "analyses"
WRITES = {"attention": "attention", "rfa": "rfa", "perturb": "perturbation"}
"""Analysis -> the name of its report."""

PICTURES = {
    "attention": ("attention_scales", "attention_windows"),
    "rfa": ("rfa",),
    "perturb": ("perturbation", "perturbed"),
}
Seeds = Sequence[dict[str, Any]]
"""What an analysis found of one model, a report for each seed."""


def plan() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())


def measure(plan: dict[str, Any], analysis: str, model: str, seed: int, pictures: bool) -> dict[str, Any]:
    """One analysis of one run: its options and its report."""
    options = f"{plan['analyses'][analysis]} {plan['options']}"
    out = ROOT / "runs" / "analyses" / model / f"seed{seed}"
    words = [sys.executable, "-m", "mvar_lightning", "analyze", analysis, "--data", plan["data"], "--out", str(out)]
    checkpoint = f"{plan['runs'][model]}/seed{seed}"
    subprocess.run([*words, "--checkpoint", checkpoint, *options.split()], check=True, cwd=ROOT)
    for name in PICTURES[analysis] if pictures else ():
        shutil.copy(out / f"{name}.png", KEPT / f"{name}.png")
    return {"options": options, "found": json.loads((out / f"{WRITES[analysis]}.json").read_text())}


def places(folder: str) -> dict[str, Any]:
    """What it is worth to know where a token sits: cross-entropy, in nats, of the validation tokens of each scale under
    counts of the training tokens, of each class and of each class and place (plus half a token for each code)."""
    cache = read_cache(ROOT / folder)
    settings = cache.settings
    splits = {}
    for split in ("train", "val"):
        parts = [open_part(cache, part) for part in cache.split(split)]
        idx_NL = np.concatenate([np.asarray(idx).reshape(-1, settings.num_tokens) for idx, _ in parts])
        splits[split] = idx_NL, np.concatenate([np.asarray(label).reshape(-1) for _, label in parts])
    (train_NL, train_N), (val_NL, val_N) = splits["train"], splits["val"]

    def nats(seen: np.ndarray, due: np.ndarray) -> float:
        counts_V = np.bincount(seen.ravel(), minlength=settings.vocab_size) + 0.5
        return float(-np.log(counts_V / counts_V.sum())[due.ravel()].sum())

    pyramid = ScalePyramid(settings.scales)
    found: dict[str, list[float]] = {"class": [], "class and place": []}
    for own in map(pyramid.slice_of, range(pyramid.num_scales)):
        of_class = [(train_NL[train_N == label, own], val_NL[val_N == label, own]) for label in set(val_N)]
        tokens = len(val_NL) * (own.stop - own.start)
        found["class"].append(sum(nats(*pair) for pair in of_class) / tokens)
        each = (nats(*pair) for seen, due in of_class for pair in zip(seen.T, due.T, strict=True))
        found["class and place"].append(sum(each) / tokens)
    return {"scales": list(pyramid.sides), **found}


def found_of(plan: dict[str, Any], analysis: str, model: str) -> list[dict[str, Any]]:
    """The reports that are kept, in the order of the seeds."""
    files = [KEPT / f"{analysis}-{model}-seed{seed}.json" for seed in plan["seeds"]]
    kept = [read_json(file, "cannot be read ({error}); remove it") for file in files if file.exists()]
    if any(one["options"] != f"{plan['analyses'][analysis]} {plan['options']}" for one in kept):
        raise SystemExit(f"{KEPT}/{analysis}-*.json: are of other options than docs/analyses.yaml; remove them")
    return [one["found"] for one in kept]


def section() -> str:
    """Claims, tables and pictures, for docs/evidence.md."""
    wanted = plan()
    found = {(name, model): found_of(wanted, name, model) for name in WRITES for model in wanted["runs"]}
    known = {which: seeds for which, seeds in found.items() if len(seeds) == len(wanted["seeds"])}
    runs = "; ".join(f"{model}: `{run}`" for model, run in wanted["runs"].items())
    options = ", ".join(f"`{name} {options}`" for name, options in wanted["analyses"].items())
    claims = [row for (name, model), seeds in known.items() for row in CLAIMS[name](model, seeds)]
    claims += _between([(model, seeds) for (name, model), seeds in known.items() if name == "perturb"])
    lines = [
        *("## analyses", "", f"{runs}. `mvar analyze` {options}, each `{wanted['options']}`.", ""),
        f"Mean ± standard deviation over seeds; p of Student's t-test over them, one a claim; * p < {LEVEL}.",
        *("", table_of(["claim", "model", "measured", "without effect", "p"], claims)),
        *(f"Not measured yet: {name} of {model}.\n" for name, model in found if (name, model) not in known),
    ]
    for (name, model), seeds in known.items():
        lines += [line for head, table in TABLES[name](seeds) for line in (f"{head}, {model}:", "", table)]
        if model == next(iter(wanted["runs"])):
            shown = [
                f"![{picture} of {model}, one seed](evidence/analyses/{picture}.png)" for picture in PICTURES[name]
            ]
            lines += [*shown, ""]
    if (file := KEPT / "places.json").exists():
        known_of = read_json(file, "cannot be read ({error}); remove it")
        names = _names(known_of.pop("scales"))
        rows = [[f"known: {what}", *(f"{value:.3f}" for value in values)] for what, values in known_of.items()]
        lines += ["Tokens by counts alone, nats a token:", "", table_of(["", *names], rows), ""]
    return "\n".join(lines)


# Claims of the papers, one number a seed each.


def _claim(claim: str, model: str, values: Sequence[float], null: float, form: str) -> list[str]:
    chance = chance_of(values, null)
    return [claim, model, _cell(values, form), format(null, form), f"{chance:.2g}{' *' if chance < LEVEL else ''}"]


def chance_of(values: Sequence[float], null: float) -> float:
    """p of a mean over seeds that differs from a value: Student's t, two-sided; 1 where nothing differs."""
    from scipy.stats import ttest_1samp

    if len(set(values)) == 1:
        return float(values[0] == null)
    return float(ttest_1samp(values, null).pvalue)


def _attention_claims(model: str, seeds: Seeds) -> Iterator[list[str]]:
    side = seeds[0]["scales"][-1]
    if any(seeds[0]["mass_on_scale_mean"][-1][:-1]):  # else all of it lies on the own map by construction
        own = [_over_even(seed, len(seed["scales"]) - 1)[-1] for seed in seeds]
        yield _claim(f"{side}x{side} looks at its own map: multiple of an even spread", model, own, 1.0, ".2f")
    for number, kernel in enumerate(seeds[0]["kernels"]):
        if 1 < kernel < side:
            shares = [seed["mass_within_kernel_mean"][-1][number] for seed in seeds]
            even = seeds[0]["mass_within_kernel_if_even"][-1][number]
            claim = f"{side}x{side} looks close by: share of its own map's mass inside {kernel}x{kernel}"
            yield _claim(claim, model, shares, even, ".1%")


def _rfa_claims(model: str, seeds: Seeds) -> Iterator[list[str]]:
    last = [_signed_roots(seed)[-1] for seed in seeds]
    yield _claim("the last scale's residual aligns with its own input", model, [row[-1] for row in last], 0.0, ".2f")
    yield _claim("and with the inputs of scales between (mean)", model, [mean(row[1:-1]) for row in last], 0.0, ".2f")
    yield _claim("and with the start token's", model, [row[0] for row in last], 0.0, ".2f")


def _perturb_claims(model: str, seeds: Seeds) -> Iterator[list[str]]:
    damages = [[each["mse"] for each in seed["damages"][1:]] for seed in seeds]
    least = [min(a / b for a, b in pairwise(one)) for one in damages]
    yield _claim("damage (MSE) falls with each scale: the least factor from one to the next", model, least, 1.0, ".2f")
    fids = [[each["fid"] - seed["damages"][0]["fid"] for each in seed["damages"][1:]] for seed in seeds]
    yield _claim("one wrong token at 1x1: FID more", model, [one[0] for one in fids], 0.0, ".2f")
    yield _claim("at any later scale: FID more (mean)", model, [mean(one[1:]) for one in fids], 0.0, ".2f")


def _between(models: Sequence[tuple[str, Seeds]]) -> Iterator[list[str]]:
    """The others' damage beside the first model's, by seeds: places, codes and noise are the same."""
    for model, seeds in models[1:]:
        first, reports = models[0]
        factors = [
            mean(a["mse"] / b["mse"] for a, b in zip(one["damages"][1:], other["damages"][1:], strict=True))
            for one, other in zip(seeds, reports, strict=True)
        ]
        yield _claim("the same wrong token's damage (MSE), mean factor", f"{model} / {first}", factors, 1.0, ".2f")


# The tables behind them.


def _attention(seeds: Seeds) -> Iterator[tuple[str, str]]:
    names = _names(seeds[0]["scales"])
    if any(seeds[0]["mass_on_scale_mean"][-1][:-1]):
        each = [[_over_even(seed, query) for query in range(len(names))] for seed in seeds]
        yield "Attention on each scale, as a multiple of an even spread", _matrix("query", names, each, ".2f")
    rows = []
    for query, side in list(enumerate(seeds[0]["scales"]))[-2:]:
        for number, kernel in enumerate(seeds[0]["kernels"]):
            if kernel < side:
                shares = [seed["mass_within_kernel_mean"][query][number] for seed in seeds]
                even = seeds[0]["mass_within_kernel_if_even"][query][number]
                rows.append([names[query], f"{kernel}x{kernel}", _cell(shares, ".1%"), f"{even:.1%}"])
    yield "Attention inside a window of a query's own map", table_of(["map", "window", "share", "even"], rows)


def _rfa(seeds: Seeds) -> Iterator[tuple[str, str]]:
    table = _matrix("residual of", _names(seeds[0]["scales"]), list(map(_signed_roots, seeds)), "+.2f")
    yield "Residual-feature alignment with the input of each scale, sign(s) sqrt(|s|)", table


def _perturb(seeds: Seeds) -> Iterator[tuple[str, str]]:
    rows = []
    for number, damage in enumerate(seeds[0]["damages"]):
        of_seeds = [seed["damages"][number] for seed in seeds]
        cells = [_cell([one[kind] for one in of_seeds], form) for kind, form in DAMAGES.items()]
        rows.append(["none" if damage["scale"] is None else str(damage["scale"] + 1), *cells])
    about = f"One wrong token, {seeds[0]['images']} images a seed, FID against {seeds[0]['fid_reference_images']:,}"
    yield about, table_of(["perturbed scale", "MSE", "L1", "FID"], rows)


CLAIMS = {"attention": _attention_claims, "rfa": _rfa_claims, "perturb": _perturb_claims}
TABLES = {"attention": _attention, "rfa": _rfa, "perturb": _perturb}
DAMAGES = {"mse": ".4f", "l1": ".3f", "fid": ".2f"}


def _names(sides: Sequence[int]) -> list[str]:
    return [f"{side}x{side}" for side in sides]


def _over_even(found: dict[str, Any], query: int) -> list[float]:
    """Mass of a query scale on each scale up to it, over that of an even spread; mean over blocks."""
    tokens = [side**2 for side in found["scales"][: query + 1]]
    shares = found["mass_on_scale_mean"][query]
    return [share * sum(tokens) / count for share, count in zip(shares, tokens, strict=False)]


def _signed_roots(found: dict[str, Any]) -> list[list[float]]:
    return [[math.copysign(math.sqrt(abs(value)), value) for value in row] for row in found["rfa"]]


def _matrix(corner: str, names: Sequence[str], seeds: Sequence[Sequence[Sequence[float]]], form: str) -> str:
    """The lower half of a matrix over scales, given for each seed."""
    rows = []
    for name, *of_seeds in zip(names, *seeds, strict=True):
        cells = [_cell(values, form) for values in zip(*of_seeds, strict=True)]
        rows.append([name, *cells, *[""] * (len(names) - len(cells))])
    return table_of([corner, *names], rows)


def _cell(values: Sequence[float], form: str) -> str:
    return f"{mean(values):{form}} ± {stdev(values):{form.removeprefix('+')}}"


if __name__ == "__main__":
    wanted = plan()
    KEPT.mkdir(parents=True, exist_ok=True)
    if not (file := KEPT / "places.json").exists():
        write_json(file, places(wanted["tokens"]))
        print(file)
    drawn = next(iter(wanted["runs"])), wanted["seeds"][0]
    for name in wanted["analyses"]:
        for model, run in wanted["runs"].items():
            for seed in wanted["seeds"]:
                if (file := KEPT / f"{name}-{model}-seed{seed}.json").exists():
                    continue
                if not (ROOT / run / f"seed{seed}").exists():
                    raise SystemExit(f"{run}/seed{seed}: is not trained here; run its sweep without --keep first")
                write_json(file, measure(wanted, name, model, seed, (model, seed) == drawn))
                print(file)
