"""Convolutional encoder and decoder of the tokenizer: image <-> latent map.

The architecture is the f16 autoencoder of taming-transformers in the form that VAR uses (``models/basic_vae.py`` of the
reference): residual blocks with group normalization, one halving of the map per level, attention at the lowest level
and in the middle.

Shapes: B batch, C width, Z code dim, HW pixels, hw latent map; n tokens of an attention map. Images have 3 channels, or
``image_channels``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar_lightning.errors import UserError
from mvar_lightning.tools.compute import cpu_tuning

NORM_EPS = 1e-6


class GroupNorm(nn.GroupNorm):
    """Group normalization in the precision of its parameters, whatever autocast says.

    On a GPU autocast keeps group norms in float32 itself; on a CPU they compute in what they are given, and a
    convolution before them gives bfloat16.
    """

    def forward(self, x_BC: Tensor) -> Tensor:
        return super().forward(x_BC.to(self.weight.dtype))


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the map's size."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


def silu(x: Tensor) -> Tensor:
    """SiLU of a tensor that nobody else needs: in place where no gradient is asked for."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def fast_layout(x_BCHW: Tensor) -> Tensor:
    """The map in the memory layout that this device convolves fastest: on CPUs channels last.

    In training the layout stays as it comes (the gradients' convolutions gain nothing).
    """
    if x_BCHW.device.type != "cpu" or torch.is_grad_enabled() or not cpu_tuning():
        return x_BCHW
    return x_BCHW.contiguous(memory_format=torch.channels_last)


class ResidualBlock(nn.Module):
    """Two normalized 3x3 convolutions beside a shortcut (1x1 where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(norm_groups, in_channels, eps=NORM_EPS)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm2 = GroupNorm(norm_groups, out_channels, eps=NORM_EPS)
        self.conv2 = conv3x3(out_channels, out_channels)
        same_width = in_channels == out_channels
        self.shortcut = nn.Identity() if same_width else nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv1(silu(self.norm1(x_BCHW)))
        # in place is safe: no norm, convolution or shortcut needs what it has given
        h_BCHW = self.conv2(silu(self.norm2(h_BCHW)))
        return h_BCHW.add_(self.shortcut(x_BCHW))


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions of the map, with a residual connection."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(norm_groups, channels, eps=NORM_EPS)
        self.qkv = nn.Conv2d(channels, 3 * channels, kernel_size=1)
        self.proj = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        qkv_Bn3C = self.qkv(self.norm(x_BCHW)).flatten(2).transpose(1, 2).contiguous()
        q_B1nC, k_B1nC, v_B1nC = qkv_Bn3C.unsqueeze(1).chunk(3, dim=-1)
        out_B1nC = F.scaled_dot_product_attention(q_B1nC, k_B1nC, v_B1nC)
        out_BCHW = out_B1nC.squeeze(1).transpose(1, 2).reshape(x_BCHW.shape)
        return x_BCHW + self.proj(out_BCHW)


class Downsample(nn.Module):
    """Halve the map: stride-2 convolution, padded at the right and bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the map: nearest neighbor, then a convolution.

    Without gradient on a CPU both are computed as four 2x2 convolutions of the small map, one for each corner of a
    doubled pixel: there the 3x3 window covers 2x2 source pixels only. The sums are the same, with 4/9 of the products.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if x_BCHW.device.type == "cpu" and not torch.is_grad_enabled() and cpu_tuning():
            return self._from_small_map(x_BCHW)
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))

    def _from_small_map(self, x_BCHW: Tensor) -> Tensor:
        B, C, H, W = x_BCHW.shape
        large = x_BCHW.new_empty(B, 2 * H, 2 * W, C).permute(0, 3, 1, 2)
        for row in (0, 1):
            for column in (0, 1):
                weight = _pair(_pair(self.conv.weight, 2, row), 3, column)
                # padded on all sides, one row and one column too many: cheaper than copies of the windows
                quarter = F.conv2d(x_BCHW, weight, self.conv.bias, padding=1)
                large[:, :, row::2, column::2] = quarter[:, :, row : row + H, column : column + W]
        return large


