"""`mvar tokens make`, `draw` and `check`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from mvar_lightning.commands import options
from mvar_lightning.commands.shards import report_check


def add_parser(subparsers: Any) -> None:
    """Add `tokens` with its own subcommands to the parser of `mvar`."""
    parser = subparsers.add_parser("tokens", help="encode image shards into a token cache, draw one, or check one")
    commands = parser.add_subparsers(title="commands", required=True, metavar="{make,draw,check}")
    make = commands.add_parser(
        "make",
        help="encode image shards with a tokenizer",
        description="Encode image shards. An interrupted command, given again, makes the parts that are missing.",
    )
    make.add_argument(
        "--checkpoint", required=True, metavar="TOKENIZER", help="a run's folder, a saved folder, or a Lightning .ckpt"
    )
    make.add_argument("--data", required=True, metavar="SHARDS", help="a folder that `mvar shards make` wrote")
    make.add_argument("--out", required=True, metavar="DIR", help="new or empty folder, or one to go on with")
    make.add_argument("--views", type=int, default=1, metavar="N", help="views of each training image (1)")
    make.add_argument("--crop", default="random", help="of training images: random, center or adm (random)")
    make.add_argument("--flip", action="store_true", help="mirror every second view (needs --views 2 or more)")
    make.add_argument("--resize-ratio", type=float, default=1.125, help="shorter side before the crop (1.125)")
    make.add_argument("--seed", type=int, default=0, help="of the crops (0)")
    make.add_argument("--batch-size", type=int, default=64, metavar="N", help="images encoded together (64)")
    make.add_argument("--devices", type=int, metavar="N", help="processes of a machine (default: all GPUs, or 1)")
    make.add_argument("--accelerator", default="auto", help="cpu, cuda or auto (auto)")
    make.add_argument("--num-nodes", type=int, metavar="N", help="machines (those of SLURM or torchrun)")
    make.add_argument("--num-workers", type=int, default=2, metavar="N", help="decoding processes a device (2)")
    make.add_argument(
        "--precision", default="32-true", help="of the encoder: 32-true, as in training on images, or bf16-mixed"
    )
    make.set_defaults(run=run_make)
    add_draw(commands)
    check = commands.add_parser("check", help="verify a token cache against its index")
    check.add_argument("folder", metavar="DIR", help="a folder that `make` wrote")
    check.add_argument("--checkpoint", metavar="TOKENIZER", help="also say whether this tokenizer made it")
    check.set_defaults(run=run_check)


def add_draw(commands: Any) -> None:
    """Add `draw`."""
    draw = commands.add_parser(
        "draw",
        help="a cache of tokens that a model draws, of all its classes",
        description="What a scorer learns from (recipes/scorer/). An interrupted command, given again, goes on.",
    )
    options.add_source(draw)
    options.add_refiner(draw)
    options.add_settings(draw)
    draw.add_argument("--out", required=True, metavar="DIR", help="new or empty folder, or one to go on with")
    draw.add_argument("--count", type=int, default=100, metavar="N", help="samples of each class for training (100)")
    draw.add_argument("--val-count", type=int, metavar="N", help="for validation (a tenth as many)")
    draw.add_argument("--batch-size", type=int, default=64, metavar="N", help="drawn together (64)")
    options.add_quantize(draw)
    options.add_devices(draw)
    draw.set_defaults(run=run_draw)


def run_draw(args: argparse.Namespace) -> int:
    """Draw what is missing; prints what the cache holds."""
    source = options.source_of(args)
    from mvar_lightning.sampling.jobs import SampleRequest
    from mvar_lightning.sampling.token_jobs import draw_tokens

    names = "out count seed data device precision batch_size devices quantize"
    request = SampleRequest(source, settings=options.settings_of(args), **options.chosen(args, names))
    cache = draw_tokens(request, args.val_count)
    if cache is not None:  # the first process
        samples = f"{cache.samples('train')} samples for training, {cache.samples('val')} for validation"
        print(f"{args.out}: {samples}; {cache.settings.num_tokens} tokens each")
    return 0


def run_make(args: argparse.Namespace) -> int:
    """Make the cache; prints what it holds."""
    from mvar_lightning.checkpoints import load_tokenizer
    from mvar_lightning.data.making.shards import ensure
    from mvar_lightning.data.tokens.encoding import EncodeRequest, encode_data

    ensure(args.data)  # embedded data may be missing yet
    options = {field.name: getattr(args, field.name) for field in fields(EncodeRequest) if field.name != "tokenizer"}
    cache = encode_data(EncodeRequest(load_tokenizer(args.checkpoint), **options))
    if cache is None:  # not the first process
        return 0
    views = cache.settings.views
    print(
        f"{args.out}: {cache.samples('train')} train images in {views} view{'s' if views > 1 else ''}, "
        f"{cache.samples('val')} val; {cache.settings.num_tokens} tokens each, "
        f"{sum(part.bytes for part in cache.parts):,} bytes"
    )
    for part in cache.parts:
        for line in part.damaged:
            print(f"left out, {part.name}: {line}")
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Print what is missing or damaged; 1 if anything is."""
    from mvar_lightning.data.tokens.cache import check_cache, read_cache

    cache, problems = read_cache(args.folder), check_cache(args.folder)
    if args.checkpoint is not None:
        from mvar_lightning.checkpoints.folder import open_checkpoint

        found = open_checkpoint(args.checkpoint, whole=False).record.tokenizer_hash
        if found != cache.settings.tokenizer_hash:
            problems.append(f"made by tokenizer {cache.settings.tokenizer_hash[:12]}, not by {found[:12]}")
    return report_check(args.folder, problems, f"{len(cache.parts)} parts")
