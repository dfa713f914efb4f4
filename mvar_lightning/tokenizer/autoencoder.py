"""Convolutional encoder and decoder of the tokenizer: image <-> latent map.

The architecture is the f16 autoencoder of taming-transformers in the form that VAR uses (``models/basic_vae.py`` of the
reference): residual blocks with group normalization, one halving of the map per level, attention at the lowest level
and in the middle.

Shapes: B batch, C width, Z code dim, HW pixels, hw latent map; n tokens of an attention map.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar_lightning.errors import UserError

# Normalization that mixed precision leaves in float32.
#
# Shapes: B batch, C channels, any positions after them.


class GroupNorm(nn.GroupNorm):
    """Group normalization in the precision of its parameters, whatever autocast says.

    On a GPU autocast keeps group norms in float32 itself; on a CPU they compute in what they are given, and a
    convolution before them gives bfloat16.
    """

    def forward(self, x_BC: Tensor) -> Tensor:
        return super().forward(x_BC.to(self.weight.dtype))


# 3x3 convolutions: torch's own, and without gradient on CPUs a form with two thirds of the products.
#
# The one-dimensional minimal filtering F(2, 3) of Winograd (1980; Lavin and Gray, arXiv 1509.09308, section 4.1),
# along the rows: two neighboring results of a filter with three taps need four products of sums of the inputs, not
# six. A 3x3 convolution becomes four 3x1 convolutions of maps of half the width. It adds only sums of two, and its
# rounding is no larger than the direct form's. It pays where a map is large and its products outweigh the passes over
# it.
#
# B batch, C channels, HW pixels, O output channels.


LEAST_CHANNELS, LEAST_WIDTH = 128, 32
BAND = 5 * 2**19
"""Numbers of the map that are worked on at a time: what is made of them stays in a cache of some ten MiB."""


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that keeps the map's size."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        assert self.bias is not None
        return filtered(x_BCHW, self.weight, self.bias) if _pays(x_BCHW) else super().forward(x_BCHW)


def filtered(x_BCHW: Tensor, weight_OC33: Tensor, bias_O: Tensor) -> Tensor:
    """The convolution in the form with fewer products; W must be even."""
    B, C, H, W = x_BCHW.shape
    filters_OC31 = _filters(weight_OC33)
    result = x_BCHW.new_empty(B, H, W, len(bias_O)).permute(0, 3, 1, 2)  # channels last
    rows = max(1, BAND // (B * C * W))
    for top in range(0, H, rows):
        band = slice(top, min(top + rows, H))
        reach = slice(max(band.start - 1, 0), band.stop + 1)  # a row more at each side, where there is one
        own = slice(band.start - reach.start, band.stop - reach.start)
        sums = _sums(x_BCHW[:, :, reach])
        products = (F.conv2d(part, taps, padding=(1, 0)) for part, taps in zip(sums, filters_OC31, strict=True))
        first, second, third, fourth = (product[:, :, own] for product in products)
        torch.add(first.add_(second), third, out=result[:, :, band, 0::2])
        torch.sub(second.sub_(third), fourth, out=result[:, :, band, 1::2])
        result[:, :, band].add_(bias_O[:, None, None])
    return result


def _filters(weight_OC33: Tensor) -> tuple[Tensor, ...]:
    """g1, (g1 + g2 + g3) / 2, (g1 - g2 + g3) / 2, g3 of the taps along a row, each (O, C, 3, 1)."""
    one, two, three = weight_OC33.unbind(3)
    outer = one + three
    return tuple(taps.unsqueeze(3) for taps in (one, (outer + two) / 2, (outer - two) / 2, three))


def _sums(x_BCHW: Tensor) -> tuple[Tensor, ...]:
    """d1 - d3, d2 + d3, d3 - d2, d2 - d4 of the four columns under each pair of results; beyond the map are zeros."""
    even, odd = x_BCHW[..., 0::2], x_BCHW[..., 1::2]
    left, right = odd.neg(), even.clone(memory_format=torch.channels_last)
    left[..., 1:] += odd[..., :-1]
    right[..., :-1] -= even[..., 1:]
    return left, even + odd, odd - even, right


def _pays(x_BCHW: Tensor) -> bool:
    _, C, _, W = x_BCHW.shape
    return (
        C >= LEAST_CHANNELS
        and W >= LEAST_WIDTH
        and x_BCHW.numel() > 0
        and W % 2 == 0
        and x_BCHW.device.type == "cpu"
        and x_BCHW.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


NORM_EPS = 1e-6


def silu(x: Tensor) -> Tensor:
    """SiLU of a tensor that nobody else needs: in place where no gradient is asked for."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def fast_layout(x_BCHW: Tensor) -> Tensor:
    """The map in the memory layout that this device convolves fastest: on CPUs channels last.

    In training the layout stays as it comes (the gradients' convolutions gain nothing).
    """
    if x_BCHW.device.type != "cpu" or torch.is_grad_enabled():
        return x_BCHW
    return x_BCHW.contiguous(memory_format=torch.channels_last)


