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

LEAST_CHANNELS, LEAST_WIDTH = 256, 32


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that keeps the map's size."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        assert self.bias is not None
        return filtered(x_BCHW, self.weight, self.bias) if _pays(x_BCHW) else super().forward(x_BCHW)


def filtered(x_BCHW: Tensor, weight_OC33: Tensor, bias_O: Tensor) -> Tensor:
    """The convolution in the form with fewer products; W must be even."""
    even, odd = x_BCHW[..., 0::2], x_BCHW[..., 1::2]
    left, right = odd.neg(), even.clone(memory_format=torch.channels_last)
    left[..., 1:] += odd[..., :-1]
    right[..., :-1] -= even[..., 1:]
    one, two, three = weight_OC33.unbind(3)
    outer, sums = one + three, (left, even + odd, odd - even, right)
    filters = (one, (outer + two) / 2, (outer - two) / 2, three)
    first, second, third, fourth = (
        F.conv2d(part, taps.unsqueeze(3), padding=(1, 0)) for part, taps in zip(sums, filters, strict=True)
    )
    B, _, H, W = x_BCHW.shape
    result = x_BCHW.new_empty(B, H, W, len(bias_O)).permute(0, 3, 1, 2)  # channels last
    torch.add(first.add_(second), third, out=result[..., 0::2])
    torch.sub(second.sub_(third), fourth, out=result[..., 1::2])
    return result.add_(bias_O[:, None, None])


def _pays(x_BCHW: Tensor) -> bool:
    _, C, _, W = x_BCHW.shape
    return (
        C >= LEAST_CHANNELS
        and W >= LEAST_WIDTH
        and W % 2 == 0
        and x_BCHW.device.type == "cpu"
        and x_BCHW.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )
