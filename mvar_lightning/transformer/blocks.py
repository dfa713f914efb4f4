"""The block axis: AdaLN + GELU MLP with learnt positions (VAR, MVAR), or RMSNorm + SwiGLU + 2-D RoPE (Markov-VAR).

Both are the same residual block with other parts, so there is one block class and a design that chooses them.

B batch, l tokens of the scales at hand, C width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from mvar_lightning.attention import AttentionBackend, LayerCache
from mvar_lightning.axis import AxisMember
from mvar_lightning.pyramid import ScalePyramid
from mvar_lightning.transformer.layers import (
    DropPath,
    GeluMLP,
    Modulation,
    ModulationOffset,
    SelfAttention,
    SwiGLU,
)
from mvar_lightning.transformer.positions import LearnedPositions, LevelMLP
from mvar_lightning.transformer.rope import PyramidRotation


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
        self.norm = norm
        self.attention = attention
        self.mlp = mlp
        self.modulation = modulation
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BlC: Tensor, modulation_B16C: Tensor, scales: range, cache: LayerCache | None = None) -> Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation_B16C.unbind(2)
        attended_BlC = self.attention(torch.addcmul(shift1, self.norm(x_BlC), 1 + scale1), scales, cache)
        x_BlC = torch.addcmul(x_BlC, attended_BlC, gate1)
        mixed_BlC = self.mlp(torch.addcmul(shift2, self.norm(x_BlC), 1 + scale2))
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
        self.mlp_ratio = mlp_ratio
        self.shared_adaln = shared_adaln
        self.qk_norm = qk_norm

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
    """

    def __init__(
        self,
        mlp_ratio: float = 4.0,
        rope_theta: float = 1e4,
        rope_pair_within_axis: bool = False,
        qk_norm: bool = True,
    ) -> None:
        self.mlp_ratio = mlp_ratio
        self.rope_theta = rope_theta
        self.rope_pair_within_axis = rope_pair_within_axis
        self.qk_norm = qk_norm

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
        return LevelMLP(pyramid, width)

    def make_condition(self, width: int) -> nn.Module:
        return nn.Identity()
