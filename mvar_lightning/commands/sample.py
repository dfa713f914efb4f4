"""`mvar sample`: images of chosen classes as PNG files and a grid, or as one npz; continues where it stopped."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvar_lightning.commands import options
from mvar_lightning.errors import UserError

if TYPE_CHECKING:
    pass


def add_parser(subparsers: Any) -> None:
    """Add `sample` to the parser of `mvar`."""
    parser = subparsers.add_parser("sample", help="generate images of chosen classes")
    options.add_source(parser)
    options.add_settings(parser)
    parser.add_argument("--classes", metavar="3,7", help="indices, ranges (0-9), names, or none (default: all classes)")
    parser.add_argument("--count", type=int, default=16, help="images of each class (16)")
    parser.add_argument("--out", default="samples", metavar="FOLDER", help="what is there already is kept (samples)")
    parser.add_argument("--format", default="png", choices=("png", "npz"), help="npz: also one file for the evaluator")
    parser.add_argument("--batch-size", type=int, default=16, help="images at a time on each device (16)")
    parser.add_argument(
        "--compile", action="store_true", help="compile the blocks: the first batch is slow, the others are faster"
    )
    parser.add_argument(
        "--graphs", action="store_true", help="CUDA graphs of the scales, for strategies that keep no key-value cache"
    )
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="processes, each on its own GPU (1)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make the images that are missing; prints where they are, the speed and the peak memory."""
    import torch

    from mvar_lightning.sampling import jobs as sampling_jobs
    from mvar_lightning.tools.compute import choose_device, choose_precision

    _check_counts(args)
    source, settings = options.source_of(args), options.settings_of(args)
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    if device.type == "cuda" and args.devices > torch.cuda.device_count():
        raise UserError(f"--devices {args.devices}: there are {torch.cuda.device_count()} GPUs here")
    model, tokenizer = source.load(torch.device("cpu"))
    names = options.class_names(args.data, model.num_classes)
    jobs = sampling_jobs.list_jobs(options.class_indices(args.classes, model.num_classes, names), args.count, args.seed)
    folder = Path(args.out)
    weights = sampling_jobs.weights_hash(model, tokenizer)
    del model, tokenizer  # each process reads its own
    sampling_jobs.claim_folder(folder, identity_of(args, settings, precision, weights))
    task = sampling_jobs.Task(
        source, settings, precision, args.batch_size, device.type, folder, args.compile, args.graphs
    )
    made = sampling_jobs.make_missing(task, jobs, args.devices)
    print(f"{folder}: {len(jobs)} images, {made}")
    print(f"grid: {sampling_jobs.write_grid(folder, jobs)}")
    if args.format == "npz":
        print(f"npz: {sampling_jobs.write_archive(folder, sampling_jobs.mixed(jobs))}")
    return 0


def identity_of(args: argparse.Namespace, settings: dict[str, Any], precision: str, weights: str) -> dict[str, Any]:
    """What the images of a folder follow from, beside their classes and seeds; plain values."""
    guidance = {"cfg": args.cfg, "guidance": repr(settings["cfg"])}
    return {**settings, **guidance, "precision": precision, "weights": weights}


def _check_counts(args: argparse.Namespace) -> None:
    for name in ("count", "batch_size", "devices"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