class ResidualBlock(nn.Module):
    """Two normalized 3x3 convolutions beside a shortcut (1x1 where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(norm_groups, in_channels, eps=NORM_EPS)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.norm2 = GroupNorm(norm_groups, out_channels, eps=NORM_EPS)
        self.conv2 = Conv3x3(out_channels, out_channels)
        same_width = in_channels == out_channels
        self.shortcut = nn.Identity() if same_width else nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv1(silu(self.norm1(x_BCHW)))
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

    Without gradient on a CPU both are computed as four 2x2 convolutions of the small map, one for each place inside
    a doubled pixel: there the 3x3 window covers 2x2 source pixels only. The sums are the same, with 4/9 of the
    products.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if x_BCHW.device.type == "cpu" and not torch.is_grad_enabled():
            return self._from_small_map(x_BCHW)
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))

    def _from_small_map(self, x_BCHW: Tensor) -> Tensor:
        B, C, H, W = x_BCHW.shape
        large = x_BCHW.new_empty(B, 2 * H, 2 * W, C).permute(0, 3, 1, 2)
        for row in (0, 1):
            for column in (0, 1):
                weight = _pair(_pair(self.conv.weight, 2, row), 3, column)
                # padded on all sides, one row and one column too many: cheaper than copies of the windows
                place = F.conv2d(x_BCHW, weight, self.conv.bias, padding=1)
                large[:, :, row::2, column::2] = place[:, :, row : row + H, column : column + W]
        return large


def _pair(weight: Tensor, dim: int, place: int) -> Tensor:
    """Three taps on a doubled map as two on the small one: the second source pixel is met twice, or the first."""
    one, two, three = weight.unbind(dim)
    return torch.stack([one, two + three] if place == 0 else [one + two, three], dim)


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


class Middle(nn.Module):
    """Block, attention, block at the latent's resolution."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.block1 = ResidualBlock(channels, channels, norm_groups)
        self.attention = AttentionBlock(channels, norm_groups)
        self.block2 = ResidualBlock(channels, channels, norm_groups)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.block2(self.attention(self.block1(x_BCHW)))


class Encoder(nn.Module):
    """Image (B, 3, HW) -> latent map (B, Z, hw), smaller by 2 ** (levels - 1); level 0 is the finest."""

    def __init__(
        self,
        code_dim: int,
        channels: int,
        channel_multipliers: Sequence[int],
        num_res_blocks: int,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        widths = level_widths(channels, channel_multipliers, norm_groups)
        last = len(widths) - 1
        self.conv_in = Conv3x3(3, channels)
        self.levels = nn.ModuleList(
            Level(
                in_channels=before,
                channels=width,
                num_blocks=num_res_blocks,
                attend=i == last,
                resample=nn.Identity() if i == last else Downsample(width),
                norm_groups=norm_groups,
            )
            for i, (before, width) in enumerate(pairwise([channels, *widths]))
        )
        self.middle = Middle(widths[last], norm_groups)
        self.norm_out = GroupNorm(norm_groups, widths[last], eps=NORM_EPS)
        self.conv_out = Conv3x3(widths[last], code_dim)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        x_BCHW = self.conv_in(fast_layout(image_B3HW))
        for level in self.levels:
            x_BCHW = level(x_BCHW)
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
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        widths = level_widths(channels, channel_multipliers, norm_groups)
        last = len(widths) - 1
        self.conv_in = Conv3x3(code_dim, widths[last])
        self.middle = Middle(widths[last], norm_groups)
        self.levels = nn.ModuleList(
            Level(
                in_channels=before,
                channels=width,
                num_blocks=num_res_blocks + 1,
                attend=i == last,
                resample=nn.Identity() if i == 0 else Upsample(width),
                norm_groups=norm_groups,
            )
            for i, (width, before) in enumerate(pairwise([*widths, widths[last]]))
        )
        self.norm_out = GroupNorm(norm_groups, widths[0], eps=NORM_EPS)
        self.conv_out = Conv3x3(widths[0], 3)

    def forward(self, latent_BZhw: Tensor) -> Tensor:
        x_BCHW = self.middle(self.conv_in(fast_layout(latent_BZhw)))
        for level in reversed(self.levels):
            x_BCHW = level(x_BCHW)
        return self.conv_out(silu(self.norm_out(x_BCHW))).contiguous()


def level_widths(channels: int, channel_multipliers: Sequence[int], norm_groups: int) -> list[int]:
    """Width of each level; every width that is normalized must be a multiple of ``norm_groups``.

    Raises:
        UserError: no level, a multiplier below 1, or a width that ``norm_groups`` does not divide.
    """
    if not channel_multipliers or min(channel_multipliers) < 1:
        raise UserError(f"channel_multipliers {list(channel_multipliers)}: give one positive integer a level")
    widths = [channels * multiplier for multiplier in channel_multipliers]
    if channels < 1 or norm_groups < 1 or any(width % norm_groups for width in [channels, *widths]):
        raise UserError(
            f"channels {channels} x {list(channel_multipliers)} with norm_groups {norm_groups}: every width must be a "
            "multiple of norm_groups; choose channels divisible by it or a smaller norm_groups"
        )
    return widths
