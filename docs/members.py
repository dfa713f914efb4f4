"""Measures the members of docs/members.yaml that docs/evidence/members/ lacks, one file a member and seed:
`python docs/members.py`, part of `make evidence`. The page is composed by docs/evidence.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from mvar_lightning.tools.files import write_json

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "evidence" / "members"
NUMBERS = ("fid", "kid", "precision", "recall")


def plan() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name("members.yaml").read_text())


def measure(plan: dict[str, Any], member: str, seed: int) -> dict[str, Any]:
    """One evaluation: its numbers, images a second and peak memory of the sampling, and the floor."""
    out = ROOT / "runs" / "members" / member / f"seed{seed}"
    words = [sys.executable, "-m", "mvar_lightning", "evaluate", "images"]
    words += ["--reference", plan["reference"], "--out", str(out), "--seed", str(1000 * seed)]
    own = plan["members"][member].split()
    if "--checkpoint" not in own:
        words += ["--checkpoint", plan["checkpoint"]]
    words += [*plan["options"].split(), *own]
    said = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
    made = re.search(r"made now at ([\d.]+) images/s, peak memory ([\d.]+) GiB", said)
    if made is None:
        raise SystemExit(f"{out}: holds samples of an earlier start, whose speed is not known; remove it")
    report = json.loads((out / "images.json").read_text())
    return {
        "options": plan["members"][member],
        **{name: report[name] for name in NUMBERS},
        "floor": report["floor"]["fid"],
        "images": report["images"],
        "images_per_second": float(made[1]),
        "peak_memory_gib": float(made[2]),
    }


if __name__ == "__main__":
    wanted = plan()
    if not (ROOT / wanted["checkpoint"]).exists():
        raise SystemExit(f"{wanted['checkpoint']}: is not trained here; run its sweep without --keep, or give another")
    for member in wanted["members"]:
        for seed in wanted["seeds"]:
            if not (file := KEPT / f"{member}-seed{seed}.json").exists():
                KEPT.mkdir(parents=True, exist_ok=True)
                write_json(file, measure(wanted, member, seed))
                print(file)
