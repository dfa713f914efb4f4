"""The block axis: AdaLN + GELU MLP with learnt positions (VAR, MVAR), or RMSNorm + SwiGLU + 2-D RoPE (Markov-VAR).

Both are the same residual block with other parts, so there is one block class and a design that chooses them. The parts
come first: attention, MLPs, AdaLN modulation, stochastic depth, the head.

B batch, l tokens of the scales at hand, C width, H heads, D head dim.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mvar_lightning.attention import AttentionBackend, TakesKeys
from mvar_lightning.axis import AxisMember
from mvar_lightning.pyramid import ScalePyramid
from mvar_lightning.transformer.linear import Linear, activated_linear, multiplied_linear
from mvar_lightning.transformer.positions import LearnedPositions, LevelMLP, PyramidRotation

MAX_LOG_SCALE = math.log(100.0)
NORM_FLOOR = 1e-12  # shortest length a query or key is divided by (that of `F.normalize`)

HEAD_SCALE, ADALN_SCALE = 0.02, 0.5
"""Factors on the first weights of the classifier and of modulations, their gates aside."""

Rotation = Callable[[Tensor, range], Tensor]
"""Rotates queries and keys (B, l, n, H, D), n = 2 of them, of a range of scales by their positions."""


class SelfAttention(nn.Module):
    """Multi-head attention with l2-normalized queries and keys (VAR's `SelfAttention`).

    Which keys a query sees is the backend's business; this module has no branch on it. Queries carry a learnt
    scale per head, exp(min(log_scale, log 100)), from 4. Keys have no bias.
    """

    def __init__(
        self, width: int, heads: int, backend: AttentionBackend, *, qk_norm: bool, rotation: Rotation | None = None
    ) -> None:
        super().__init__()
        self.heads, self.backend, self.rotation = heads, backend, rotation
        self.qkv = Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = Linear(width, width)
        # without the norm VAR divides the usual 1 / sqrt(D) by four
        self.softmax_scale = 1.0 if qk_norm else 0.25 / math.sqrt(width // heads)
        self.log_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(4.0))) if qk_norm else None

    def no_weight_decay(self) -> set[str]:
        return {"log_scale"}

    def forward(self, x_BlC: Tensor, scales: range, cache: TakesKeys | None = None) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv_Bl3HD = self.qkv.with_bias(x_BlC, bias).unflatten(2, (3, self.heads, -1))
        qk_Bl2HD, v_Bl1HD = qkv_Bl3HD.split((2, 1), dim=2)  # its backward pass is one concatenation
        v_BlHD = v_Bl1HD.squeeze(2)
        if self.log_scale is not None:
            # of length exp(log_scale) and 1, in one pass over both; in float32: half precision overflows here (NaN)
            q_length_H1 = self.log_scale[:, :, 0].float().clamp_max(MAX_LOG_SCALE).exp()
            length_2H1 = torch.stack([q_length_H1, torch.ones_like(q_length_H1)])
            lengthened = _of_length if qk_Bl2HD.dtype == torch.float32 else _HalfOfLength.apply
            qk_Bl2HD = lengthened(qk_Bl2HD, length_2H1)
        if self.rotation is not None:
            qk_Bl2HD = self.rotation(qk_Bl2HD, scales)
        q, k = qk_Bl2HD.to(v_BlHD.dtype).transpose(1, 3).unbind(2)  # two of (B, H, l, D)
        v = v_BlHD.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(q, k, v, scales.start)
        out = self.backend(q, k, v, scales, self.softmax_scale)
        return self.proj(out.transpose(1, 2).flatten(2))


def _of_length(x_Bl2HD: Tensor, length_2H1: Tensor) -> Tensor:
    norm_Bl2H1 = torch.linalg.vector_norm(x_Bl2HD, dim=-1, keepdim=True)
    return x_Bl2HD * (length_2H1 / norm_Bl2H1.clamp_min(NORM_FLOOR))


class _HalfOfLength(torch.autograd.Function):
    """`_of_length` in float32 of half-precision vectors. Kept for the backward pass are the vectors as they came, a
    part of what the values keep anyway, and not their float32 copy: 8 bytes a token and channel."""

    @staticmethod
    def forward(ctx: Any, x_Bl2HD: Tensor, length_2H1: Tensor) -> Tensor:
        ctx.save_for_backward(x_Bl2HD, length_2H1)
        return _of_length(x_Bl2HD.float(), length_2H1)

    @staticmethod
    def backward(ctx: Any, grad_Bl2HD: Tensor) -> tuple[Tensor, Tensor]:
        half_Bl2HD, length_2H1 = ctx.saved_tensors
        x, grad = half_Bl2HD.float(), grad_Bl2HD.float()
        norm_Bl2H1 = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = 1 / norm_Bl2H1.clamp_min(NORM_FLOOR)
        unit = x * inverse
        along_Bl2H1 = (grad * unit).sum(dim=-1, keepdim=True)
        # a change along the vector changes nothing, unless it is too short to be normalized
        across = grad - unit * torch.where(norm_Bl2H1 >= NORM_FLOOR, along_Bl2H1, 0.0)
        return (across * (length_2H1 * inverse)).to(half_Bl2HD.dtype), along_Bl2H1.sum(dim=(0, 1))


def modulated(norm: nn.Module, x_BlC: Tensor, scale_B1C: Tensor, shift_B1C: Tensor) -> Tensor:
    """norm(x) (1 + scale) + shift, in the precision of x.

    CUDA's autocast would take norms and `addcmul` to float32 and keep both results for the backward pass. Kernels of
    norms compute in float32 inside, whatever they read. A gain joins the scale, in float32, for each image once.
    """
    if x_BlC.dtype == torch.float32 and scale_B1C.dtype == torch.float32:
        return torch.addcmul(shift_B1C, norm(x_BlC), 1 + scale_B1C)
    with torch.autocast(x_BlC.device.type, enabled=False):
        factor_B1C = 1 + scale_B1C.float()
        width = x_BlC.shape[-1:]
        if isinstance(norm, nn.RMSNorm):
            factor_B1C = factor_B1C if norm.weight is None else factor_B1C * norm.weight.float()
            normed_BlC = F.rms_norm(x_BlC, width, None, norm.eps)
        else:
            assert isinstance(norm, nn.LayerNorm) and norm.weight is None, "a norm with weights: join them here"
            normed_BlC = F.layer_norm(x_BlC, width, None, None, norm.eps)
        return torch.addcmul(shift_B1C.to(x_BlC.dtype), normed_BlC, factor_B1C.to(x_BlC.dtype))


class GeluMLP(nn.Module):
    """Linear, tanh-approximated GELU, Linear (VAR's `FFN`)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)

    def forward(self, x_BlC: Tensor) -> Tensor:
        if not _activates_again(x_BlC):
            return self.down(activated_linear(self.up, x_BlC, "gelu"))
        return _kept_as_inputs(lambda h: self.down(F.gelu(h, approximate="tanh")), self.up(x_BlC))


class SwiGLU(nn.Module):
    """silu(gate(x)) * up(x), then down; no biases (Markov-VAR's `LlamaMLP`)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = Linear(width, hidden, bias=False)
        self.up = Linear(width, hidden, bias=False)
        self.down = Linear(hidden, width, bias=False)

    def forward(self, x_BlC: Tensor) -> Tensor:
        if not _activates_again(x_BlC):
            return self.down(multiplied_linear(self.up, x_BlC, activated_linear(self.gate, x_BlC, "swish")))
        return _kept_as_inputs(lambda gate, h: self.down(F.silu(gate) * h), self.gate(x_BlC), self.up(x_BlC))


def _activates_again(x_BlC: Tensor) -> bool:
    """Whether a compiled block in half precision makes the MLP's activations again in its backward pass, where they
    fuse with what reads them, instead of keeping them: a sixth of what a block keeps."""
    return torch.compiler.is_compiling() and torch.is_grad_enabled() and x_BlC.dtype != torch.float32


def _kept_as_inputs(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    result: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result


class Modulation(nn.Module):
    """AdaLN: the condition's linear image, ``parts`` rows of width C: (B, C) -> (B, 1, parts, C)."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = Linear(width, parts * width)

    def scale_block(self, gamma_init: float) -> None:
        """Factors on a block's six rows: gates start near zero, so that the block starts as the identity."""
        rows = self.linear.weight.unflatten(0, (self.parts, -1))
        rows[:2].mul_(gamma_init)
        rows[2:].mul_(ADALN_SCALE)

    def forward(self, condition_BC: Tensor) -> Tensor:
        return self.linear(F.silu(condition_BC)).unflatten(1, (1, self.parts, -1))


class ModulationOffset(nn.Module):
    """A block's own learnt offset to a modulation that all blocks share (VAR d36)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)  # drawn again by `init_weights`

    def init_weights(self, std: float) -> None:
        nn.init.normal_(self.offset, std=self.offset.shape[-1] ** -0.5)

    def scale_block(self, gamma_init: float) -> None:
        self.offset[:, :, :2].mul_(gamma_init)
        self.offset[:, :, 2:].mul_(ADALN_SCALE)

    def no_weight_decay(self) -> set[str]:
        return {"offset"}

    def forward(self, shared_B16C: Tensor) -> Tensor:
        return self.offset + shared_B16C


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch for whole samples, in training only.

    It scales the gates of a block's two branches, not the branches: a token's worth of work for each image.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, modulation_B16C: Tensor) -> Tensor:
        """A block's modulation, whose first two of six parts are gates, with some gates at zero."""
        if not self.training or self.probability == 0.0:
            return modulation_B16C
        keep, gates_B12C = 1.0 - self.probability, modulation_B16C[:, :, :2]
        kept = [gates_B12C.new_empty(len(gates_B12C), 1, 1).bernoulli_(keep).div_(keep) for _ in range(2)]
        return torch.cat([gates_B12C * torch.stack(kept, dim=2), modulation_B16C[:, :, 2:]], dim=2)


class ModulatedHead(nn.Module):
    """AdaLN norm and linear classifier, computed from float32 (VAR's `AdaLNBeforeHead` and `head`)."""

    def __init__(self, width: int, vocab_size: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.modulation = Modulation(width, parts=2)
        self.linear = Linear(width, vocab_size)

    def scale_weights(self, depth: int, gamma_init: float) -> None:
        self.linear.weight.mul_(HEAD_SCALE)  # all codes start nearly equally likely
        self.modulation.linear.weight.mul_(ADALN_SCALE)

    def features(self, x_BlC: Tensor, modulation_B12C: Tensor) -> Tensor:
        """What the classifier reads, in its precision."""
        scale, shift = modulation_B12C.unbind(2)
        h_BlC = torch.addcmul(shift, self.norm(x_BlC.float()), 1 + scale)
        return h_BlC.to(self.linear.input_dtype)

    def classify(self, h_BlC: Tensor) -> Tensor:
        """Logits (B, l, V), float32."""
        return self.linear(h_BlC).float()


class AdaLNBlock(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the class (VAR's `AdaLNSelfAttn`).

    One norm serves both branches, as in the references. Stochastic depth (`drop_path`) acts on the modulation before
    the block: its rate is each block's own, and inside a compiled block every rate would be one more variant.
    """

    def __init__(
        self,
        norm: nn.Module,
        attention: SelfAttention,
        mlp: GeluMLP | SwiGLU,
        modulation: Modulation | ModulationOffset,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp, self.modulation = norm, attention, mlp, modulation
        self.drop_path = DropPath(drop_path)

    def scale_weights(self, depth: int, gamma_init: float) -> None:
        # 2 depth branches add to the residual stream: its variance then does not grow with depth
        for output in (self.attention.proj, self.mlp.down):
            output.weight.div_(math.sqrt(2 * depth))
        self.modulation.scale_block(gamma_init)

    def forward(self, x_BlC: Tensor, modulation_B16C: Tensor, scales: range, cache: TakesKeys | None = None) -> Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation_B16C.unbind(2)
        attended_BlC = self.attention(modulated(self.norm, x_BlC, scale1, shift1), scales, cache)
        x_BlC = torch.addcmul(x_BlC, attended_BlC, gate1)
        mixed_BlC = self.mlp(modulated(self.norm, x_BlC, scale2, shift2))
        return torch.addcmul(x_BlC, mixed_BlC, gate2)


class BlockDesign(AxisMember, ABC):
    """Chooses the parts of the blocks and what goes with them."""

    @abstractmethod
    def make_block(self, width: int, heads: int, backend: AttentionBackend, drop_path: float) -> AdaLNBlock: ...

    @abstractmethod
    def make_norm(self, width: int) -> nn.Module: ...

    @abstractmethod
    def make_positions(self, pyramid: ScalePyramid, width: int) -> nn.Module: ...

    @abstractmethod
    def make_condition(self, width: int) -> nn.Module:
        """What is computed from the class embedding once for all blocks."""


class VARBlocks(BlockDesign):
    """AdaLN with LayerNorm without parameters, GELU MLP, learnt positions (VAR and MVAR).

    Args:
        mlp_ratio: hidden width of the MLP over C.
        shared_adaln: one modulation for all blocks plus an offset for each (VAR d36).
        qk_norm: l2-normalize queries and keys (all releases).
    """

    def __init__(self, mlp_ratio: float = 4.0, shared_adaln: bool = False, qk_norm: bool = True) -> None:
        self.mlp_ratio, self.shared_adaln, self.qk_norm = mlp_ratio, shared_adaln, qk_norm

    def make_block(self, width: int, heads: int, backend: AttentionBackend, drop_path: float) -> AdaLNBlock:
        return AdaLNBlock(
            norm=self.make_norm(width),
            attention=SelfAttention(width, heads, backend, qk_norm=self.qk_norm),
            mlp=GeluMLP(width, round(width * self.mlp_ratio)),
            modulation=ModulationOffset(width) if self.shared_adaln else Modulation(width, parts=6),
            drop_path=drop_path,
        )

    def make_norm(self, width: int) -> nn.Module:
        return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)

    def make_positions(self, pyramid: ScalePyramid, width: int) -> nn.Module:
        return LearnedPositions(pyramid, width)

    def make_condition(self, width: int) -> nn.Module:
        return Modulation(width, parts=6) if self.shared_adaln else nn.Identity()


class LlamaBlocks(BlockDesign):
    """AdaLN with RMSNorm with gain, SwiGLU, 2-D RoPE, sinusoidal levels (Markov-VAR's `LlamaAdaLNSelfAttn`).

    Args:
        mlp_ratio: the MLP's hidden width is 2/3 of this times C, rounded up to a multiple of 256.
        rope_theta: base of the rotary frequencies.
        rope_pair_within_axis: see `PyramidRotation`; the released models have False.
        qk_norm: l2-normalize queries and keys (all releases).
        learned_positions: add VAR's learned positions and levels in place of sinusoidal levels (no release does).
            Rotations tell how far tokens are from one another, not where they are: with one scale in sight and few
            blocks a token hardly knows its place.
    """

    def __init__(
        self,
        mlp_ratio: float = 4.0,
        rope_theta: float = 1e4,
        rope_pair_within_axis: bool = False,
        qk_norm: bool = True,
        learned_positions: bool = False,
    ) -> None:
        self.mlp_ratio, self.rope_theta = mlp_ratio, rope_theta
        self.rope_pair_within_axis, self.qk_norm = rope_pair_within_axis, qk_norm
        self.learned_positions = learned_positions

    def make_block(self, width: int, heads: int, backend: AttentionBackend, drop_path: float) -> AdaLNBlock:
        rotation = PyramidRotation(backend.pyramid, self.rope_theta, pair_within_axis=self.rope_pair_within_axis)
        return AdaLNBlock(
            norm=self.make_norm(width),
            attention=SelfAttention(width, heads, backend, qk_norm=self.qk_norm, rotation=rotation),
            mlp=SwiGLU(width, int(width * self.mlp_ratio * 2 / 3 + 255) // 256 * 256),
            modulation=Modulation(width, parts=6),
            drop_path=drop_path,
        )

    def make_norm(self, width: int) -> nn.Module:
        return nn.RMSNorm(width, eps=1e-6)

    def make_positions(self, pyramid: ScalePyramid, width: int) -> nn.Module:
        return LearnedPositions(pyramid, width) if self.learned_positions else LevelMLP(pyramid, width)

    def make_condition(self, width: int) -> nn.Module:
        return nn.Identity()
