"""The command `mvar`: finds the subcommand, prints a user's mistake as one line, and imports torch only when needed."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mvar_lightning import __version__
from mvar_lightning.commands import (
    analyze,
    checkpoints,
    edit,
    evaluate,
    reconstruct,
    sample,
    shards,
    sweep,
    tokens,
    train,
)
from mvar_lightning.errors import UserError

COMMANDS = (train, sweep, sample, edit, evaluate, analyze, reconstruct, checkpoints, shards, tokens)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mvar", description="Train, sample and study next-scale (visual autoregressive) image models."
    )
    parser.add_argument("--version", action="version", version=f"mvar_lightning {__version__}")
    words = "import a module of your own first, for its strategies and histories (from the current folder, too)"
    parser.add_argument("--import", dest="modules", metavar="MODULE", action="append", default=[], help=words)
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    moved = subparsers.add_parser("bench")  # without help: not in the list
    moved.set_defaults(run=_tell_bench, takes_overrides=True)
    return parser


def _tell_bench(arguments: argparse.Namespace) -> int:
    raise UserError("bench: measurements left the package; in a clone of the repository: python -m benchmarks --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, or 2 for a mistake of the user's."""
    arguments, rest = build_parser().parse_known_args(argv)
    if rest and not getattr(arguments, "takes_overrides", False):
        print(f"mvar: error: unknown arguments: {' '.join(rest)} (see mvar --help)", file=sys.stderr)
        return 2
    arguments.overrides = rest
    # recipes may name classes of the user's own; last in the path, so that nothing installed is shadowed
    sys.path.append(str(Path.cwd()))
    try:
        for module in arguments.modules:
            try:
                importlib.import_module(module)
            except ImportError as error:
                words = f"{error}; give the name of a module here or on PYTHONPATH"
                raise UserError(f"--import {module}: {words}") from error
        return int(arguments.run(arguments))
    except UserError as error:
        if arguments.traceback or os.environ.get("MVAR_TRACEBACK"):
            raise
        print(f"mvar: error: {error.with_flags()}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as stop:
        print(f"mvar: {stop or 'interrupted'}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
