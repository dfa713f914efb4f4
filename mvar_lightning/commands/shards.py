"""`mvar shards make` and `mvar shards check`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from mvar_lightning.errors import UserError


def add_parser(subparsers: Any) -> None:
    """Add `shards` with its own subcommands to the parser of `mvar`."""
    parser = subparsers.add_parser("shards", help="make WebDataset shards from images, or check them")
    commands = parser.add_subparsers(title="commands", required=True, metavar="{make,check}")
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
        "arrays (IDX, npz, npy); or the name of a known data set: digits, photos, fashion, emoji",
    )
    make.add_argument("destination", metavar="DST", help="new or empty folder for the shards")
    make.add_argument(
        "--ground-truth",
        metavar="FILE",
        help="labels of ImageNet's validation images: the development kit (archive or folder), Kaggle's "
        "LOC_val_solution.csv, or one WordNet id a line (default: found beside the images)",
    )
    make.add_argument("--val-fraction", type=float, default=0.1, help="share of each class for validation (0.1)")
    make.add_argument("--samples-per-shard", type=int, default=1000, help="most samples in a shard (1000)")
    make.add_argument("--mb-per-shard", type=int, default=256, help="a shard ends once it is this long (256)")
    make.add_argument("--resize", type=int, metavar="N", help="shrink the shorter side to N pixels (default: copy)")
    make.add_argument(
        "--channels",
        type=int,
        default=3,
        metavar="N",
        help="1 (gray) or 4 (RGBA) keep such pictures as they are (3: RGB)",
    )
    make.add_argument("--bits", type=int, default=8, metavar="N", help="16 of gray scans: PNG, TIFF, uint16 arrays (8)")
    make.add_argument("--seed", type=int, default=0, help="of the split and of the order in the shards (0)")
    make.add_argument(
        "--workers", type=int, metavar="N", help="writing processes (one a core; one for less than 10,000 images)"
    )
    make.add_argument(
        "--decode", action="store_true", help="decode copied images, too, so that truncated ones are found (slower)"
    )
    make.add_argument("--skip-damaged", action="store_true", help="leave out images that cannot be read, and list them")
    make.add_argument("--fresh", action="store_true", help="forget what an earlier call left unfinished")
    make.set_defaults(run=run_make)
    check = commands.add_parser("check", help="verify shards against their index")
    check.add_argument("folder", metavar="DST", help="a folder that `make` wrote")
    check.add_argument("--workers", type=int, metavar="N", help="shards that are read at a time (one a core)")
    check.add_argument("--decode", action="store_true", help="decode every image, too")
    check.set_defaults(run=run_check)


def run_make(args: argparse.Namespace) -> int:
    """Write the shards with a progress bar; prints what was written."""
    from mvar_lightning.data.making.shards import SKIPPED_NAME, ShardLimits, ShardsRequest, make_shards
    from mvar_lightning.tools.console import progress

    _check_workers(args.workers)
    limits = ShardLimits(args.samples_per_shard, args.mb_per_shard * 1024**2)
    workers = 0 if args.workers == 1 else args.workers
    names = {field.name for field in fields(ShardsRequest)} - {"limits", "workers", "resume"}
    options = {name: getattr(args, name) for name in names}
    request = ShardsRequest(**options, limits=limits, workers=workers, resume=True)
    index = make_shards(request, progress)
    splits = ", ".join(f"{split.samples} {name} in {len(split.shards)} shards" for name, split in index.splits.items())
    print(f"{args.destination}: {splits}; {index.num_classes} classes")
    skipped = Path(args.destination) / SKIPPED_NAME
    if skipped.is_file():
        images = skipped.read_text("utf-8").count("\n")
        print(f"{args.destination}: {images} images could not be read and are left out, see {SKIPPED_NAME}")
    return 0


def _check_workers(workers: int | None) -> None:
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")


def run_check(args: argparse.Namespace) -> int:
    """Print what is missing or damaged; 1 if anything is."""
    from mvar_lightning.data.check import check
    from mvar_lightning.data.index import read_index
    from mvar_lightning.data.making.shards import cores
    from mvar_lightning.tools.console import progress

    _check_workers(args.workers)
    shards = sum(len(split.shards) for split in read_index(args.folder).splits.values())
    with progress("shards", shards) as bar:
        problems = check(args.folder, args.workers or cores(), args.decode, bar.advance)
    return report_check(args.folder, problems, f"{shards} shards")


def report_check(folder: str, problems: Sequence[str], parts: str) -> int:
    """Print what is wrong with a folder of so many parts; 1 if anything is."""
    for problem in problems:
        print(problem)
    print(f"{folder}: {len(problems)} problems in {parts}" if problems else f"{parts} are sound")
    return 1 if problems else 0
