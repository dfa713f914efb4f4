"""`mvar sample`: images of chosen classes as PNG files and a grid, or as one npz; continues where it stopped."""

from __future__ import annotations

import argparse
from typing import Any

from mvar_lightning.commands import options


def add_parser(subparsers: Any) -> None:
    """Add `sample` to the parser of `mvar`."""
    parser = subparsers.add_parser("sample", help="generate images of chosen classes")
    options.add_source(parser)
    options.add_refiner(parser)
    options.add_settings(parser)
    options.add_cache_policy(parser)
    words = "indices, ranges (0-9), names, none, or all (default: all, or 16 of them where there are more)"
    parser.add_argument("--classes", metavar="3,7", help=words)
    parser.add_argument("--count", type=int, metavar="N", help="images of each class (16; 1 where 16 are chosen)")
    parser.add_argument("--out", default="samples", metavar="FOLDER", help="what is there already is kept (samples)")
    parser.add_argument("--format", default="png", choices=("png", "npz"), help="npz: also one file for the evaluator")
    words = "also the first images after each scale, as one moving picture: coarse_to_fine.gif or .webp"
    parser.add_argument("--strips", nargs="?", const="gif", choices=("gif", "webp"), help=words)
    parser.add_argument("--batch-size", type=int, default=16, help="images at a time on each device (16)")
    words = "compile the blocks: the first batch is slow, the others are faster"
    parser.add_argument("--compile", action="store_true", help=words)
    words = "CUDA graphs of the scales, for strategies that keep no key-value cache"
    parser.add_argument("--graphs", action="store_true", help=words)
    options.add_quantize(parser)
    options.add_refinement(parser)
    options.add_devices(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make the images that are missing; prints where they are, the speed and the peak memory."""
    source = options.source_of(args)  # a mistake in it is told before the slow imports below
    from mvar_lightning.sampling.jobs import SampleRequest, sample_images

    chosen = options.chosen(args, "out classes count seed data device precision batch_size devices graphs quantize")
    chosen |= options.refinement_of(args) | {
        "settings": options.settings_of(args),
        "compiled": args.compile,
        "npz": args.format == "npz",
    }
    request = SampleRequest(source, **chosen)
    sampled = sample_images(request)
    if sampled is None:  # not the first process
        return 0
    print(f"{sampled.folder}: {len(sampled.files)} images, {sampled.made}")
    if sampled.classes:
        print(sampled.classes)
    print(f"grid: {sampled.grid}")
    if sampled.npz is not None:
        print(f"npz: {sampled.npz}")
    if args.strips is not None:
        from mvar_lightning.sampling.animation import animate

        print(f"strips: {animate(request, args.strips)}")
    return 0
