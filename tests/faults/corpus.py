"""Run the generated faults against a product: `python -m tests.faults.corpus --product DIR --out FILE`.

Resumable: faults that FILE already answers are left out. One line of JSON for each fault, then a summary.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

from .assets import make
from .fault import Fault, run
from .generator import faults
from .harness import PROJECT, Harness


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--product", type=Path, default=PROJECT, metavar="DIR", help="a checkout (this one)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results, one line each")
    parser.add_argument("--only", default="", metavar="ID", help="faults whose id contains this; told in full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=None, metavar="DIR", help="where the tiny assets are kept")
    parser.add_argument("--jobs", type=int, default=1, choices=[1], help="one process; more would share the core")
    arguments = parser.parse_args()
    chosen = [fault for fault in faults(arguments.seed) if arguments.only in fault.id]
    done = {} if arguments.only else read(arguments.out)
    todo = [fault for fault in chosen if fault.id not in done]
    cache = arguments.cache or Path(tempfile.gettempdir()) / f"mvar-faults-{os.getuid()}" / name_of(arguments.product)
    harness = Harness(arguments.product.resolve())
    assets = make(cache, harness)
    with tempfile.TemporaryDirectory(prefix="fault-") as place, arguments.out.open("a") as file:
        Path(place).chmod(0o755)
        for fault in todo:
            line = answer_of(fault, harness, assets, Path(place) / "case", told=bool(arguments.only))
            done[fault.id] = line
            file.write(json.dumps(line) + "\n")
            file.flush()
    harness.close()
    summarize(chosen, done)


def name_of(product: Path) -> str:
    return str(product.resolve()).strip("/").replace("/", "-")


def read(path: Path) -> dict[str, dict]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["id"]: line for line in map(json.loads, lines)}


def answer_of(fault: Fault, harness: Harness, assets: Path, folder: Path, told: bool) -> dict:
    start = time.monotonic()
    try:
        reason, answer = run(fault, harness, assets, folder)
        if told:
            print(f"--- {fault.id}\n{answer.status} {reason}\n{answer.out[-1500:]}\n{answer.err[-3000:]}")
    finally:
        clear(folder)
    reason = reason.replace(str(folder), "CASE").replace(str(assets), "ASSETS") if reason else None
    seconds = round(time.monotonic() - start, 2)
    return {"id": fault.id, "kept": reason is None, "reason": reason, "seconds": seconds}


def clear(folder: Path) -> None:
    if folder.exists():
        for path in [folder, *folder.rglob("*")]:
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o700)
        shutil.rmtree(folder)


def summarize(chosen: list[Fault], done: dict[str, dict]) -> None:
    for title, group in (("kind", lambda fault: fault.kind), ("command", lambda fault: fault.command)):
        total = Counter(group(fault) for fault in chosen)
        kept = Counter(group(fault) for fault in chosen if done[fault.id]["kept"])
        print(f"{title:20} {'kept':>5} {'of':>5}")
        for name, count in sorted(total.items()):
            print(f"{name:20} {kept[name]:5} {count:5}")
    all_kept = sum(done[fault.id]["kept"] for fault in chosen)
    print(f"kept {all_kept} of {len(chosen)} ({all_kept / max(len(chosen), 1):.1%})")


if __name__ == "__main__":
    main()
