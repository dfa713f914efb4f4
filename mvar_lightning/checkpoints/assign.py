"""Giving a module, built without memory on the meta device, the tensors of a file: strict in both directions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mvar_lightning.errors import UserError

M = TypeVar("M", bound=nn.Module)

SHOWN = 5
"""How many names of a kind an error spells out."""


def on_meta(build: Callable[[], M]) -> M:
    """Build a module whose tensors take no memory and draw no random numbers."""
    with torch.device("meta"), _Undrawn():
        return build()


class _Undrawn(TorchFunctionMode):
    """Leaves initializations out: on the meta device a normal one imports torch's compiler, which takes seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        draws = getattr(func, "__module__", None) == nn.init.__name__ and "tensor" in kwargs
        return kwargs["tensor"] if draws else func(*args, **kwargs)


def check_fit(
    state: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]], source: str, optional: Collection[str] = ()
) -> None:
    """Compare names and shapes.

    Args:
        state: what a file holds.
        expected: shape by name.
        source: how to call the file in the error.
        optional: names in ``expected`` that may be absent.

    Raises:
        UserError: it names what is missing, unexpected or of a wrong shape.
    """
    missing = [key for key in expected if key not in state and key not in optional]
    unexpected = [key for key in state if key not in expected]
    wrong = [
        f"{key} {tuple(state[key].shape)} where {tuple(shape)} is expected"
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != tuple(shape)
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of a wrong shape": wrong}
    if any(faults.values()):
        raise UserError(f"{source}: " + "; ".join(f"{kind}: {_list(names)}" for kind, names in faults.items() if names))


def fill(module: M, state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> M:
    """Give a module on the meta device copies of tensors that fit (`check_fit`), one at a time, in eval mode.

    Args:
        module: built by `on_meta`.
        state: by the module's own names; buffers that are absent become zeros.
        dtype: convert floating-point tensors to it, None keeps them.
    """
    own = {}
    # copies, one at a time: the file is mapped into memory, and a view into it would keep all of it
    for key, meta in module.state_dict().items():
        if key in state:
            target = dtype if dtype is not None and state[key].is_floating_point() else state[key].dtype
            own[key] = state[key].to(target, copy=True).reshape(meta.shape).contiguous()
        else:
            own[key] = torch.zeros(meta.shape, dtype=meta.dtype, device="cpu")
    module.load_state_dict(own, strict=True, assign=True)
    assert not any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])
    return module.eval()


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    """Shape of every tensor of the state dict, by name."""
    return {key: tensor.shape for key, tensor in module.state_dict().items()}


def _list(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
