"""`mvar evaluate`: what a tokenizer keeps of images; how good a model's images, or given ones, are."""

from __future__ import annotations

import argparse
from typing import Any

from mvar_lightning.commands import options
from mvar_lightning.errors import UserError


def add_parser(subparsers: Any) -> None:
    """Add `evaluate`, with a subcommand for each kind of thing that is evaluated."""
    parser = subparsers.add_parser("evaluate", help="measure a tokenizer, or generated images, on a data set")
    kinds = parser.add_subparsers(title="what to evaluate", required=True, metavar="{tokenizer,images}")
    parser = kinds.add_parser(
        "tokenizer",
        help="PSNR, SSIM, LPIPS, rFID, codebook usage and bits of a tokenizer, with pictures",
        description="Writes tokenizer.json, tokenizer.md, reconstructions.png, progressive.png and usage.png.",
    )
    options.add_tokenizer(parser)
    parser.add_argument("--data", required=True, metavar="SHARDS", help="shard folder; data/digits is made if missing")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: evaluation/ beside the checkpoint)")
    parser.add_argument("--split", default="val", choices=("val", "train"), help="images to reconstruct (val)")
    parser.add_argument("--images", type=int, metavar="N", help="the first N images of the split (default: all)")
    words = "decode so many after each scale, too (512)"
    parser.add_argument("--progressive-images", type=int, default=512, metavar="N", help=words)
    options.add_features(parser)
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at a time (32)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="loading processes (0)")
    options.add_devices(parser)
    parser.set_defaults(run=run_tokenizer)
    parser = kinds.add_parser(
        "images",
        help="FID, sFID, Inception score, precision and recall of a model's images, or of given ones",
        description="Writes images.json, images.md, images.png and samples.npz (for ADM's evaluator). Started again, "
        "it goes on where it stopped.",
    )
    options.add_source(parser)
    parser.add_argument("--images", metavar="PATH", help="evaluate these instead: a folder, or an npz with arr_0")
    words = "a shard folder; a folder of images; an npz of images (arr_0), of moments (mu, sigma), or of both (ADM's)"
    parser.add_argument("--reference", required=True, metavar="PATH", help=words)
    parser.add_argument("--split", default="val", choices=("val", "train"), help="of a shard folder (val)")
    options.add_cutting(parser)
    options.add_extractor(parser)
    parser.add_argument("--count", type=int, default=50, metavar="N", help="images of each class to sample (50)")
    options.add_refiner(parser)
    options.add_quantize(parser)
    options.add_settings(parser)
    options.add_cache_policy(parser)
    options.add_refinement(parser)
    parser.add_argument("--out", metavar="DIR", help="where to write (default: evaluation/ beside what is evaluated)")
    parser.add_argument("--plan", action="store_true", help="say what would be done, how long and how large")
    parser.add_argument("--save-moments", metavar="FILE", help="write the reference as an npz for later --reference")
    parser.add_argument("--no-npz", action="store_true", help="do not write samples.npz")
    parser.add_argument("--no-floor", action="store_true", help="leave out the FID of other real images")
    words = "also test whether images are copies of training images (C_T), with the closest pairs"
    parser.add_argument("--memorization", action="store_true", help=words)
    words = "the training images for that: shards, a folder, or an npz (the training split of --reference)"
    parser.add_argument("--training", metavar="PATH", help=words)
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="images at a time on each device (16)")
    options.add_devices(parser)
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="loading processes for shards (0)")
    parser.set_defaults(run=run_images)


def run_tokenizer(args: argparse.Namespace) -> int:
    """Evaluate, print the tables, write the files."""
    from mvar_lightning.evaluation.tokenizer import EvaluateTokenizerRequest, run_tokenizer_evaluation
    from mvar_lightning.runs.run import settle_cutting
    from mvar_lightning.tools.console import print_table

    names = "checkpoint data out split images progressive_images image_size patch_nums features feature_size lpips"
    chosen = options.chosen(args, f"{names} batch_size workers device devices")
    EvaluateTokenizerRequest(**chosen)  # its mistakes come before what the run says of its images
    cutting = settle_cutting([args.checkpoint], args.resize_ratio, args.crop)
    evaluated = run_tokenizer_evaluation(EvaluateTokenizerRequest(**chosen, **cutting._asdict()))
    if evaluated is None:  # not the first process
        return 0
    report, files = evaluated
    head, *body = report.scale_rows()
    print_table(report.rows())
    print_table(body, head)
    print("\n".join([*report.notes, *(f"  {path}" for path in files)]))
    return 0


def run_images(args: argparse.Namespace) -> int:
    """Sample what is missing, take features, compare, print and write."""
    given = [name for name in ("checkpoint", "official", "images") if getattr(args, name) is not None]
    if len(given) != 1:
        raise UserError(
            f"evaluate images: {'two of them given' if given else 'nothing to evaluate'}; give one of --checkpoint "
            "PATH, --official var|mvar|markov_var with its files, --images FOLDER|FILE.npz"
        )
    source = options.source_of(args) if args.images is None else None
    from mvar_lightning.evaluation.features import holds_shards
    from mvar_lightning.evaluation.image_job import EvaluateImagesRequest, evaluate_images, plan_evaluation
    from mvar_lightning.runs.run import settle_cutting
    from mvar_lightning.tools.console import print_table

    names = "reference images out split features feature_size data save_moments no_npz no_floor batch_size devices"
    chosen = options.chosen(args, f"{names} memorization training workers count seed device precision quantize")
    chosen |= {"source": source, "settings": options.settings_of(args), **options.refinement_of(args)}
    EvaluateImagesRequest(**chosen)  # its mistakes come before what the run says of its images
    matters = args.data is not None or holds_shards(args.reference)
    cutting = settle_cutting([args.checkpoint], args.resize_ratio, args.crop, matters=matters)
    request = EvaluateImagesRequest(**chosen, **cutting._asdict())
    if args.plan:
        print("\n".join(plan_evaluation(request).lines()))
        return 0
    evaluated = evaluate_images(request, lambda line: print(line, flush=True))
    if evaluated is None:  # not the first process
        return 0
    report, files = evaluated
    print_table(report.rows())
    print("\n".join([*report.notes, *(f"  {path}" for path in files)]))
    return 0
