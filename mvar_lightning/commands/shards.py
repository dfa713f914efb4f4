"""`mvar shards make` and `mvar shards check`."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add `shards` with its own subcommands to the parser of `mvar`."""
    parser = subparsers.add_parser("shards", help="make WebDataset shards from images, or check them")
    commands = parser.add_subparsers(title="commands", required=True, metavar="{make,check}")
    _add_make(commands)
    check = commands.add_parser("check", help="verify shards against their index")
    check.add_argument("folder", metavar="DST", help="a folder that `make` wrote")
    check.set_defaults(run=run_check)


def _add_make(commands: Any) -> None:
    make = commands.add_parser("make", help="write a folder of images, or an embedded data set, as shards")
    make.add_argument(
        "source",
        metavar="SRC",
        help="folder with a subfolder for each class (JPEG, PNG, WebP), or with train/CLASS and val/CLASS; "
        "or the name of an embedded data set: digits",
    )
    make.add_argument("destination", metavar="DST", help="new or empty folder for the shards")
    make.add_argument("--val-fraction", type=float, default=0.1, help="share of each class for validation (0.1)")
    make.add_argument("--samples-per-shard", type=int, default=1000, help="most samples in a shard (1000)")
    make.add_argument("--mb-per-shard", type=int, default=256, help="a shard ends once it is this long (256)")
    make.add_argument("--resize", type=int, metavar="N", help="shrink the shorter side to N pixels (default: copy)")
    make.add_argument("--seed", type=int, default=0, help="of the split and of the order in the shards (0)")
    make.set_defaults(run=run_make)


def run_make(args: argparse.Namespace) -> int:
    """Write the shards with a progress bar; prints what was written."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mvar_lightning.data.embedded import load_source
    from mvar_lightning.data.shards import ShardLimits, write_shards

    limits = ShardLimits(args.samples_per_shard, args.mb_per_shard * 1024**2)
    source = load_source(args.source, args.val_fraction, args.seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:  # a mistake is one line
        task = bar.add_task("images", total=len(source.train) + len(source.val))
        index = write_shards(
            source, args.destination, limits, args.resize, args.seed, lambda count: bar.advance(task, count)
        )
    splits = ", ".join(f"{split.samples} {name} in {len(split.shards)} shards" for name, split in index.splits.items())
    print(f"{args.destination}: {splits}; {index.num_classes} classes")
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Print what is missing or damaged; 1 if anything is."""
    from mvar_lightning.data.index import check, read_index

    problems = check(args.folder)
    for problem in problems:
        print(problem)
    shards = sum(len(split.shards) for split in read_index(args.folder).splits.values())
    print(f"{args.folder}: {len(problems)} problems in {shards} shards" if problems else f"{shards} shards are sound")
    return 1 if problems else 0
