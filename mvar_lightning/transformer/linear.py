"""Matrix products of the transformer: torch's own, and without gradient on CPUs those of oneDNN where they are faster.

torch sends float32 products to MKL. oneDNN, which torch ships for convolutions and for its compiler, does not repack
the weights at every call, and appends an activation or an elementwise product while the result is still in cache. In
sampling that is 1.1 to 1.3 times as fast on an AMD EPYC, where MKL runs well below the peak; on Intel (Sapphire Rapids)
it is 1.0 to 1.3 times for 4 to 400 rows, and MKL 1.05 to 1.15 times beyond. In training nothing is gained: oneDNN
copies the transposed factors of gradients first (docs/speed.md has the figures).

The choice is made here and nowhere else, from what the tensors and the CPU are: anything that is not a plain float32
CPU tensor of some size (GPU, half precision, autocast, meta, a compiler's tracing, small models) goes to `F.linear`.

B batch, l tokens, I input width, O output width.
"""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar_lightning.compat import has_onednn_linear, onednn_linear, onednn_linear_times
from mvar_lightning.tools.compute import cpu_tuning

LEAST_WEIGHTS = 2**18
"""Products with fewer weights than this stay with torch: there the calls themselves would cost more than they gain."""

MKL_ROWS = 400
"""Where MKL runs at the CPU's peak, products of more rows than this are its own, unless something is appended."""

Activation = Literal["gelu", "swish"]


class Linear(nn.Linear):
    """`nn.Linear` on `linear`. `quantize` puts others in its place that have the same three."""

    @property
    def input_dtype(self) -> torch.dtype:
        """What a caller converts its input to."""
        return self.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def with_bias(self, x: Tensor, bias_O: Tensor) -> Tensor:
        """The product and a bias of the caller's."""
        return linear(x, self.weight, bias_O)


def linear(x_BlI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b, (B, l, O)."""
    many_rows = x_BlI.numel() > MKL_ROWS * x_BlI.shape[-1]
    if not _suits_onednn(x_BlI, weight_OI) or (many_rows and _mkl_at_peak()):
        return F.linear(x_BlI, weight_OI, bias_O)
    return _product(x_BlI, weight_OI, bias_O)


def activated_linear(layer: nn.Linear, x_BlI: Tensor, activation: Activation) -> Tensor:
    """act(x W^T + b): tanh-approximated GELU or SiLU, appended to the product where no gradient is asked for."""
    if _suits_onednn(x_BlI, layer.weight):
        return _product(x_BlI, layer.weight, layer.bias, activation)
    h_BlO = layer(x_BlI)
    return F.gelu(h_BlO, approximate="tanh") if activation == "gelu" else F.silu(h_BlO)


def multiplied_linear(layer: nn.Linear, x_BlI: Tensor, factor_BlO: Tensor) -> Tensor:
    """(x W^T + b) times ``factor_BlO``, in one pass where no gradient is asked for."""
    if _suits_onednn(x_BlI, layer.weight):
        return onednn_linear_times(x_BlI, layer.weight, layer.bias, factor_BlO)
    return layer(x_BlI) * factor_BlO


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.is_grad_enabled()
        and weight.numel() >= LEAST_WEIGHTS
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and type(weight) in (Tensor, nn.Parameter)  # not a DTensor, not a tracer's stand-in
        and type(x) in (Tensor, nn.Parameter)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and cpu_tuning()
        and has_onednn_linear()
    )


@lru_cache(maxsize=1)
def _mkl_at_peak() -> bool:
    """Whether torch's products go to MKL, and MKL knows this CPU: it is at its best on Intel's own alone."""
    cpuinfo = Path("/proc/cpuinfo")
    maker = cpuinfo.read_text() if cpuinfo.is_file() else platform.processor()
    return torch.backends.mkl.is_available() and "GenuineIntel" in maker


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None = None) -> Tensor:
    return onednn_linear(x, weight, bias, activation or "none", "tanh" if activation == "gelu" else "")
