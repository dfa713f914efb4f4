"""The command `mvar`: finds the subcommand, prints a user's mistake as one line, and imports torch only when needed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from mvar_lightning import __version__
from mvar_lightning.commands import compare, edit, export, import_, info, run, sample, shards, train
from mvar_lightning.errors import UserError

COMMANDS = (train, compare, run, sample, edit, import_, export, info, shards)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mvar", description="Train, sample and study next-scale (visual autoregressive) image models."
    )
    parser.add_argument("--version", action="version", version=f"mvar_lightning {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, or 2 for a mistake of the user's."""
    arguments, rest = build_parser().parse_known_args(argv)
    if rest and not getattr(arguments, "takes_overrides", False):
        print(f"mvar: error: unknown arguments: {' '.join(rest)} (see mvar --help)", file=sys.stderr)
        return 2
    arguments.overrides = rest
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        if arguments.traceback or os.environ.get("MVAR_TRACEBACK"):
            raise
        print(f"mvar: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mvar: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
