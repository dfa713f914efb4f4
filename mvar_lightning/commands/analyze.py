"""`mvar analyze`: the papers' analyses of a trained model."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from mvar_lightning.commands import options


def add_parser(subparsers: Any) -> None:
    """Add `analyze`, with a subcommand for each analysis."""
    parser = subparsers.add_parser("analyze", help="the papers' analyses of trained models")
    kinds = parser.add_subparsers(title="analyses", required=True, metavar="{attention,rfa,perturb,scaling}")
    attention = kinds.add_parser(
        "attention", help="how much attention each scale spends on which scale, and inside which window (MVAR)"
    )
    rfa = kinds.add_parser("rfa", help="alignment of a scale's residual with the inputs of earlier ones (Markov-VAR)")
    perturb = kinds.add_parser("perturb", help="damage that one wrong token does, scale by scale (Markov-VAR)")
    for kind, job, images in (
        (attention, "analyze_attention", "the first N validation images (256)"),
        (rfa, "analyze_alignment", "the first N validation images (256)"),
        (perturb, "analyze_perturbation", "images that are sampled (256)"),
    ):
        options.add_source(kind)
        options.add_cutting(kind)
        options.add_devices(kind)
        words = "where to write (default: analysis/ in the run, or beside a file)"
        kind.add_argument("--out", metavar="DIR", help=words)
        kind.add_argument("--batch-size", type=int, default=16, metavar="N", help="images at a time (16)")
        kind.add_argument("--images", type=int, default=256, metavar="N", help=images)
        kind.set_defaults(run=partial(run, job))
    options.add_settings(perturb)
    options.add_features(perturb)
    scaling = kinds.add_parser("scaling", help="power laws of loss and error rate over the runs of a sweep (VAR)")
    words = "folder of a sweep over depths, such as runs/sweeps/scaling_digits"
    scaling.add_argument("sweep", metavar="DIR", help=words)
    scaling.add_argument("--out", metavar="DIR", help="where to write (default: the sweep's folder)")
    scaling.set_defaults(run=run_scaling)


def run(job: str, args: argparse.Namespace) -> int:
    """Analyze a model; prints the tables and where everything is."""
    source = options.source_of(args)
    from mvar_lightning.evaluation.papers import analyses
    from mvar_lightning.runs.run import data_settings, settle_cutting

    more: dict[str, Any] = {}
    if job == "analyze_perturbation":
        more = {"settings": options.settings_of(args), **options.chosen(args, "seed features feature_size lpips")}
    matters = args.data is not None
    more |= settle_cutting([args.checkpoint], args.resize_ratio, args.crop, matters=matters)._asdict()
    request = analyses.AnalyzeRequest(
        source, **options.chosen(args, "data images batch_size out device devices"), **more
    )
    trained_on = {} if args.checkpoint is None else data_settings(args.checkpoint)
    path = trained_on.get("images") or trained_on.get("path")
    if path and args.data is not None and Path(path).resolve() != Path(args.data).resolve():
        print(f"--data {args.data}: the model was trained on {path}; the numbers are of a model on foreign images")
    return _show(getattr(analyses, job)(request))


def run_scaling(args: argparse.Namespace) -> int:
    from mvar_lightning.evaluation.papers.analyses import analyze_scaling

    return _show(analyze_scaling(args.sweep, args.out))


def _show(analysis: Any) -> int:
    if analysis is None:  # not the first process
        return 0
    print(analysis.markdown)
    for path in analysis.files:
        print(f"  {path}")
    return 0
