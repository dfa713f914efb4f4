"""The 3x3 convolution in its form with fewer products is the plain one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mvar_lightning.tokenizer import autoencoder as convolution
from mvar_lightning.tokenizer.autoencoder import Conv3x3, filtered


def plain(layer: nn.Conv2d, x_BCHW: Tensor) -> Tensor:
    return nn.functional.conv2d(x_BCHW.double(), layer.weight.double(), layer.bias.double(), padding=1)


@pytest.mark.parametrize("band", [1, 24 * 2 * 8 * 2, convolution.BAND])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(5, 8), (1, 2), (4, 32)])
def test_fewer_products_give_the_same_numbers(
    size: tuple[int, int], layout: torch.memory_format, band: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "BAND", band)
    torch.manual_seed(0)
    layer, x = Conv3x3(24, 8), torch.randn(2, 24, *size).contiguous(memory_format=layout)
    before = x.clone()
    with torch.no_grad():
        result = filtered(x, layer.weight, layer.bias)
    torch.testing.assert_close(result.double(), plain(layer, x), rtol=0, atol=3e-6)
    assert torch.equal(x, before), "the input is somebody else's, too"


def test_taken_where_it_pays_and_only_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, ...]] = []
    monkeypatch.setattr(convolution, "filtered", lambda x, *rest: taken.append(tuple(x.shape)) or filtered(x, *rest))
    layer, x = Conv3x3(256, 4), torch.randn(1, 256, 4, 32)
    layer(x).sum().backward()
    with torch.no_grad():
        layer(x[..., :31])
        layer(x[..., :16])
        Conv3x3(8, 4)(x[:, :8])
        assert layer(x[:0]).shape == (0, 4, 4, 32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x)
        assert not taken
        torch.testing.assert_close(layer(x).double(), plain(layer, x), rtol=0, atol=5e-6)
    assert taken == [(1, 256, 4, 32)]
