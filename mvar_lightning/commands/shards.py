"""`mvar shards make` and `mvar shards check`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mvar_lightning.errors import UserError

WORTH_PROCESSES = 500
"""Images from which on several processes, which take seconds to start, are worth it."""

SECONDS_BETWEEN_LINES = 30.0
"""Without a terminal, progress is a line so often."""


def add_parser(subparsers: Any) -> None:
    """Add `shards` with its own subcommands to the parser of `mvar`."""
    parser = subparsers.add_parser("shards", help="make WebDataset shards from images, or check them")
    commands = parser.add_subparsers(title="commands", required=True, metavar="{make,check}")
    _add_make(commands)
    check = commands.add_parser("check", help="verify shards against their index")
    check.add_argument("folder", metavar="DST", help="a folder that `make` wrote")
    check.add_argument("--workers", type=int, default=2, metavar="N", help="shards that are read at a time (2)")
    check.add_argument("--decode", action="store_true", help="decode every image, too")
    check.set_defaults(run=run_check)


def _add_make(commands: Any) -> None:
    make = commands.add_parser(
        "make",
        help="write images as shards",
        description="Killed or stopped, the same command goes on where it was. The bytes depend on the source, the "
        "options and the seed alone, not on the number of workers.",
    )
    make.add_argument(
        "source",
        metavar="SRC",
        help="folder with a subfolder for each class (JPEG, PNG, WebP), or with train/CLASS and val/CLASS; folder with "
        "ImageNet's archives as distributed; a list (.csv, .tsv, .txt: path, class, perhaps split); "
        "or the name of an embedded data set: digits, photos",
    )
    make.add_argument("destination", metavar="DST", help="new or empty folder for the shards")
    make.add_argument(
        "--ground-truth", metavar="FILE", help="ImageNet's validation labels (default: found beside the archives)"
    )
    make.add_argument("--val-fraction", type=float, default=0.1, help="share of each class for validation (0.1)")
    make.add_argument("--samples-per-shard", type=int, default=1000, help="most samples in a shard (1000)")
    make.add_argument("--mb-per-shard", type=int, default=256, help="a shard ends once it is this long (256)")
    make.add_argument("--resize", type=int, metavar="N", help="shrink the shorter side to N pixels (default: copy)")
    make.add_argument("--seed", type=int, default=0, help="of the split and of the order in the shards (0)")
    make.add_argument("--workers", type=int, default=_cores(), metavar="N", help="writing processes (one a core)")
    make.add_argument("--skip-damaged", action="store_true", help="leave out images that cannot be read, and list them")
    make.add_argument("--fresh", action="store_true", help="forget what an earlier call left unfinished")
    make.set_defaults(run=run_make)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_make(args: argparse.Namespace) -> int:
    """Write the shards with a progress bar; prints what was written."""
    import shutil
    from pathlib import Path

    from mvar_lightning.data.embedded import load_source
    from mvar_lightning.data.shards import ShardLimits, write_shards
    from mvar_lightning.data.work_folder import work_path

    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1")
    limits = ShardLimits(args.samples_per_shard, args.mb_per_shard * 1024**2)
    unfinished = work_path(Path(args.destination))
    source = load_source(args.source, args.val_fraction, args.seed, args.ground_truth)
    if args.fresh:
        shutil.rmtree(unfinished, ignore_errors=True)
    elif unfinished.exists():
        print(f"{args.destination}: going on with what is finished in {unfinished}")
    total = len(source.train) + len(source.val)
    workers = args.workers if args.workers > 1 and total >= WORTH_PROCESSES else 0
    with _progress(total) as report:
        index = write_shards(
            source,
            args.destination,
            limits,
            args.resize,
            args.seed,
            report,
            workers=workers,
            resume=True,
            skip_damaged=args.skip_damaged,
        )
    splits = ", ".join(f"{split.samples} {name} in {len(split.shards)} shards" for name, split in index.splits.items())
    print(f"{args.destination}: {splits}; {index.num_classes} classes")
    skipped = total - sum(split.samples for split in index.splits.values())
    if skipped:
        print(f"{args.destination}: {skipped} images could not be read, see skipped.txt")
    return 0


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, lines elsewhere."""
    if not sys.stderr.isatty():
        yield _Lines(total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, console=Console(stderr=True)) as bar:  # a mistake is one line
        task = bar.add_task("images", total=total)
        yield lambda count: bar.advance(task, count)


class _Lines:
    """Progress as a line every so often."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.start = self.last = time.monotonic()

    def __call__(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last >= SECONDS_BETWEEN_LINES:
            self.last = now
            print(f"{self.done:,} of {self.total:,} images, {now - self.start:.0f} s", file=sys.stderr, flush=True)


def run_check(args: argparse.Namespace) -> int:
    """Print what is missing or damaged; 1 if anything is."""
    from mvar_lightning.data.index import check, read_index

    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1")
    problems = check(args.folder, args.workers, args.decode)
    for problem in problems:
        print(problem)
    shards = sum(len(split.shards) for split in read_index(args.folder).splits.values())
    print(f"{args.folder}: {len(problems)} problems in {shards} shards" if problems else f"{shards} shards are sound")
    return 1 if problems else 0
