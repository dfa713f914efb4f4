"""Backends: how a plan is computed. All give the numbers of the dense reference.

A backend is made once, for one plan, and refuses at construction what it cannot render. It is called with the
queries of a contiguous range of scales and with keys that end where those queries end, so that one call serves
training (all scales), one scale of sampling, and a group of scales.

B batch, H heads, l tokens of the query scales, S tokens of the keys, D head dim, L all tokens.
"""

from __future__ import annotations

import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar_lightning.attention.plan import AttentionPlan, ScaleRead
from mvar_lightning.attention.strategies import AttentionStrategy, neighborhood_mask, window_starts
from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import ScalePyramid
from mvar_lightning.tools.compute import table

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


NATTEN_FROM = 0, 21, 6
"""The first NATTEN whose kernels are taken."""


class AttentionBackend(ABC):
    """Computes attention under one strategy on one pyramid.

    Raises:
        UserError: at construction, where this backend cannot render the strategy here.
    """

    name: str

    def __init__(self, strategy: AttentionStrategy, pyramid: ScalePyramid) -> None:
        self.strategy = strategy
        self.pyramid = pyramid
        self.plan: AttentionPlan = strategy.plan(pyramid)

    @abstractmethod
    def __call__(self, q_BHlD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, scales: range, softmax_scale: float) -> Tensor:
        """Attention output (B, H, l, D) of the queries of ``scales``; the keys end with the last of them."""

    def prepare(self, device: torch.device) -> None:
        """Make what a call on ``device`` reads and a compiler cannot trace; called before blocks run."""
        return

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.strategy!r})"


class DenseBackend(AttentionBackend):
    """One masked attention over all tokens: the reference that every other backend must equal."""

    name = "dense"

    def __call__(self, q_BHlD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, scales: range, softmax_scale: float) -> Tensor:
        end = self.pyramid.span(scales).stop
        rows, columns = slice(end - q_BHlD.shape[2], end), slice(end - k_BHSD.shape[2], end)
        mask = _strategy_mask(self.strategy, self.pyramid, q_BHlD.device)[rows, columns]
        return F.scaled_dot_product_attention(q_BHlD, k_BHSD, v_BHSD, attn_mask=mask, scale=softmax_scale)


