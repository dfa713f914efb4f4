"""`mvar evaluate tokenizer`: what a tokenizer keeps of images, in numbers and pictures."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvar_lightning.commands import options
from mvar_lightning.commands.options import (
    add_cutting,
    add_extractor,
    add_features,
    add_tokenizer,
    beside,
    check_counts,
    tokenizer_of,
)
from mvar_lightning.errors import UserError
from mvar_lightning.evaluation.features import data_of, extractor_of, features_of, holds_shards, lpips_of
from mvar_lightning.runs.recipe import settle_cutting
from mvar_lightning.tools.files import check_folder

if TYPE_CHECKING:
    import torch

    from mvar_lightning.data.image_data import ShardsDataModule
    from mvar_lightning.evaluation.image_job import Evaluation, Generated
    from mvar_lightning.evaluation.image_sources import ImageSource
    from mvar_lightning.evaluation.images import ImageReport
    from mvar_lightning.evaluation.tokenizer_report import TokenizerReport
    from mvar_lightning.tokenizer import MultiScaleTokenizer


OTHER_SPLIT = {"val": "train", "train": "val"}


def add_parser(subparsers: Any) -> None:
    """Add `evaluate`, with a subcommand for each kind of thing that is evaluated."""
    parser = subparsers.add_parser("evaluate", help="measure a tokenizer, or generated images, on a data set")
    kinds = parser.add_subparsers(title="what to evaluate", required=True, metavar="{tokenizer,images}")
    _add_tokenizer(kinds)
    add_images(kinds)


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
    from mvar_lightning.evaluation.image_sources import SizeWatch
    from mvar_lightning.evaluation.tokenizer_report import write_evaluation
    from mvar_lightning.tools.compute import choose_device

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

    from mvar_lightning.evaluation.tokenizer import evaluate_tokenizer

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


# `mvar evaluate images`: FID, sFID, Inception score, precision and recall of a model's images, or of given ones.
#
# What is made is kept: started again, the command goes on where it stopped.


def add_images(kinds: Any) -> None:
    """Add `images` to the parser of `mvar evaluate`."""
    parser = kinds.add_parser(
        "images",
        help="FID, sFID, Inception score, precision and recall of a model's images, or of given ones",
        description="Writes images.json, images.md, images.png and samples.npz (for ADM's evaluator). Started again, "
        "it goes on where it stopped.",
    )
    options.add_source(parser)
    parser.add_argument("--images", metavar="PATH", help="evaluate these instead: a folder, or an npz with arr_0")
    parser.add_argument(
        "--reference",
        required=True,
        metavar="PATH",
        help="a shard folder; a folder of images; an npz of images (arr_0), of moments (mu, sigma), or of both (ADM's)",
    )
    parser.add_argument("--split", default="val", choices=("val", "train"), help="of a shard folder (val)")
    add_cutting(parser)
    add_extractor(parser)
    parser.add_argument("--count", type=int, default=50, metavar="N", help="images of each class to sample (50)")
    options.add_settings(parser)
    parser.add_argument("--out", metavar="DIR", help="where to write (default: evaluation/ beside what is evaluated)")
    parser.add_argument("--plan", action="store_true", help="say what would be done, how long and how large")
    parser.add_argument("--save-moments", metavar="FILE", help="write the reference as an npz for later --reference")
    parser.add_argument("--no-npz", action="store_true", help="do not write samples.npz")
    parser.add_argument("--no-floor", action="store_true", help="leave out the FID of other real images")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="images at a time on each device (16)")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="processes, each on its own GPU (1)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="loading processes for shards (0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Sample what is missing, take features, compare, print and write."""
    import torch

    from mvar_lightning.tools.compute import choose_device

    device = choose_device(args.device)
    _check(args)
    if device.type == "cuda" and args.devices > torch.cuda.device_count():
        raise UserError(f"--devices {args.devices}: there are {torch.cuda.device_count()} GPUs here")
    out = Path(args.out) if args.out is not None else beside(Path(args.checkpoint or args.model or args.images))
    check_folder(out)
    if args.save_moments is not None:
        check_folder(Path(args.save_moments).parent, "--save-moments")
    settle_cutting(args, args.checkpoint, matters=args.data is not None or holds_shards(Path(args.reference)))
    work = _prepare(args, out, device)
    work.check()
    plan = work.plan()
    print("\n".join(plan.lines()), flush=True)
    if args.plan:
        return 0
    plan.check_disk()
    work.sample()
    work.extract()
    report = work.report()
    _print_images(report)
    for path in work.write(report):
        print(f"  {path}")
    return 0


