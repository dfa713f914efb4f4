"""What this suite takes of libraries beside their documented interface."""

from __future__ import annotations

import torch

from mvar_lightning.compat import constant_when_compiled


def test_a_function_is_marked_constant_as_torch_marks_it() -> None:
    def ours() -> int: ...
    def theirs() -> int: ...

    assert vars(constant_when_compiled(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}
