"""The command `mvar`: finds the subcommand, prints a user's mistake as one line, and imports torch only when needed."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from mvar_lightning import __version__
from mvar_lightning.commands import (
    analyze,
    checkpoints,
    demo,
    edit,
    evaluate,
    fetch,
    listing,
    plan,
    reconstruct,
    sample,
    shards,
    sweep,
    tokens,
    train,
)
from mvar_lightning.errors import UserError
from mvar_lightning.tools.console import patient_streams

COMMANDS = (
    train,
    plan,
    sweep,
    listing,
    sample,
    edit,
    demo,
    evaluate,
    analyze,
    reconstruct,
    checkpoints,
    shards,
    tokens,
    fetch,
)

GO_ON = ("train", "fit", "sweep", "sample", "evaluate", "shards", "tokens", "fetch")
"""Commands that, interrupted and given again, keep what they have done."""

NO_MEMORY = re.compile(r"can't allocate memory|out of memory|not enough memory", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """One that names what a misspelt choice is nearest to, rather than all choices."""

    def error(self, message: str) -> NoReturn:
        found = re.match(r"argument COMMAND: invalid choice: '(.*)' \(choose from (.*)\)", message, re.DOTALL)
        if found is not None:
            nearest = difflib.get_close_matches(found[1], re.findall(r"[\w-]+", found[2]), 1, 0.5)
            way = f"did you mean mvar {nearest[0]}?" if nearest else "mvar --help lists them"
            message = f"no command {found[1]!r}; {way}"
        super().error(message)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mvar", description="Train, sample and study next-scale (visual autoregressive) image models.")
    parser.add_argument("--version", action="version", version=f"mvar_lightning {__version__}")
    words = "import a module of your own first, for its strategies and histories (from the current folder, too)"
    parser.add_argument("--import", dest="modules", metavar="MODULE", action="append", default=[], help=words)
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    subparsers = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True, parser_class=argparse.ArgumentParser
    )
    for command in COMMANDS:
        command.add_parser(subparsers)
    moved = subparsers.add_parser("bench")  # without help: not in the list
    moved.set_defaults(run=_tell_bench, takes_overrides=True)
    return parser


def _tell_bench(arguments: argparse.Namespace) -> int:
    raise UserError("bench: measurements left the package; in a clone of the repository: python -m benchmarks --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 for a mistake of the user's, 130 when told to stop."""
    left: SystemExit | None = None
    status = 0
    with patient_streams() as failures, terminable():
        try:
            status = _run(argv)
        except SystemExit as leaving:  # argparse's, after its help or its line
            left = leaving
    for reason in failures:
        with suppress(OSError):
            print(f"mvar: error: what it prints could not be written ({reason}), all else is done", file=sys.stderr)
    if left is not None and not failures:
        raise left
    return status or (2 if failures else 0)


def _run(argv: Sequence[str] | None) -> int:
    arguments, rest = build_parser().parse_known_args(argv)
    if rest and not getattr(arguments, "takes_overrides", False):
        print(f"mvar: error: unknown arguments: {' '.join(rest)} (see mvar --help)", file=sys.stderr)
        return 2
    # without dashes as well, as Hydra's users write them
    arguments.overrides = [f"--{each}" if re.match(r"[a-z_]+(\.\w+)+=", each) else each for each in rest]
    try:
        # recipes may name classes of the user's own; last in the path, so that nothing installed is shadowed
        sys.path.append(str(_current_folder()))
        for module in arguments.modules:
            _import(module)
        return int(arguments.run(arguments))
    except KeyboardInterrupt as stop:
        again = "the same command goes on" if arguments.command in GO_ON else "the same command begins again"
        print(f"mvar: {str(stop) or f'{arguments.command}: interrupted; {again}'}", file=sys.stderr)
        return 130
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        line = _line_of(error)
        if line is None or arguments.traceback or os.environ.get("MVAR_TRACEBACK"):
            raise
        print(f"mvar: error: {line}", file=sys.stderr)
        return 2


def _line_of(error: Exception) -> str | None:
    """What to say of an error that is the user's or the machine's; None for a bug of ours."""
    if isinstance(error, UserError):
        return error.with_flags()
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and NO_MEMORY.search(str(error))):
        reason = (str(error).strip() or "of this machine").splitlines()[0]
        return f"not enough memory ({reason[:200]}); a smaller batch or a smaller model takes less"
    if isinstance(error, OSError) and error.strerror:  # the file system's, where nothing nearer has foreseen it
        return f"{error.filename or 'a file'}: {error.strerror}"
    return None


def _current_folder() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise UserError("the current folder has been removed; go to another one (cd)") from None


def _import(module: str) -> None:
    """Import a module of the user's. Raises `UserError` where there is none or it fails, with its reason."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        words = f"{error}; give the name of a module here or on PYTHONPATH"
        raise UserError(f"--import {module}: {words}") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"--import {module}: {reason} (mvar --traceback shows where)") from error


@contextmanager
def terminable() -> Iterator[None]:
    """Answer SIGTERM as Ctrl-C is answered, wherever nobody else (training) takes it."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _leave_sigterm_alone() -> None:
    """A forked worker is ended by SIGTERM, without a word."""
    if signal.getsignal(signal.SIGTERM) is _stop:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_leave_sigterm_alone)  # here, as `main` may run often in one process

if __name__ == "__main__":
    sys.exit(main())