def _check(args: argparse.Namespace) -> None:
    check_counts(args, "count", "batch_size", "devices", "feature_size")
    given = [name for name in ("checkpoint", "official", "images") if getattr(args, name) is not None]
    if len(given) != 1:
        raise UserError(
            f"evaluate images: {'two of them given' if given else 'nothing to evaluate'}; give one of --checkpoint "
            "PATH, --official var|mvar|markov_var with its files, --images FOLDER|FILE.npz"
        )
    if args.features == "none":
        raise UserError("--features none: every number needs features; choose data, inception or a TorchScript file")
    if args.save_moments is not None and Path(args.save_moments).suffix.lower() != ".npz":
        raise UserError(f"--save-moments {args.save_moments}: give a name that ends in .npz")
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: must be 0 or more")


def _prepare(args: argparse.Namespace, out: Path, device: torch.device) -> Evaluation:
    from mvar_lightning.evaluation.image_job import Evaluation

    generated = _generated(args, out, device)
    name, real, stored, other = _reference(args, generated.source)
    if real is not None and real.size != generated.source.size:
        (height, width), (high, wide) = generated.source.size, real.size
        raise UserError(
            f"--reference {args.reference}: its images are {wide} x {high}, the generated ones {width} x {height}; "
            "make both of one size (images of a shard folder are cut to it)"
        )
    extractor = features_of(args, generated.source.size, out, device)
    return Evaluation(args, out, device, generated, name, real, stored, other, extractor)


def _generated(args: argparse.Namespace, out: Path, device: torch.device) -> Generated:
    from mvar_lightning.commands import sample
    from mvar_lightning.evaluation.image_job import Generated
    from mvar_lightning.evaluation.image_sources import FolderImages, open_images
    from mvar_lightning.sampling import jobs as sampling_jobs
    from mvar_lightning.tools.compute import choose_precision

    if args.images is not None:
        return Generated(open_images(Path(args.images)), None, [], {"images_from": args.images})
    if args.checkpoint is not None and (Path(args.checkpoint) / "model" / "config.json").is_file():
        args.checkpoint = str(Path(args.checkpoint) / "model")
    source, settings = options.source_of(args), options.settings_of(args)
    import torch

    model, tokenizer = source.load(torch.device("cpu"))
    precision = choose_precision(args.precision, device)
    identity = sample.identity_of(args, settings, precision, sampling_jobs.weights_hash(model, tokenizer))
    jobs = sampling_jobs.list_jobs(range(model.num_classes), args.count, args.seed)
    side, folder = tokenizer.image_size, out / "samples"
    about = {**identity, "classes": model.num_classes, "count": args.count, "seed": args.seed}
    images = FolderImages(folder, [job.file for job in jobs], about, (side, side))
    task = sampling_jobs.Task(source, settings, precision, args.batch_size, device.type, folder)
    told = {name: value for name, value in about.items() if name != "precision"}  # the report has one of its own
    told |= {"checkpoint": args.checkpoint or args.model, "sampled_in": precision}
    return Generated(images, task, jobs, told)


def _reference(args: argparse.Namespace, generated: ImageSource) -> tuple[str, ImageSource | None, Any, Any]:
    """Name, images, stored moments, and other real images; None for what there is not."""
    from mvar_lightning.evaluation.image_sources import ArchiveImages, FolderImages
    from mvar_lightning.metrics import StoredReference
    from mvar_lightning.metrics.moments import open_arrays

    path = Path(args.reference)
    if path.suffix.lower() == ".npz":
        with open_arrays(path) as file:
            held = set(file)
        stored = StoredReference.load(path) if "mu" in held or "arr_0" not in held else None
        return str(path), ArchiveImages(path) if "arr_0" in held else None, stored, None
    if path.is_file():
        raise UserError(f"--reference {path}: is a file, but no npz; give a folder of shards or images, or an npz")
    if not holds_shards(path):
        return str(path), FolderImages(path), None, None
    return _shards(args, generated)


def _shards(args: argparse.Namespace, generated: ImageSource) -> tuple[str, ImageSource | None, Any, Any]:
    from mvar_lightning.evaluation.image_sources import ShardImages

    size = generated.size
    if size[0] != size[1]:
        raise UserError(f"--images {args.images}: are {size[1]} x {size[0]}; images of shards are square, give such")
    cutting = (size[0], args.crop, args.resize_ratio, args.workers)
    real, other = ShardImages(args.reference, args.split, *cutting), None
    if not args.no_floor and OTHER_SPLIT[args.split] in real.splits:
        other = ShardImages(args.reference, OTHER_SPLIT[args.split], *cutting, at_least=len(generated))
    return real.name, real, None, other


def _print_images(report: ImageReport) -> None:
    from rich.console import Console
    from rich.table import Table

    console, table = Console(width=110), Table(show_header=False)
    for row in report.rows():
        table.add_row(*row)
    console.print(table)
    for note in report.notes:
        console.print(note, highlight=False)
