"""Giving a module, built without memory on the meta device, the tensors of a file: strict in both directions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from mvar_lightning.errors import UserError

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")

SHOWN = 5
"""How many names of a kind an error spells out."""


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

WRAPPERS = ("_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What ``torch.compile``, Fabric, FSDP and activation checkpointing put into the names of parameters."""

DDP = "module."
"""What DDP puts before them; further inside it is somebody's own name."""


def on_meta(build: Callable[[], M], most: int | None = None) -> M:
    """Build a module whose tensors take no memory and draw no random numbers.

    Args:
        build: its constructor.
        most: parameters that it may have; None is any number. Meant for sizes from a file: what has twice as many as
            the file's tensors is not worth the time that building the rest would take.

    Raises:
        UserError: more than ``most``.
    """
    thread, made = threading.get_ident(), 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal made
        made += threading.get_ident() == thread
        if most is not None and made > most:
            raise UserError(f"these sizes have more than {most} weights, the file has fewer")

    with torch.device("meta"), _Undrawn():
        hook = register_module_parameter_registration_hook(count)
        try:
            return build()
        finally:
            hook.remove()


def plain_names(state: Mapping[str, T], source: str) -> dict[str, T]:
    """The same without what wrappers add to names. Raises `UserError` where two names become one."""
    plain = {
        ".".join(part for part in key.split(".") if part not in WRAPPERS).removeprefix(DDP): value
        for key, value in state.items()
    }
    if len(plain) != len(state):
        known = ", ".join((*WRAPPERS, DDP[:-1]))
        raise UserError(f"{source}: some names in it differ by a wrapper's prefix alone ({known})")
    return plain


class _Undrawn(TorchFunctionMode):
    """Leaves initializations out: on the meta device a normal one imports torch's compiler, which takes seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        draws = getattr(func, "__module__", None) == nn.init.__name__ and "tensor" in kwargs
        return kwargs["tensor"] if draws else func(*args, **kwargs)


def check_fit(
    found: Mapping[str, Sequence[int]],
    expected: Mapping[str, Sequence[int]],
    source: str,
    optional: Collection[str] = (),
) -> None:
    """Compare names and shapes.

    Args:
        found: shape by name, of what a file holds.
        expected: shape by name.
        source: how to call the file in the error.
        optional: names in ``expected`` that may be absent.

    Raises:
        UserError: it names what is missing, unexpected or of a wrong shape.
    """
    missing = [key for key in expected if key not in found and key not in optional]
    unexpected = [key for key in found if key not in expected]
    wrong = [
        f"{key} {tuple(found[key])} where {tuple(shape)} is expected"
        for key, shape in expected.items()
        if key in found and tuple(found[key]) != tuple(shape)
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of a wrong shape": wrong}
    if any(faults.values()):
        raise UserError(f"{source}: " + "; ".join(f"{kind}: {_list(names)}" for kind, names in faults.items() if names))


def fill(module: M, state: Mapping[str, Tensor], source: str, dtype: torch.dtype | None = None) -> M:
    """Give a module on the meta device copies of tensors that fit (`check_fit`), one at a time, in eval mode.

    Args:
        module: built by `on_meta`.
        state: by the module's own names; buffers that are absent become zeros.
        source: how to call the file in the error.
        dtype: convert floating-point tensors to it, None keeps them.

    Raises:
        UserError: a weight of another kind: whole numbers in place of floats, quantized, sparse.
    """
    own = {}
    # copies, one at a time: the file is mapped into memory, and a view into it would keep all of it
    for key, meta in module.state_dict().items():
        if key in state:
            _check_kind(f"{source}: {key}", state[key], meta)
            target = dtype if dtype is not None and state[key].is_floating_point() else state[key].dtype
            own[key] = state[key].to(target, copy=True).reshape(meta.shape).contiguous()
        else:
            own[key] = torch.zeros(meta.shape, dtype=meta.dtype, device="cpu")
    module.load_state_dict(own, strict=True, assign=True)
    assert not any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])
    return module.eval()


def _check_kind(what: str, tensor: Tensor, meta: Tensor) -> None:
    kinds: tuple[torch.dtype, ...] = (
        FLOATS if meta.is_floating_point() else (*FLOATS, torch.int32, torch.int64)
    )  # counts may be either
    if meta.dtype in (torch.int8, torch.uint8):  # of a quantized layer
        kinds = (meta.dtype,)
    if tensor.dtype not in kinds or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        found = f"{tensor.dtype}{'' if tensor.layout == torch.strided else f', {tensor.layout}'}".replace("torch.", "")
        raise UserError(f"{what}: its numbers are {found}; give plain floating-point weights")


def shapes_of(state: Mapping[str, Tensor] | nn.Module) -> dict[str, torch.Size]:
    """Shape of every tensor of a state dict, or a module's, by name."""
    state = state.state_dict() if isinstance(state, nn.Module) else state
    return {key: tensor.shape for key, tensor in state.items()}


def _list(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