class PerScaleBackend(AttentionBackend):
    """One attention call for each query scale on the contiguous keys it reads: no L x L mask anywhere.

    A neighborhood is a mask of its own scale only (l x l), which also trains on a CPU.
    """

    name = "per_scale"

    def __call__(self, q_BHlD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, scales: range, softmax_scale: float) -> Tensor:
        first_query, first_key = self.pyramid.span(scales).start, self.pyramid.span(scales).stop - k_BHSD.shape[2]
        own = [_shifted(self.pyramid.slice_of(scale), first_query) for scale in scales]
        keys = [_shifted(self.plan.keys_of(scale), first_key) for scale in scales]
        parts = zip(_parts(q_BHlD, own), _parts(k_BHSD, keys), _parts(v_BHSD, keys), strict=True)
        reads = [self.plan.reads[scale] for scale in scales]
        outputs = [self.read(read, q, k, v, softmax_scale) for read, (q, k, v) in zip(reads, parts, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def read(self, read: ScaleRead, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        """Attention of the queries of one scale, (B, H, l, D)."""
        mask = None if read.kernel_size is None else _window_mask(read.shape, read.kernel_size, q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale)


def _shifted(tokens: slice, first: int) -> slice:
    return slice(tokens.start - first, tokens.stop - first)


def _parts(x_BHLD: Tensor, ranges: list[slice]) -> Sequence[Tensor]:
    """The tokens of each range. Plain slices would each go back as a whole tensor of zeros that is added."""
    borders = [0, *(tokens.stop for tokens in ranges)]
    if [tokens.start for tokens in ranges] == borders[:-1] and borders[-1] == x_BHLD.shape[2]:
        return x_BHLD.split([tokens.stop - tokens.start for tokens in ranges], dim=2)  # goes back as one concatenation
    parts: Sequence[Tensor] = _Ranges.apply(x_BHLD, [(tokens.start, tokens.stop) for tokens in ranges])
    return parts


class _Ranges(torch.autograd.Function):
    """Slices along the tokens that may overlap, as views; their gradients are added into one tensor."""

    @staticmethod
    def forward(ctx: Any, x_BHLD: Tensor, ranges: list[tuple[int, int]]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.ranges = x_BHLD.shape, ranges
        return tuple(x_BHLD[:, :, start:stop] for start, stop in ranges)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # summed in float32: a coarse key has a gradient from every later scale, and half precision would round each sum
        whole = grads[0].new_zeros(ctx.shape, dtype=torch.promote_types(grads[0].dtype, torch.float32))
        for (start, stop), grad in zip(ctx.ranges, grads, strict=True):
            whole[:, :, start:stop] += grad
        return whole.to(grads[0].dtype), None


class NattenBackend(PerScaleBackend):
    """Per-scale attention whose neighborhoods run on NATTEN (github SHI-Labs/NATTEN)."""

    name = "natten"

    def __init__(self, strategy: AttentionStrategy, pyramid: ScalePyramid, *, need_kernels: bool = True) -> None:
        super().__init__(strategy, pyramid)
        if all(read.kernel_size is None for read in self.plan.reads):
            raise UserError(f"backend natten: {strategy!r} has no neighborhood on scales {pyramid}; use per_scale")
        if importlib.util.find_spec("natten") is None:
            raise UserError("backend natten: the package natten is not installed (make natten); or use per_scale")
        if need_kernels and not natten_has_kernels():
            raise UserError(
                "backend natten: this natten was built without CUDA kernels, or is older than "
                f"{'.'.join(map(str, NATTEN_FROM))}; "
                "install a prebuilt wheel from natten.org for your torch and CUDA, or use per_scale"
            )
        import natten

        self._na2d, self._on_gpu = natten.na2d, need_kernels

    def read(self, read: ScaleRead, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        # its kernels are CUDA's: a model that was moved to the CPU goes on there
        if read.kernel_size is None or (q.device.type == "cpu" and self._on_gpu):
            return super().read(read, q, k, v, softmax_scale)
        q, k, v = (t.transpose(1, 2).unflatten(1, read.shape).contiguous() for t in (q, k, v))
        out = self._na2d(q, k, v, kernel_size=read.window, scale=softmax_scale)
        return out.flatten(1, 2).transpose(1, 2)


class FlexBackend(PerScaleBackend):
    """FlexAttention over all tokens in one fused kernel; single scales (sampling) run per scale.

    FlexAttention has no backward on a CPU, so without CUDA this is refused unless ``forward_only``.
    """

    name = "flex"

    def __init__(self, strategy: AttentionStrategy, pyramid: ScalePyramid, *, forward_only: bool = False) -> None:
        super().__init__(strategy, pyramid)
        if not forward_only and not torch.cuda.is_available():
            raise UserError("backend flex: FlexAttention has no backward on a CPU; use per_scale or auto")
        self._masks: dict[str, BlockMask] = {}

    def prepare(self, device: torch.device) -> None:
        # inside a compiled block the mask must be there: making it would break the graph
        self._masks.setdefault(str(device), _flex_block_mask(self.strategy, self.pyramid, device))

    def __call__(self, q_BHlD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, scales: range, softmax_scale: float) -> Tensor:
        if len(scales) < self.pyramid.num_scales:
            return super().__call__(q_BHlD, k_BHSD, v_BHSD, scales, softmax_scale)
        if not torch.compiler.is_compiling():
            self.prepare(q_BHlD.device)
        block_mask = self._masks[str(q_BHlD.device)]
        flex_attention = _flex_attention(q_BHlD.device.type)
        return flex_attention(q_BHlD, k_BHSD, v_BHSD, block_mask=block_mask, scale=softmax_scale)


BACKENDS: dict[str, type[AttentionBackend]] = {
    backend.name: backend for backend in (DenseBackend, PerScaleBackend, NattenBackend, FlexBackend)
}


def choose_backend(
    name: str, strategy: AttentionStrategy, pyramid: ScalePyramid, head_dim: int | None = None
) -> AttentionBackend:
    """The backend called ``name``, or for "auto" the fastest that can render ``strategy`` on this machine in heads of
    ``head_dim`` channels (None: any number)."""
    windows = [read.window for read in strategy.plan(pyramid).reads if read.kernel_size is not None]
    # NATTEN 0.21: `check_kernel_size_arg`, `can_run_cutlass_fna`
    fits = all(min(window) > 1 for window in windows) and (head_dim is None or head_dim % 8 == 0)
    if name == "auto":
        name = "natten" if windows and fits and natten_has_kernels() else "per_scale"
    if name == "natten" and not fits:
        raise UserError(
            f"backend natten: {strategy!r} with a head dimension of {head_dim}; its kernels take neighborhoods of more "
            "than 1 along each axis and head dimensions that 8 divides; use per_scale or auto"
        )
    if name not in BACKENDS:
        raise UserError(f"attention backend {name!r} is unknown; choose auto, {', '.join(BACKENDS)}")
    return BACKENDS[name](strategy, pyramid)


@lru_cache(maxsize=1)
def natten_has_kernels() -> bool:
    """Whether natten is installed with compiled CUDA kernels and a GPU is there to run them."""
    if not torch.cuda.is_available() or importlib.util.find_spec("natten") is None:
        return False
    import natten

    # before 0.21.6 gradients of its Hopper kernels could be wrong
    new_enough = _version(natten.__version__) >= NATTEN_FROM
    return new_enough and bool(getattr(natten, "HAS_LIBNATTEN", False))


def _version(text: str) -> tuple[int, ...]:
    """The leading numbers of a version, such as (0, 21, 6) of 0.21.6+torch2110cu130."""
    numbers = (re.match(r"\d+", part) for part in text.split("+")[0].split(".")[:3])
    return tuple(int(number[0]) for number in numbers if number)


@table(maxsize=64)
def _window_mask(shape: tuple[int, int], kernel_size: int, device: torch.device) -> Tensor:
    return neighborhood_mask(shape, kernel_size).to(device)


@table(maxsize=8)
def _strategy_mask(strategy: AttentionStrategy, pyramid: ScalePyramid, device: torch.device) -> Tensor:
    return strategy.mask(pyramid).to(device)


@lru_cache(maxsize=2)
def _compiled_flex(device_type: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # only the compiled form is fused; on a CPU the plain form is the one that always runs
    chosen: Any = torch.compile(flex_attention, dynamic=False) if device_type == "cuda" else flex_attention
    return chosen


def _flex_attention(device_type: str) -> Callable[..., Tensor]:
    """The fused form: the plain one inside a graph that is compiled as a whole."""
    if torch.compiler.is_compiling():
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention
    return _compiled_flex(device_type)


@lru_cache(maxsize=8)
def _flex_block_mask(strategy: AttentionStrategy, pyramid: ScalePyramid, device: torch.device) -> BlockMask:
    from torch.nn.attention.flex_attention import create_block_mask

    plan = strategy.plan(pyramid)
    with torch.inference_mode(False), torch.device("cpu"):
        scale_L, yx_L2 = pyramid.scale_of_tokens(), pyramid.coordinates()
        begin_L = torch.tensor([plan.keys_of(scale).start for scale in range(len(pyramid))])[scale_L].to(device)
        end_L = torch.tensor([plan.keys_of(scale).stop for scale in range(len(pyramid))])[scale_L].to(device)
        # a dense scale is a window as large as its map, on whose other scales' keys it makes no demand
        sizes_K2 = torch.tensor(
            [pyramid.last_shape if read.kernel_size is None else read.window for read in plan.reads]
        )
        starts = [map(window_starts, read.shape, read.window) for read in plan.reads]
        first_L2 = torch.cat([torch.cartesian_prod(*of_axes) for of_axes in starts])
        stop_L2 = (first_L2 + sizes_K2[scale_L]).to(device)
        first_L2, yx_L2 = first_L2.to(device), yx_L2.to(device)
        windows = any(read.kernel_size is not None for read in plan.reads)

        # bounds compared directly: tests of a difference came out wrong in the backward pass on Hopper under CUDA 13
        # (attention-gym 408, 412)
        def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            in_range = (kv >= begin_L[q]) & (kv < end_L[q])
            if not windows:
                return in_range
            in_rows = (yx_L2[kv, 0] >= first_L2[q, 0]) & (yx_L2[kv, 0] < stop_L2[q, 0])
            return in_range & in_rows & (yx_L2[kv, 1] >= first_L2[q, 1]) & (yx_L2[kv, 1] < stop_L2[q, 1])

        length = pyramid.num_tokens
        return create_block_mask(visible, None, None, length, length, device=str(device))
