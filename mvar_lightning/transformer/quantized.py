"""Linear layers with weights of few bits, for sampling: less memory, and on CPUs faster products.

=============  ==================================================================================================
``int8``       weights of 8 bits, one scale for each output; inputs are rounded to 8 bits at each call, by one scale
               for the call. torch's own CPU kernels (FBGEMM, oneDNN): on AVX2 half the time of float32 products
``int8-weights``   the same weights; a product reads them as floats again. On any device
``int4-weights``   weights of 4 bits, a scale for each `GROUP` inputs of an output. On any device
=============  ==================================================================================================

Symmetric, rounded to nearest, of the largest magnitude (absmax), as in LLM.int8() (arXiv 2208.07339) without outliers.
What is small or feeds every scale stays as it is: embeddings, positions, history, norms, biases.

I input width, O output width.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar_lightning.compat import int8_packed, int8_product
from mvar_lightning.errors import UserError
from mvar_lightning.transformer.linear import Linear

M = TypeVar("M", bound=nn.Module)
KINDS = ("int8", "int8-weights", "int4-weights")
NO_KERNELS = "torch's kernels for it are of CPUs; on another device take int8-weights, or bf16"
GROUP = 64
"""Inputs that share a scale in 4 bits."""


class QuantizedLinear(nn.Module):
    """A linear layer whose weights are whole numbers times scales; for inference alone.

    ``weight`` is int8 (O, I), or uint8 (O, I / 2) with two numbers of 4 bits each; ``scale`` float32 (O, 1), or
    (O, I / GROUP).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, kind: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        bits4 = kind == "int4-weights"
        self.group = _group_of(in_features) if bits4 else in_features
        shape, dtype = (
            ((out_features, in_features // 2), torch.uint8) if bits4 else ((out_features, in_features), torch.int8)
        )
        self.weight = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
        self.scale = nn.Parameter(torch.zeros(out_features, in_features // self.group), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None
        self._packed: Any = None

    @property
    def input_dtype(self) -> torch.dtype:
        """What a caller converts its input to."""
        return torch.float32

    @torch.no_grad()
    def take(self, layer: nn.Linear) -> QuantizedLinear:
        """The nearest to a layer's weights."""
        if not torch.isfinite(layer.weight).all():
            raise UserError(f"``quantize`` {self.kind}: some weights are NaN or infinite; take an earlier checkpoint")
        groups_OGI = layer.weight.float().unflatten(1, (-1, self.group))
        most = 7 if self.kind == "int4-weights" else 127
        scale_OG = (groups_OGI.abs().amax(dim=2) / most).clamp_min(torch.finfo(torch.float32).tiny)
        whole_OI = (groups_OGI / scale_OG[..., None]).round_().flatten(1)
        if self.kind == "int4-weights":
            pairs = (whole_OI + 8).to(torch.uint8).unflatten(1, (-1, 2))
            self.weight.copy_(pairs[..., 0] | pairs[..., 1] << 4)
        else:
            self.weight.copy_(whole_OI.to(torch.int8))
        self.scale.copy_(scale_OG)
        if self.bias is not None and layer.bias is not None:
            self.bias.copy_(layer.bias)
        return self

    def dequantized(self) -> Tensor:
        """The weights as floats, (O, I)."""
        whole_OI: Tensor = self.weight
        if self.kind == "int4-weights":
            whole_OI = torch.stack([whole_OI & 15, whole_OI >> 4], dim=2).flatten(1).to(torch.int8) - 8
        return (whole_OI.unflatten(1, (-1, self.group)) * self.scale.float()[..., None]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.with_bias(x, self.bias)

    def with_bias(self, x: Tensor, bias_O: Tensor | None) -> Tensor:
        """The product and a bias of the caller's, in the precision of the input."""
        if self.kind != "int8":
            weight_OI = self.dequantized().to(x.dtype)
            return F.linear(x, weight_OI, None if bias_O is None else bias_O.to(x.dtype))
        if x.device.type != "cpu":
            raise UserError(f"int8: {NO_KERNELS}")
        if self._packed is None:
            self._packed = int8_packed(self.dequantized(), self.scale[:, 0])
        y = int8_product(x.float().contiguous(), self._packed)
        return (y if bias_O is None else y.add_(bias_O)).to(x.dtype)

    def _apply(self, *args: Any, **kwargs: Any) -> QuantizedLinear:
        self._packed = None
        super()._apply(*args, **kwargs)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # made again from the weights, of a copy too

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, kind={self.kind!r}"


def _group_of(in_features: int) -> int:
    if in_features % 2:
        raise UserError(
            f"int4-weights: a layer with {in_features} inputs; two share a byte, so it needs an even number"
        )
    return GROUP if in_features % GROUP == 0 else in_features


def check_quantizable(model: nn.Module, kind: str, device: torch.device) -> None:
    """Raise `UserError` for another kind, one that has no kernels on a device, or a model that is quantized already."""
    if kind not in KINDS:
        raise UserError(f"``quantize`` {kind}: unknown; choose one of {', '.join(KINDS)}")
    if kind == "int8" and device.type not in ("cpu", "meta"):
        raise UserError(f"``quantize`` int8: {NO_KERNELS}")
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise UserError(f"``quantize`` {kind}: the model is compiled; quantize it first")
    if getattr(model, "quantized", None) is not None:
        raise UserError(f"``quantize`` {kind}: the model is quantized already ({model.quantized})")


def quantize(model: M, kind: str = "int8") -> M:
    """Give a transformer's blocks, modulations and head weights of few bits, in place, in evaluation mode.

    It samples and is saved as before; training goes on from the model it was.

    Args:
        kind: ``int8``, ``int8-weights`` or ``int4-weights`` (the table above).

    Raises:
        UserError: another kind, a model that is quantized already or compiled, ``int8`` on another device than a CPU.
    """
    check_quantizable(model, kind, next(model.parameters()).device)
    layers = {
        (parent, name): layer
        for parent in model.modules()
        for name, layer in parent.named_children()
        if type(layer) is Linear
    }
    if not layers:
        raise UserError(f"``quantize`` {kind}: the model has no linear layers of a transformer")
    for (parent, name), layer in layers.items():
        with torch.device(layer.weight.device):
            few = QuantizedLinear(layer.in_features, layer.out_features, layer.bias is not None, kind)
        setattr(parent, name, few if layer.weight.is_meta else few.take(layer))
    model.quantized = kind  # type: ignore[assignment]
    return model.eval()
