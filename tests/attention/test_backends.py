from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from mvar_lightning.attention import (
    AdjacentAttention,
    AttentionStrategy,
    FullAttention,
    KVCache,
    SlidingWindowAttention,
    SpatialAttention,
    choose_backend,
)
from mvar_lightning.attention.backends import (
    NATTEN_FROM,
    AttentionBackend,
    DenseBackend,
    FlexBackend,
    NattenBackend,
    PerScaleBackend,
    _version,
)
from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import ScalePyramid

PYRAMID = ScalePyramid([1, 2, 3, 5, 7])
WIDE = ScalePyramid([1, [1, 3], [2, 4], [2, 7], [5, 8]])


class GroupedAttention(AttentionStrategy):
    """Scales 0 and 1 see each other, 2 stands alone, 3 and 4 see each other: a cache that empties in between."""

    def first_key_scale(self, scale: int, pyramid: ScalePyramid) -> int:
        return (0, 0, 2, 3, 3)[scale]


# a new strategy is one row here
STRATEGIES = [
    FullAttention(),
    AdjacentAttention(),
    SlidingWindowAttention(2),
    SlidingWindowAttention(3),
    GroupedAttention(),
    SpatialAttention(3),
    SpatialAttention([3, 5], scales=[3, 4]),
]
ALL = range(len(PYRAMID))


