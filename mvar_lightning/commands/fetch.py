"""`mvar fetch`: released files from their publishers. No other command goes to an address that it was not given."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add `fetch` to the parser of `mvar`."""
    words = "download released files (VAR, MVAR, their tokenizer, Inception, VGG)"
    parser = subparsers.add_parser(
        "fetch",
        help=words,
        description="Interrupted, the same command goes on. Files go to $MVAR_CACHE/weights (else "
        "~/.cache/mvar/weights), where all other commands find them by their names; no other command downloads any.",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="of the list, such as var-d16 tokenizer; none lists them"
    )
    parser.add_argument("--list", action="store_true", help="names, addresses, sizes, licenses and SHA-256")
    parser.add_argument("--to", metavar="FOLDER", help="another folder")
    words = "an address below which the files lie (HF_ENDPOINT names a mirror of the hub alone)"
    parser.add_argument("--mirror", metavar="URL", help=words)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Get the files one after the other; prints where each is and what its SHA-256 is."""
    from mvar_lightning.checkpoints.released import fetch, released
    from mvar_lightning.tools.console import progress

    files = released(args.names)
    if args.list or not files:
        _show()
        return 0
    for file in files:
        with ExitStack() as stack:

            def begin(had: int, size: int | None, name: str = file.name) -> Callable[[int], None]:
                bar = stack.enter_context(progress(f"bytes of {name}", size or 0, had))
                return bar.advance

            path, digest = fetch(file, args.to, args.mirror, begin)
        pinned = "as it must be" if file.sha256 else "not pinned: nobody has published what it must be"
        print(f"{path}\n  SHA-256 {digest} ({pinned}); license: {file.license}")
    return 0


def _show() -> None:
    from mvar_lightning.checkpoints.released import FILES, NOT_PUBLISHED
    from mvar_lightning.tools.console import print_table
    from mvar_lightning.tools.copies import weights_folder

    rows = []
    for file in FILES:
        size = f"{file.size / 1e6:,.0f} MB" if file.size else "not known"
        state = "here" if (weights_folder() / file.file).is_file() else ""
        rows.append([file.name, file.what, size, file.license, file.sha256[:12] or "not pinned", state])
    print_table(rows, ["name", "what", "size", "license", "SHA-256", "fetched"])
    for file in FILES:
        print(f"{file.name}: {file.address}")
    print(f"They go to {weights_folder()}. {NOT_PUBLISHED}.")
