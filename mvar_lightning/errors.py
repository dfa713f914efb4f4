"""The one kind of error that is the user's to mend."""

from __future__ import annotations

import re

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
        if count is not None and count < 1:
            raise UserError(f"``{name}`` {count}: must be at least 1")
