"""How soon commands answer, beside an earlier revision, both in turn in one call.

    python -m benchmarks.answers [REVISION] [--repeats 5]      REVISION: a16be38, the last commit of the old house

Processor seconds (user and system, of the process and its children) and the modules loaded; the median of each side.
A command that ends with a mistake is measured until its line.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.unchanged import BEFORE, ROOT, unpack

COUNT = "import sys, atexit; atexit.register(lambda: print('modules', len(sys.modules), file=sys.stderr)); "
FOLDER = ROOT / "tests" / "moving" / "made_by_0_1" / "runs" / "var" / "model"
RECIPE = ROOT / "recipes" / "var" / "digits.yaml"
HELP = (
    ("--help",),
    ("train", "--help"),
    ("sample", "--help"),
    ("evaluate", "images", "--help"),
    ("analyze", "perturb", "--help"),
)


def run_main(*arguments: str) -> list[str]:
    """A command of `mvar` that also tells how many modules it loaded."""
    return [sys.executable, "-c", f"{COUNT}from mvar_lightning.cli import main; sys.exit(main({list(arguments)!r}))"]


CASES = {
    "mvar info FOLDER": run_main("info", str(FOLDER)),
    "import, and generate": [sys.executable, "-c", f"{COUNT}import mvar_lightning; mvar_lightning.generate"],
    "sample without a model": run_main("sample"),
    "fit without a recipe": run_main("fit"),
    "a wrong key in a recipe": run_main("fit", "--config", str(RECIPE), "--model.dept=3"),
    "a wrong section in a recipe": run_main("fit", "--config", str(RECIPE), "--modle.depth=3"),
    "a strategy's wrong argument": run_main(
        "train", str(RECIPE), "--model.attention=SpatialAttention", "--model.attention.kernel_size=4"
    ),
    **{f"mvar {' '.join(words)}": run_main(*words) for words in HELP},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.answers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("revision", nargs="?", default=BEFORE, help=f"what to compare with ({BEFORE})")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of each side, after one that warms up (5)")
    arguments = parser.parse_args(argv)
    print(
        "| command | seconds before | now | ratio | modules before | now | last line |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory(prefix="answers-") as temporary:
        before = Path(temporary, "before")
        unpack(arguments.revision, before)
        for name, command in CASES.items():
            rows: dict[Path, list[tuple[float, int, str]]] = {before: [], ROOT: []}
            for _ in range(arguments.repeats + 1):
                for side, found in rows.items():
                    found.append(measure(command, side, Path(temporary)))
            (old, old_modules, _), (new, new_modules, line) = (middle(found[1:]) for found in rows.values())
            print(
                f"| {name} | {old:.2f} | {new:.2f} | {new / old:.2f} | {old_modules} | {new_modules} | {line[:60]} |",
                flush=True,
            )
    return 0


def measure(command: Sequence[str], checkout: Path, folder: Path) -> tuple[float, int, str]:
    """Processor seconds, modules loaded, and the last line that was said."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    modules = next((int(line.split()[1]) for line in lines if line.startswith("modules ")), 0)
    said = [line for line in lines if not line.startswith("modules ")]
    return end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime, modules, said[-1] if said else ""


def middle(found: Sequence[tuple[float, int, str]]) -> tuple[float, int, str]:
    """The median of the seconds, with the last run's modules and line."""
    return statistics.median(seconds for seconds, _, _ in found), found[-1][1], found[-1][2]


if __name__ == "__main__":
    sys.exit(main())
