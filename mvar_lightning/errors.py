"""The one kind of error that is the user's to mend."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

ARGUMENT = re.compile(r"``(\w+)``")


class UserError(ValueError):
    """Bad input: the message names the thing, the value and the way out.

    A word in double backticks is an argument: Python's users read ``count 0: must be at least 1``, those of the command
    line ``--count 0: ...``, which prints it as one line without a traceback. All else that escapes is a bug of ours.
    """

    def __str__(self) -> str:
        return ARGUMENT.sub(r"\1", super().__str__())

    @property
    def marked(self) -> str:
        """The message with its marks, for what says it on: another error, a message to another process."""
        return str(self.args[0])

    def with_flags(self) -> str:
        """The message as the command line prints it."""
        return ARGUMENT.sub(lambda found: "--" + found[1].rstrip("_").replace("_", "-"), super().__str__())


def check_counts(**counts: int | None) -> None:
    """Raise `UserError` for a number below 1; None was not given."""
    for name, count in counts.items():
        if count is not None and (not isinstance(count, int) or count < 1):
            raise UserError(f"``{name}`` {count}: must be at least 1")


def check_kind(name: str, value: object, kinds: type | tuple[type, ...], words: str) -> None:
    """Raise `UserError` where an argument from Python is another thing altogether; ``words`` say what to give."""
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise UserError(f"``{name}``: is a {type(value).__name__}; give {words}")


def check_types(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Compare values from a file with the annotations of the function that is to take them.

    Raises:
        UserError: a value of another type, or a number that is not finite or needs more than 64 bits.
    """
    try:
        wanted = get_type_hints(function)
    except (NameError, TypeError):  # types that the author's module imports for type checkers alone
        return
    for name, value in arguments.items():
        if name in wanted and not _is_a(value, wanted[name]):
            words = getattr(wanted[name], "__name__", None) if not get_args(wanted[name]) else None
            raise UserError(f"{name} {reprlib.repr(value)}: must be {words or str(wanted[name])}")


def _is_a(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_is_a(value, one) for one in inner)
    if origin in (list, tuple, Sequence):
        return isinstance(value, (list, tuple)) and all(_is_a(each, inner[0]) for each in value)
    if kind is NoneType:
        return value is None
    if kind in (int, float):
        number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        return number and -(2**63) < value < 2**63 and math.isfinite(value)
    return isinstance(value, kind) if isinstance(kind, type) else True