def qkv(requires_grad: bool = False, pyramid: ScalePyramid = PYRAMID, head_dim: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, pyramid.num_tokens, head_dim)
    return tuple(torch.randn(shape, generator=generator).requires_grad_(requires_grad) for _ in range(3))


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_per_scale_equals_dense_forward_and_backward(strategy: AttentionStrategy) -> None:
    results = []
    for backend in (DenseBackend(strategy, PYRAMID), PerScaleBackend(strategy, PYRAMID)):
        q, k, v = qkv(requires_grad=True)
        out = backend(q, k, v, ALL, 0.7)
        gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
        results.append((out, *gradients))
    for dense, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_maps_that_are_no_squares(strategy: AttentionStrategy) -> None:
    """Kernels of 3 and 5 over maps 2 rows high: the window is both rows. Every backend is the softmax by hand."""
    q, k, v = qkv(requires_grad=True, pyramid=WIDE, head_dim=16)
    scores = (q @ k.transpose(-1, -2) * 0.7).masked_fill(~strategy.mask(WIDE), -torch.inf)
    expected = scores.softmax(-1) @ v
    gradients = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for backend in (DenseBackend(strategy, WIDE), PerScaleBackend(strategy, WIDE)):
        out = backend(q, k, v, ALL, 0.7)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        for mine, right in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), gradients, strict=True):
            torch.testing.assert_close(mine, right, atol=1e-4, rtol=1e-4)
    fused: list[AttentionBackend] = [FlexBackend(strategy, WIDE, forward_only=True)]
    if isinstance(strategy, SpatialAttention) and importlib.util.find_spec("natten") is not None:
        fused.append(NattenBackend(strategy, WIDE, need_kernels=False))
    for backend in fused:
        out = backend(*(t.detach() for t in (q, k, v)), ALL, 0.7)
        torch.testing.assert_close(out, expected.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_dense_equals_softmax_by_hand(strategy: AttentionStrategy) -> None:
    q, k, v = qkv()
    scores = (q @ k.transpose(-1, -2) * 0.7).masked_fill(~strategy.mask(PYRAMID), -torch.inf)
    torch.testing.assert_close(DenseBackend(strategy, PYRAMID)(q, k, v, ALL, 0.7), scores.softmax(-1) @ v)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_flex_forward_equals_dense(strategy: AttentionStrategy) -> None:
    q, k, v = qkv()
    flex = FlexBackend(strategy, PYRAMID, forward_only=True)(q, k, v, ALL, 0.7)
    torch.testing.assert_close(flex, DenseBackend(strategy, PYRAMID)(q, k, v, ALL, 0.7), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("natten") is None, reason="natten is not installed (make natten)")
@pytest.mark.parametrize("strategy", STRATEGIES[-2:], ids=repr)
def test_natten_forward_equals_dense(strategy: AttentionStrategy) -> None:
    generator = torch.Generator().manual_seed(0)
    # FlexAttention inside natten wants head dimensions of at least 16
    q, k, v = (torch.randn(1, 2, PYRAMID.num_tokens, 32, generator=generator) for _ in range(3))
    natten = NattenBackend(strategy, PYRAMID, need_kernels=False)(q, k, v, ALL, 0.7)
    torch.testing.assert_close(natten, DenseBackend(strategy, PYRAMID)(q, k, v, ALL, 0.7), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["dense", "per_scale"])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_scale_by_scale_with_a_cache_equals_all_at_once(strategy: AttentionStrategy, name: str) -> None:
    q, k, v = qkv()
    backend = choose_backend(name, strategy, PYRAMID)
    cache = KVCache(
        backend.plan, layers=1, batch=2, heads=3, head_dim=8, device=torch.device("cpu"), dtype=torch.float32
    )
    steps = []
    for scale in ALL:
        own = PYRAMID.slice_of(scale)
        keys, values = cache.layers[0].extend(k[:, :, own], v[:, :, own], scale)
        cache.advance(scale)
        steps.append(backend(q[:, :, own], keys, values, range(scale, scale + 1), 0.7))
    torch.testing.assert_close(torch.cat(steps, dim=2), backend(q, k, v, ALL, 0.7), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("strategy", [AdjacentAttention(), SpatialAttention(3)], ids=repr)
def test_a_group_of_scales_stands_alone(strategy: AttentionStrategy) -> None:
    q, k, v = qkv()
    backend = PerScaleBackend(strategy, PYRAMID)
    group = PYRAMID.span(range(2, 4))
    alone = backend(q[:, :, group], k[:, :, group], v[:, :, group], range(2, 4), 0.7)
    torch.testing.assert_close(alone, backend(q, k, v, ALL, 0.7)[:, :, group])


def test_masks_made_in_inference_mode_can_train() -> None:
    strategy = SpatialAttention(3, scales=[3, 4])
    for backend in (DenseBackend(strategy, PYRAMID), PerScaleBackend(strategy, PYRAMID)):
        with torch.inference_mode():
            backend(*qkv(), ALL, 1.0)
        q, k, v = qkv(requires_grad=True)
        backend(q, k, v, ALL, 1.0).sum().backward()
        assert q.grad is not None


def test_auto_picks_a_backend_that_runs_here() -> None:
    expected = "natten" if torch.cuda.is_available() and importlib.util.find_spec("natten") else "per_scale"
    assert choose_backend("auto", FullAttention(), PYRAMID).name == "per_scale"
    assert choose_backend("auto", SpatialAttention(3), PYRAMID).name in {expected, "per_scale"}


@pytest.mark.parametrize(
    ("name", "strategy", "words"),
    [
        ("fastest", FullAttention(), "choose auto, dense"),
        ("natten", FullAttention(), "no neighborhood"),
        ("per_scale", SpatialAttention(9), "larger than every map"),
    ],
)
def test_backends_refuse_at_construction(name: str, strategy: AttentionStrategy, words: str) -> None:
    with pytest.raises(UserError, match=words):
        choose_backend(name, strategy, PYRAMID)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_flex_and_natten_say_why_not_on_a_cpu() -> None:
    with pytest.raises(UserError, match="no backward on a CPU"):
        choose_backend("flex", FullAttention(), PYRAMID)
    with pytest.raises(UserError, match="natten"):
        choose_backend("natten", SpatialAttention(3), PYRAMID)


def with_gradients(backend: AttentionBackend, *inputs: Tensor) -> tuple[Tensor, ...]:
    q, k, v, weight = inputs
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out = backend(*leaves, ALL, 0.125)
    return out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)


def against_float64(name: str, strategy: AttentionStrategy, dtype: torch.dtype, device: str) -> list[float]:
    """Relative errors of output, dq, dk and dv."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 2, PYRAMID.num_tokens, 64)
    exact = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).double() for _ in range(4)]
    right = with_gradients(DenseBackend(strategy, PYRAMID), *exact)
    ours = with_gradients(choose_backend(name, strategy, PYRAMID, 64), *(t.to(device, dtype) for t in exact))
    return [float((a.double().cpu() - b).norm() / b.norm()) for a, b in zip(ours, right, strict=True)]


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("name", ["dense", "per_scale"])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_gradients_are_those_of_float64(
    strategy: AttentionStrategy, name: str, dtype: torch.dtype, most: float
) -> None:
    assert max(against_float64(name, strategy, dtype, "cpu")) < most


def test_gradients_of_keys_add_up_in_float32() -> None:
    """A coarse key has one from every later scale; rounded at each sum they would be off by 0.4%."""
    errors = against_float64("per_scale", FullAttention(), torch.bfloat16, "cpu")
    assert max(errors) < 4e-3, errors


def test_versions_of_natten_are_read() -> None:
    assert _version("0.21.6+torch2110cu130") == NATTEN_FROM < _version("0.21.7") < _version("1.0.dev3")
    assert _version("0.21.5") < NATTEN_FROM


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dense", "per_scale", "flex", "natten"])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_bf16_on_a_gpu_is_close_to_float64(strategy: AttentionStrategy, name: str) -> None:
    try:
        choose_backend(name, strategy, PYRAMID, 64)
    except UserError as error:
        pytest.skip(str(error))
    assert max(against_float64(name, strategy, torch.bfloat16, "cuda")) < 3e-2
