"""`python -m benchmarks [MEMBER]`: measurements, both sides of a comparison in one run. Alone it measures the models.

Options are declared here, so that ``--help`` needs no torch; the members import what they measure when they run.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.models import ARCHITECTURES, SIZES, add_arguments, run
from benchmarks.results import add_out, check_numbers
from mvar_lightning.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """The models' options, and those of the other members."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Speed and memory on this machine. Without a member: VAR, MVAR, Markov-VAR: sampling, decoding, "
        "training step, memory, counted cost.",
    )
    add_arguments(parser)
    parser.set_defaults(run=run)
    members = parser.add_subparsers(title="other members", metavar="MEMBER")
    _add_data(members.add_parser("data", help="what the data path can feed: decoding, loader, a no-op model, memory"))
    _add_attention(members.add_parser("attention", help="attention for each scale alone against attention with a mask"))
    _add_quantizer(members.add_parser("quantizer", help="the quantizer against its straightforward form"))
    _add_gpu(members.add_parser("gpu", help="the ten-minute call: what the suite does on a GPU, part by part"))
    _add_tokens(members.add_parser("tokens", help="what a token cache can feed"))
    _add_guidance(members.add_parser("guidance", help="sampling with guidance against sampling without"))
    _add_fidelity(members.add_parser("fidelity", help="a model's answers with weights of few bits against float32's"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one measurement and return its exit status: 0, or 2 for a mistake of the user's."""
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        print(f"benchmarks: error: {error.with_flags()}", file=sys.stderr)
        return 2


def _run_member(name: str, arguments: argparse.Namespace) -> int:
    return int(importlib.import_module(f"benchmarks.{name}").run(arguments))


def _add_attention(member: argparse.ArgumentParser) -> None:
    member.add_argument("--batch", type=int, default=1, metavar="N", help="images (1)")
    member.add_argument("--heads", type=int, default=16, metavar="N", help="of width 64 (16)")
    member.add_argument("--image-size", type=int, default=256, choices=SIZES, help="pixels (256)")
    member.add_argument("--repeats", type=int, default=15, metavar="N", help="of each side (15)")
    add_out(member, "attention")
    member.set_defaults(run=partial(_run_member, "attention"))


def _add_quantizer(member: argparse.ArgumentParser) -> None:
    member.add_argument("--image-size", type=int, default=256, choices=SIZES, help="pixels (256)")
    member.add_argument("--vocab-size", type=int, default=4096, metavar="V", help="codes (4096)")
    member.add_argument("--code-dim", type=int, default=32, metavar="Z", help="length of a code (32)")
    member.add_argument("--batch", type=int, default=8, metavar="N", help="images (8)")
    member.add_argument("--repeats", type=int, default=15, metavar="N", help="of each side (15)")
    add_out(member, "quantizer")
    member.set_defaults(run=partial(_run_member, "quantizer"))


def _add_gpu(member: argparse.ArgumentParser) -> None:
    names = ("attention", "tokens", "graphs", "step", "sample", "fit", "pytest")
    member.add_argument("--out", type=Path, required=True, metavar="DIR", help="results; a second call goes on there")
    member.add_argument("--parts", nargs="+", choices=names, metavar="PART", help=f"{' '.join(names)} (all)")
    member.set_defaults(run=partial(_run_member, "gpu"))


def _add_tokens(member: argparse.ArgumentParser) -> None:
    member.add_argument("--samples", type=int, default=50_000, metavar="N", help="in the cache, 1,000 a part (50000)")
    member.add_argument("--passes", type=int, default=20, metavar="N", help="over which memory is watched (20)")
    member.add_argument("--batch-size", type=int, default=64, metavar="N", help="samples a batch (64)")
    add_out(member, "tokens")
    member.set_defaults(run=partial(_run_member, "tokens"))


def _add_guidance(member: argparse.ArgumentParser) -> None:
    member.add_argument("--architecture", default="var", choices=ARCHITECTURES, help="var")
    member.add_argument("--depth", type=int, default=16, metavar="N", help="of the model (16)")
    member.add_argument("--image-size", type=int, default=256, choices=SIZES, help="pixels (256)")
    member.add_argument("--batch", type=int, default=2, metavar="N", help="images; guidance doubles the rows (2)")
    member.add_argument("--repeats", type=int, default=3, metavar="N", help="of each side, after one warm-up (3)")
    member.add_argument("--threads", type=int, default=0, metavar="N", help="of torch (0: torch's own choice)")
    add_out(member, "guidance")
    member.set_defaults(run=partial(_run_member, "guidance"))


def _add_fidelity(member: argparse.ArgumentParser) -> None:
    member.add_argument("--checkpoint", default="digits", metavar="PATH", help="a trained model (digits, as shipped)")
    member.add_argument("--data", default="data/digits", metavar="SHARDS", help="of its images (data/digits)")
    member.add_argument("--images", type=int, default=64, metavar="N", help="of the validation split (64)")
    add_out(member, "fidelity")
    member.set_defaults(run=partial(_run_member, "fidelity"))


def _add_data(member: argparse.ArgumentParser) -> None:
    member.add_argument("--data", metavar="DIR", help="shard folder (default: photographs of 500x375, made for it)")
    member.add_argument("--image-size", type=int, default=256, metavar="N", help="side of the crops (256)")
    member.add_argument("--batch-size", type=int, default=64, metavar="N", help="images a batch (64)")
    member.add_argument("--workers", type=int, default=2, metavar="N", help="loading processes (2)")
    member.add_argument("--seconds", type=float, default=10, metavar="S", help="for each loader measurement (10)")
    member.add_argument("--passes", type=int, default=20, metavar="N", help="over which memory is watched (20)")
    member.add_argument("--repeats", type=int, default=9, metavar="N", help="of each side in the comparison (9)")
    member.add_argument("--samples", type=int, default=512, metavar="N", help="photographs that are made (512)")
    add_out(member, "data")
    member.set_defaults(run=run_data)


def run_data(args: argparse.Namespace) -> int:
    """Measure, print tables, write the figures."""
    check_numbers(args, "image_size", "batch_size", "passes", "repeats", "samples")
    if args.workers < 0 or args.seconds <= 0:
        raise UserError(f"--workers {args.workers} --seconds {args.seconds}: must be 0 or more, and more than 0")
    if args.samples < args.batch_size and args.data is None:
        raise UserError(f"--samples {args.samples}: less than a batch of {args.batch_size}; give more")

    from benchmarks.data import LoaderOptions, measure, synthetic_shards
    from benchmarks.results import write_figures

    with tempfile.TemporaryDirectory() as scratch:
        folder = args.data
        if folder is None:
            folder = str(Path(scratch) / "photographs")
            synthetic_shards(Path(folder), args.samples)
        options = LoaderOptions(folder, args.image_size, args.batch_size, args.workers, args.seconds, args.passes)
        figures = measure(options, args.repeats)
    _print_data(figures)
    print(f"{write_figures(figures, 'data', args.out)}: all figures")
    return 0


def _print_data(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    options = figures["options"]
    console.print(f"{figures['machine']}; images of {figures['mean_kilobytes']} kB on average")
    table = Table(title=f"JPEG to finished batches of {options['batch_size']}, one thread")
    for title in ("decoding", "images/s of one core", "times plain", "largest, mean difference of 255"):
        table.add_column(title, justify="left" if title == "decoding" else "right")
    for name, row in figures["decoding"].items():
        apart = f"{row['largest_difference']:.0f}, {row['mean_difference']:.5f}"
        table.add_row(name, f"{row['images_per_second']:.0f}", f"{row['times_plain']:.2f}", apart)
    console.print(table)
    table = Table(title=f"images/s with {options['workers']} workers")
    for title in ("decoding", "bare loader", "no-op model in the trainer"):
        table.add_column(title, justify="left" if title == "decoding" else "right")
    for name, rate in figures["loader_images_per_second"].items():
        table.add_row(name, f"{rate:.0f}", f"{figures['trainer_images_per_second'][name]:.0f}")
    console.print(table)
    memory = figures["worker_mib_by_pass"]
    middle = memory[len(memory) // 2]
    console.print(
        f"memory of all workers after pass 1, {len(memory) // 2 + 1}, {len(memory)}: "
        f"{memory[0]:.1f}, {middle:.1f}, {memory[-1]:.1f} MiB"
    )


if __name__ == "__main__":
    sys.exit(main())
