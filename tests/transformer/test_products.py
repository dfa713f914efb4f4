from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mvar_lightning.tokenizer.autoencoder import Upsample, fast_layout
from mvar_lightning.tools.compute import keep_freed_memory
from mvar_lightning.transformer import linear as products
from mvar_lightning.transformer.linear import Linear, activated_linear, linear, multiplied_linear


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Small products go to oneDNN too; shapes of the inputs that did."""
    shapes: list[tuple[int, ...]] = []
    product = products._product

    def watched(x: Tensor, *arguments: Any) -> Tensor:
        shapes.append(tuple(x.shape))
        return product(x, *arguments)

    monkeypatch.setattr(products, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(products, "_mkl_at_peak", lambda: False)
    monkeypatch.setattr(products, "_product", watched)
    return shapes


@pytest.mark.parametrize("shape", [(3, 12), (2, 5, 12), (1, 1, 12)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_those_of_torch(
    shape: tuple[int, ...], with_bias: bool, called: list[tuple[int, ...]]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    weight, bias = torch.randn(20, 12, requires_grad=True), torch.randn(20, requires_grad=True)
    inputs = (x, weight, bias) if with_bias else (x, weight)
    upstream = torch.randn(*shape[:-1], 20)
    expected = F.linear(*inputs)
    with torch.no_grad():
        torch.testing.assert_close(linear(*inputs), expected.detach())
    assert called.pop() == shape and not called, "the product did not go to oneDNN"
    found = linear(*inputs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    )
    assert not called, "gradients are torch's"


def test_transposed_factors(called: list[tuple[int, ...]]) -> None:
    x, weight = torch.randn(12, 7), torch.randn(12, 20)
    with torch.no_grad():
        torch.testing.assert_close(linear(x.t(), weight.t()), F.linear(x.t(), weight.t()))
    assert called


@pytest.mark.parametrize(
    ("activation", "function"),
    [("gelu", lambda x: F.gelu(x, approximate="tanh")), ("swish", F.silu)],
)
@pytest.mark.parametrize("gradient", [True, False])
def test_appended_activation(
    activation: Any, function: Callable[[Tensor], Tensor], gradient: bool, called: list[tuple[int, ...]]
) -> None:
    layer, x = Linear(12, 20), torch.randn(2, 5, 12)
    factor = torch.randn(2, 5, 20)
    with torch.set_grad_enabled(gradient):
        expected = function(F.linear(x, layer.weight, layer.bias))
        torch.testing.assert_close(activated_linear(layer, x, activation), expected)
        product = multiplied_linear(layer, x, factor)
    torch.testing.assert_close(product, F.linear(x, layer.weight, layer.bias) * factor)
    assert product.requires_grad == gradient and bool(called) != gradient


@torch.no_grad()
def test_other_tensors_stay_with_torch(called: list[tuple[int, ...]]) -> None:
    layer = Linear(12, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(3, 12)).dtype == torch.bfloat16
    assert layer.double()(torch.randn(3, 12, dtype=torch.float64)).dtype == torch.float64
    assert layer.float()(torch.randn(0, 12)).shape == (0, 20)
    assert Linear(12, 20, device="meta")(torch.randn(3, 12, device="meta")).is_meta
    assert not called


def test_one_switch_leaves_all_to_torch(called: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MVAR_CPU_TUNING", "0")
    layer, upsample, map_BCHW = Linear(12, 20), Upsample(4), torch.randn(1, 4, 6, 6)
    monkeypatch.setattr(upsample, "_from_small_map", lambda *_: pytest.fail("the decoder is tuned"))
    with torch.no_grad():
        layer(torch.randn(3, 12))
        upsample(map_BCHW)
    assert not called and fast_layout(map_BCHW) is map_BCHW and not keep_freed_memory()


def test_small_products_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_product", lambda *_: pytest.fail("a small product went to oneDNN"))
    layer = Linear(12, 20)
    with torch.no_grad():
        layer(torch.randn(3, 12))


def test_where_mkl_is_at_its_best_it_takes_many_rows(
    called: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_mkl_at_peak", lambda: True)
    monkeypatch.setattr(products, "MKL_ROWS", 8)
    layer = Linear(12, 20)
    with torch.no_grad():
        layer(torch.randn(3, 3, 12))
        assert not called
        layer(torch.randn(2, 4, 12))
        assert called == [(2, 4, 12)]
        activated_linear(layer, torch.randn(3, 3, 12), "gelu")  # what is appended is worth more
        assert called[1:] == [(3, 3, 12)]


def test_a_compiler_sees_torchs_own_product(called: list[tuple[int, ...]]) -> None:
    layer, x = Linear(12, 20), torch.randn(3, 12)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), F.linear(x, layer.weight, layer.bias))
    assert not called
