"""Whether the present checkout computes what an earlier revision computed, bit for bit.

    python -m benchmarks.unchanged [REVISION]    compare with REVISION (a16be38), run beside it on this machine
    python -m benchmarks.unchanged --record      write what REVISION computes to benchmarks/results/unchanged.json

Both sides run the same `unchanged_probe`, each with the `mvar_lightning` of its own checkout, on one thread. A record
made on one machine is compared on others by tests/moving/test_unchanged.py, with room for the order of float sums.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROBE = Path(__file__).with_name("unchanged_probe.py")
RECORD = ROOT / "benchmarks" / "results" / "unchanged.json"
BEFORE = "a16be38"
"""The last commit before the files were moved."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print a line an item, and return 1 where anything differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unchanged", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("revision", nargs="?", default=BEFORE, help=f"what to compare with ({BEFORE})")
    parser.add_argument("--record", action="store_true", help="write what the revision computes, and compare nothing")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="unchanged-") as temporary:
        before = Path(temporary, "before")
        unpack(arguments.revision, before)
        old = run_probe(before, Path(temporary, "old"))
        if arguments.record:
            record(arguments.revision, old)
            return 0
        new = run_probe(ROOT, Path(temporary, "new"))
    return report(arguments.revision, old["items"], new["items"])


def unpack(revision: str, folder: Path) -> None:
    """The files of a revision; an archive leaves no trace in the repository, as a worktree would."""
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")


def run_probe(checkout: Path, folder: Path) -> dict[str, Any]:
    """What the probe finds with the package of ``checkout``; its output is shown where it fails.

    One thread and no GPU: sums of floats have one order then. ``-P`` keeps the probe's neighbors from shadowing
    anything.
    """
    folder.mkdir(parents=True)
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    for name in ("PL_GLOBAL_SEED", "MVAR_TRACEBACK"):
        environment.pop(name, None)
    start = time.monotonic()
    finished = subprocess.run(
        [sys.executable, "-P", str(PROBE), str(folder), str(checkout)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if finished.returncode:
        raise RuntimeError(f"the probe failed on {checkout.name}:\n{finished.stdout[-6000:]}")
    print(f"probe of {checkout.name}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    return json.loads((folder / "probe.json").read_text())


def report(revision: str, old: dict[str, Any], new: dict[str, Any]) -> int:
    """Print the table; 1 where anything differs."""
    print(f"{'against ' + revision:<32} values")
    status = 0
    for name in [*old, *(name for name in new if name not in old)]:
        before, after = leaves(old.get(name)), leaves(new.get(name))
        differing = differences(before, after)
        status = 1 if differing else status
        print(f"{name:<32} {len(before):>6}  {'DIFFERS: ' + told(differing) if differing else 'same'}")
    return status


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Each number, text and null of JSON values by the path to it; empty lists and mappings count, too."""
    if not isinstance(value, dict | list) or not value:
        return {path: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return {where: leaf for key, below in pairs for where, leaf in leaves(below, f"{path}/{key}").items()}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """A line for each leaf that is missing, new or another one."""
    lines = [f"{path} is missing" for path in before if path not in after]
    lines += [f"{path} is new" for path in after if path not in before]
    common = [path for path in before if path in after and before[path] != after[path]]
    return lines + [f"{path} was {before[path]!r}, is {after[path]!r}" for path in common]


def told(lines: Sequence[str], most: int = 3) -> str:
    """The first few lines in one."""
    more = f"; and {len(lines) - most} more" if len(lines) > most else ""
    return "; ".join(lines[:most]) + more


def record(revision: str, found: dict[str, Any]) -> None:
    """Write what a revision computes, and where that was."""
    full = subprocess.run(["git", "rev-parse", revision], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    about = {
        "revision": full.stdout.strip(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "processor": processor(),
        "python": platform.python_version(),
    }
    RECORD.write_text(
        json.dumps(about | found, indent=None, separators=(",", ":")).replace('"items"', '\n"items"') + "\n"
    )
    print(f"wrote {RECORD.relative_to(ROOT)}")


def processor() -> str:
    """The model of this machine's CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
