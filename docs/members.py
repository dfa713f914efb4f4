"""Measures the members of docs/members.yaml that docs/evidence/members/ lacks, one file a member and seed:
`python docs/members.py`, part of `make evidence`. What a member needs trained is trained before it, where it is not
there. The page is composed by docs/evidence.py."""

from __future__ import annotations

import json
import os
import re
import shlex
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mvar_lightning.cli import main
from mvar_lightning.evaluation import image_job  # noqa: F401  imported here for all evaluations
from mvar_lightning.evaluation.image_sources import ShardImages
from mvar_lightning.tools.files import write_json

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "evidence" / "members"
REAL = "real images"
NUMBERS = ("fid", "kid", "precision", "recall")
MADE = re.compile(r"made now at ([\d.]+) images/s \(([\d.]+) ms of processor time each\), peak memory ([\d.]+) GiB")


def plan() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name("members.yaml").read_text())


def rows(plan: dict[str, Any]) -> dict[str, str]:
    """What is evaluated, with its options: the members, and before them real images, which are their floor."""
    return {REAL: f"{plan['real']} training images", **plan["members"]}


def file_of(name: str, seed: int) -> Path:
    return KEPT / f"{re.sub(r'[^a-z0-9.]+', '-', name.lower())}-seed{seed}.json"


def mvar(words: list[str]) -> str:
    """Run a command of the suite in a process of its own, forked from this one: the imports take longer than an
    evaluation. What it said."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(_said, words).result()


def _said(words: list[str]) -> str:
    with redirect_stdout(StringIO()) as said:
        if main(words):
            raise RuntimeError(f"mvar {shlex.join(words)}: failed")
    return said.getvalue()


def named(options: str) -> set[str]:
    """The folders among options, and whatever else they are followed by."""
    return {word.rpartition("=")[2] for word in shlex.split(options)}


def make(plan: dict[str, Any], names: set[str]) -> None:
    """Run the commands that make these folders, where they are not there, and before each those of what it names."""
    for file, command in plan["made"].items():
        if (folder := str(Path(file).parent)) in names and not (ROOT / file).exists():
            make(plan, named(command) - {folder})
            print(f"mvar {command}", flush=True)
            mvar(shlex.split(command))


def real_images(plan: dict[str, Any], seed: int) -> Path:
    """Training images, of other shards for each seed, as an npz."""
    images = ShardImages(plan["reference"], "train", plan["image_size"], resize_ratio=1.0)
    pixels_N3HW = next(images.read(seed, plan["real"]))
    file = ROOT / "runs" / "members" / f"real-{seed}.npz"
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, arr_0=pixels_N3HW.permute(0, 2, 3, 1).numpy())
    return file


def measure(plan: dict[str, Any], name: str, seed: int) -> dict[str, Any]:
    """One evaluation: its numbers, and of a model time and peak memory of the sampling."""
    folder = ROOT / "runs" / "members"
    words = ["evaluate", "images", "--out", str(folder / "evaluated" / name / f"seed{seed}"), "--no-floor"]
    own = rows(plan)[name]
    if name == REAL:
        words += ["--images", str(real_images(plan, seed)), *shlex.split(plan["options"])]
    else:
        options = own if "--checkpoint" in own else f"--checkpoint {plan['checkpoint']} {own}"
        make(plan, named(options))
        words += ["--seed", str(1000 * seed), *shlex.split(plan["options"]), *shlex.split(options)]
    if (stored := folder / "reference.npz").exists():  # features of all reference images, taken once
        words += ["--reference", str(stored), "--data", plan["reference"]]
    else:
        words += ["--reference", plan["reference"], "--save-moments", str(stored)]
    said = mvar(words)
    report = json.loads((Path(words[3]) / "images.json").read_text())
    found = {"options": own, **{number: report[number] for number in NUMBERS}, "images": report["images"]}
    if name == REAL:
        return found
    if (made := MADE.search(said)) is None:
        raise SystemExit(f"{words[3]}: holds samples of an earlier start, whose speed is not known; remove it")
    figures = ("images_per_second", "processor_ms", "peak_memory_gib")
    return found | dict(zip(figures, map(float, made.groups()), strict=True))


if __name__ == "__main__":
    os.chdir(ROOT)
    wanted = plan()
    KEPT.mkdir(parents=True, exist_ok=True)
    for name in rows(wanted):
        for seed in wanted["seeds"]:
            if not (file := file_of(name, seed)).exists():
                write_json(file, measure(wanted, name, seed))
                print(file, flush=True)