def _pair(weight: Tensor, dim: int, corner: int) -> Tensor:
    """Three taps on a doubled map as two on the small one: the second source pixel is met twice, or the first."""
    one, two, three = weight.unbind(dim)
    return torch.stack([one, two + three] if corner == 0 else [one + two, three], dim)


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention at the lowest, then a change of resolution."""

    def __init__(
        self, in_channels: int, channels: int, num_blocks: int, attend: bool, resample: nn.Module, norm_groups: int
    ) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * num_blocks
        self.blocks = nn.ModuleList(ResidualBlock(a, b, norm_groups) for a, b in pairwise(widths))
        self.attentions = nn.ModuleList(
            AttentionBlock(channels, norm_groups) if attend else nn.Identity() for _ in range(num_blocks)
        )
        self.resample = resample

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x_BCHW = attention(block(x_BCHW))
        return self.resample(x_BCHW)


def middle(channels: int, norm_groups: int) -> nn.Sequential:
    """Block, attention, block at the latent's resolution."""
    parts = OrderedDict[str, nn.Module](block1=ResidualBlock(channels, channels, norm_groups))
    parts["attention"] = AttentionBlock(channels, norm_groups)
    parts["block2"] = ResidualBlock(channels, channels, norm_groups)
    return nn.Sequential(parts)


class Encoder(nn.Module):
    """Image (B, 3, HW) -> latent map (B, Z, hw), smaller by 2 ** (levels - 1); level 0 is the finest."""

    def __init__(
        self,
        code_dim: int,
        channels: int,
        channel_multipliers: Sequence[int],
        num_res_blocks: int,
        norm_groups: int,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        widths = level_widths(channels, channel_multipliers, norm_groups)
        last = len(widths) - 1
        self.conv_in = conv3x3(image_channels, channels)
        self.levels = nn.ModuleList()
        for i, (before, width) in enumerate(pairwise([channels, *widths])):
            resample = nn.Identity() if i == last else Downsample(width)
            self.levels.append(Level(before, width, num_res_blocks, i == last, resample, norm_groups))
        self.middle = middle(widths[last], norm_groups)
        self.norm_out = GroupNorm(norm_groups, widths[last], eps=NORM_EPS)
        self.conv_out = conv3x3(widths[last], code_dim)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        x_BCHW = self.conv_in(fast_layout(image_B3HW))
        for level in self.levels:
            x_BCHW = level(x_BCHW)
        # the fast layout stays inside: what comes out lies as it does in training
        return self.conv_out(silu(self.norm_out(self.middle(x_BCHW)))).contiguous()


class Decoder(nn.Module):
    """Latent map (B, Z, hw) -> image (B, 3, HW).

    Level i has the resolution of the encoder's level i (0 the finest), one block more, and runs from the last to 0.
    """

    def __init__(
        self,
        code_dim: int,
        channels: int,
        channel_multipliers: Sequence[int],
        num_res_blocks: int,
        norm_groups: int,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        widths = level_widths(channels, channel_multipliers, norm_groups)
        last = len(widths) - 1
        self.conv_in = conv3x3(code_dim, widths[last])
        self.middle = middle(widths[last], norm_groups)
        self.levels = nn.ModuleList()
        for i, (width, before) in enumerate(pairwise([*widths, widths[last]])):
            resample = nn.Identity() if i == 0 else Upsample(width)
            self.levels.append(Level(before, width, num_res_blocks + 1, i == last, resample, norm_groups))
        self.norm_out = GroupNorm(norm_groups, widths[0], eps=NORM_EPS)
        self.conv_out = conv3x3(widths[0], image_channels)

    def forward(self, latent_BZhw: Tensor) -> Tensor:
        x_BCHW = self.middle(self.conv_in(fast_layout(latent_BZhw)))
        for level in reversed(self.levels):
            x_BCHW = level(x_BCHW)
        return self.conv_out(silu(self.norm_out(x_BCHW))).contiguous()


def level_widths(channels: int, channel_multipliers: Sequence[int], norm_groups: int) -> list[int]:
    """Width of each level. Raises `UserError` where there is none, or ``norm_groups`` does not divide each."""
    if not channel_multipliers or min(channel_multipliers) < 1:
        raise UserError(f"channel_multipliers {list(channel_multipliers)}: give one positive integer a level")
    widths = [channels * multiplier for multiplier in channel_multipliers]
    if channels < 1 or norm_groups < 1 or any(width % norm_groups for width in [channels, *widths]):
        raise UserError(
            f"channels {channels} x {list(channel_multipliers)} with norm_groups {norm_groups}: every width must be a "
            "multiple of norm_groups; choose channels divisible by it or a smaller norm_groups"
        )
    return widths
