"""Private doors of libraries, each with a test: what no public name gives stands in one file."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant_when_compiled(function: F) -> F:
    """`torch.compiler.assume_constant_result`, which marks a function in one line of torch 2.1 to 2.13, and to get
    there imports the whole of ``torch._dynamo``: half of what importing a transformer takes."""
    vars(function)["_dynamo_marked_constant"] = True
    return function
