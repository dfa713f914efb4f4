"""`mvar evaluate tokenizer`: what a tokenizer keeps of images, in numbers and pictures.

`mvar evaluate images` is in `evaluate_images`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvar_lightning.commands import evaluate_images
from mvar_lightning.commands.evaluation_options import (
    add_features,
    beside,
    check_counts,
    data_of,
    extractor_of,
    lpips_of,
)
from mvar_lightning.commands.out_folder import check_folder
from mvar_lightning.commands.run_data import settle_cutting
from mvar_lightning.commands.tokenizer_options import add_tokenizer, tokenizer_of

if TYPE_CHECKING:
    import torch

    from mvar_lightning.analysis.tokenizer_report import TokenizerReport
    from mvar_lightning.data.modules import ShardsDataModule
    from mvar_lightning.tokenizer import MultiScaleTokenizer

OTHER_SPLIT = {"val": "train", "train": "val"}


def add_parser(subparsers: Any) -> None:
    """Add `evaluate`, with a subcommand for each kind of thing that is evaluated."""
    parser = subparsers.add_parser("evaluate", help="measure a tokenizer, or generated images, on a data set")
    kinds = parser.add_subparsers(title="what to evaluate", required=True, metavar="{tokenizer,images}")
    _add_tokenizer(kinds)
    evaluate_images.add_images(kinds)


def _add_tokenizer(kinds: Any) -> None:
    parser = kinds.add_parser(
        "tokenizer",
        help="PSNR, SSIM, LPIPS, rFID, codebook usage and bits of a tokenizer, with pictures",
        description="Writes tokenizer.json, tokenizer.md, reconstructions.png, progressive.png and usage.png.",
    )
    add_tokenizer(parser)
    parser.add_argument("--data", required=True, metavar="SHARDS", help="shard folder; data/digits is made if missing")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: evaluation/ beside the checkpoint)")
    parser.add_argument("--split", default="val", choices=tuple(OTHER_SPLIT), help="images to reconstruct (val)")
    parser.add_argument("--images", type=int, metavar="N", help="the first N images of the split (default: all)")
    parser.add_argument(
        "--progressive-images", type=int, default=512, metavar="N", help="decode so many after each scale, too (512)"
    )
    add_features(parser)
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at a time (32)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="loading processes (0)")
    parser.set_defaults(run=run_tokenizer)


def run_tokenizer(args: argparse.Namespace) -> int:
    """Evaluate, print the tables, write the files."""
    from mvar_lightning.analysis.size_watch import SizeWatch
    from mvar_lightning.analysis.tokenizer_files import write_evaluation
    from mvar_lightning.commands.sampling_options import choose_device

    device = choose_device(args.device)
    check_counts(args, "images", "progressive_images", "batch_size", "feature_size")
    out = Path(args.out) if args.out is not None else beside(Path(args.checkpoint))
    check_folder(out)
    tokenizer = tokenizer_of(args, args.checkpoint)
    settle_cutting(args, args.checkpoint)
    data = data_of(args, tokenizer.image_size, args.split, args.workers)
    watch = data.val_transform = SizeWatch(data.val_transform, tokenizer.image_size)
    report = _evaluate(args, tokenizer, data, out, device)
    if watch.enlarged:
        note = f"Images of less than {tokenizer.image_size} pixels were enlarged: the figures are of blurred images."
        report = replace(report, notes=(*report.notes, note))
    _print(report)
    for path in write_evaluation(report, _about(args, tokenizer), out):
        print(f"  {path}")
    return 0


def _evaluate(
    args: argparse.Namespace,
    tokenizer: MultiScaleTokenizer,
    data: ShardsDataModule,
    out: Path,
    device: torch.device,
) -> TokenizerReport:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mvar_lightning.analysis.tokenizer import evaluate_tokenizer

    lpips = lpips_of(args, device)
    extractor = extractor_of(args, data, out, device)
    other = OTHER_SPLIT[args.split]
    total = min(data.index.split(args.split).samples, args.images or data.index.split(args.split).samples)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        shown = bar.add_task("images", total=total)
        return evaluate_tokenizer(
            tokenizer,
            data.ordered_dataloader(args.split),
            extractor=extractor,
            floor_loader=data.ordered_dataloader(other) if extractor and data.index.split(other).samples else None,
            lpips=lpips,
            num_images=args.images,
            progressive_images=args.progressive_images,
            device=device,
            progress=lambda images: bar.advance(shown, images),
        )


def _about(args: argparse.Namespace, tokenizer: MultiScaleTokenizer) -> dict[str, Any]:
    from mvar_lightning.tokenizer import fingerprint

    return {
        "checkpoint": str(args.checkpoint),
        "tokenizer_hash": fingerprint(tokenizer),
        "data": str(args.data),
        "split": args.split,
        "crop": args.crop,
        "resize_ratio": args.resize_ratio,
        "lpips_weights": args.lpips,
    }


def _print(report: TokenizerReport) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110)
    whole = Table(show_header=False)
    for row in report.rows():
        whole.add_row(*row)
    scales = Table()
    head, *body = report.scale_rows()
    for number, heading in enumerate(head):
        scales.add_column(heading, justify="right" if number else "left")
    for cells in body:
        scales.add_row(*cells)
    for table in (whole, scales):
        console.print(table)
    for note in report.notes:
        console.print(note, highlight=False)
