"""3x3 convolutions: torch's own, and without gradient on CPUs a form with two thirds of the products.

The one-dimensional minimal filtering F(2, 3) of Winograd (1980; Lavin and Gray, arXiv 1509.09308, section 4.1), along
the rows: two neighboring results of a filter with three taps need four products of sums of the inputs, not six. A 3x3
convolution becomes four 3x1 convolutions of maps of half the width. It adds only sums of two, and its rounding is no
larger than the direct form's. It pays where a map is large and its products outweigh the passes over it.

B batch, C channels, HW pixels, O output channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
