"""`mvar compare`: the attention strategies under one budget, in one table."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from mvar_lightning.errors import UserError

STRATEGIES = {
    "full": ["--model.attention=FullAttention"],
    "adjacent": ["--model.attention=AdjacentAttention"],
    "sliding-window-2": ["--model.attention=SlidingWindowAttention", "--model.attention.scales=2"],
    "spatial-3": ["--model.attention=SpatialAttention", "--model.attention.kernel_size=3"],
}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="train the attention strategies under one budget and tabulate them",
        description="Same recipe, data, tokenizer and budget for every strategy; other arguments override the recipe.",
    )
    parser.add_argument("--recipe", default="recipes/var/digits.yaml", help="recipe to vary (default: %(default)s)")
    parser.add_argument("--out", default="runs/compare", metavar="DIR", help="where to write (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs in the same folder")
    parser.set_defaults(run=run_compare, takes_overrides=True)


def run_compare(arguments: argparse.Namespace) -> int:
    from mvar_lightning.commands.comparison import Row, write_comparison
    from mvar_lightning.commands.lightning_cli import RecipeCheck
    from mvar_lightning.commands.runs import run_of

    out = Path(arguments.out)
    for name, overrides in STRATEGIES.items():  # a mistake is told once, before the first run
        run = run_of(arguments.recipe, [*overrides, *arguments.overrides], out / name)
        RecipeCheck(["--config", str(run.recipe), *run.overrides], run.folder)
    rows = []
    for name, overrides in STRATEGIES.items():
        folder = out / name
        _train_in_its_own_process(arguments, folder, [*overrides, *arguments.overrides])
        rows.append(Row.read(name, folder))
    write_comparison(rows, out)
    return 0


def _train_in_its_own_process(arguments: argparse.Namespace, folder: Path, overrides: list[str]) -> None:
    """One process a run, so that its peak memory is its own."""
    imports = [word for module in arguments.modules for word in ("--import", module)]
    program = [sys.executable, "-m", "mvar_lightning.cli", *imports]
    command = [*program, "train", arguments.recipe, "--run-folder", str(folder)]
    fresh = ["--fresh"] if arguments.fresh else []
    if subprocess.run([*command, *fresh, *overrides], check=False).returncode:
        raise UserError(
            f"compare: the run {folder} failed (see above); mend it and compare again, finished runs are kept"
        )
