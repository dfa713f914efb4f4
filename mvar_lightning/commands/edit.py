"""`mvar edit`: paints a part of a picture anew (in-painting, out-painting, class-conditional editing)."""

from __future__ import annotations

import argparse
from typing import Any

from mvar_lightning.commands import options


def add_parser(subparsers: Any) -> None:
    """Add `edit` to the parser of `mvar`."""
    words = (
        "Paints a part of a picture anew. Tokens are chosen as by `mvar sample`, but without a refinement in passes."
    )
    parser = subparsers.add_parser("edit", help="paint a part of a picture anew", description=words)
    options.add_source(parser)
    options.add_refiner(parser)
    options.add_settings(parser)
    options.add_cache_policy(parser)
    options.add_quantize(parser)
    parser.add_argument("--image", required=True, metavar="FILE", help="JPEG, PNG or WebP; its middle square is used")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--mask", metavar="FILE", help="picture of the image's size: white is painted, black stays")
    where.add_argument("--box", type=_box, metavar="x0,y0,x1,y1", help="painted box, in pixels or fractions of 1")
    parser.add_argument("--outpaint", action="store_true", help="paint outside of the mask or box instead")
    parser.add_argument("--class", dest="class_", default="none", metavar="N", help="index or name (none: in-painting)")
    parser.add_argument("--count", type=int, default=4, help="results, each with its own seed (4)")
    parser.add_argument("--out", default="edits", metavar="FOLDER", help="where results and pictures go (edits)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the results and two pictures of them; prints where they are and the peak memory."""
    source = options.source_of(args)
    from mvar_lightning.sampling.editing import EditRequest, edit_picture
    from mvar_lightning.tools.compute import choose_device, peak_memory_bytes

    names = "image mask box outpaint class_ count seed data device precision quantize out"
    files = edit_picture(EditRequest(source, settings=options.settings_of(args), **options.chosen(args, names)))
    print(f"{args.out}: {len(files) - 2} results, {files[-2].name}, {files[-1].name}")
    print(f"peak memory {peak_memory_bytes(choose_device(args.device)) / 2**30:.2f} GiB")
    return 0


def _box(text: str) -> tuple[float, ...]:
    try:
        box = tuple(map(float, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give four numbers with commas between them") from None
    if len(box) != 4:
        raise argparse.ArgumentTypeError(f"{text!r}: give four numbers, x0,y0,x1,y1")
    return box
