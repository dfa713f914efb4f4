from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mvar_lightning.attention import AdjacentAttention, SpatialAttention
from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import PUBLISHED_SIDES, ScalePyramid
from mvar_lightning.transformer import (
    GlobalHistory,
    LlamaBlocks,
    MixedHistory,
    NextScaleTransformer,
    SlidingWindowHistory,
    VARBlocks,
)
from mvar_lightning.transformer.history import AttentivePool
from mvar_lightning.transformer.positions import PyramidRotation

SCALES = [1, 2, 3]
SIZES = dict(vocab_size=16, code_dim=4, num_classes=5, depth=2, width=128, heads=2)


def randomized(**kwargs) -> NextScaleTransformer:
    """A model whose gates are open: at the published initialization blocks contribute almost nothing."""
    model = NextScaleTransformer(SCALES, **{**SIZES, **kwargs})
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


@pytest.mark.parametrize(("depth", "millions"), [(16, 310), (20, 601), (24, 1033), (30, 2010)])
def test_published_parameter_counts(depth: int, millions: int) -> None:
    with torch.device("meta"):
        model = NextScaleTransformer(PUBLISHED_SIDES[256], vocab_size=4096, code_dim=32, num_classes=1000, depth=depth)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_published_parameter_counts_of_the_other_forms() -> None:
    with torch.device("meta"):
        shared = NextScaleTransformer(
            PUBLISHED_SIDES[512],
            vocab_size=4096,
            code_dim=32,
            num_classes=1000,
            depth=36,
            blocks=VARBlocks(shared_adaln=True),
        )
        markov = NextScaleTransformer(
            PUBLISHED_SIDES[256],
            vocab_size=4096,
            code_dim=32,
            num_classes=1000,
            depth=16,
            attention=AdjacentAttention(),
            history=SlidingWindowHistory(3),
            blocks=LlamaBlocks(),
        )
    assert round(sum(p.numel() for p in shared.parameters()) / 1e7) == 235
    assert round(sum(p.numel() for p in markov.parameters()) / 1e6) == 320


@pytest.mark.parametrize("learned", [False, True])
def test_inputs_that_are_alike_tell_no_place_without_learned_positions(learned: bool) -> None:
    blocks = LlamaBlocks(learned_positions=learned)
    model = randomized(blocks=blocks, attention=AdjacentAttention()).eval()
    logits_BLV = model(torch.ones(1, 13, 4), torch.tensor([0])).detach()
    for places in (logits_BLV[:, 1:5], logits_BLV[:, 5:]):
        assert torch.allclose(places, places[:, :1].expand_as(places), atol=1e-4) != learned


def test_labels_are_dropped_in_training_only() -> None:
    model = randomized(label_drop=1.0, drop_path=0.0)
    x, label = torch.randn(2, 13, 4), torch.tensor([1, 2])
    nobody = torch.tensor([5, 5])
    evaluated, unconditional = model.eval()(x, label), model(x, nobody)
    assert not torch.allclose(evaluated, unconditional)
    torch.testing.assert_close(model.train()(x, label), unconditional)


def test_no_scale_sees_a_later_one() -> None:
    model = randomized().eval()
    x, label = torch.randn(1, 13, 4), torch.tensor([1])
    changed = x.clone()
    changed[:, -9:] += 1.0
    before, after = model(x, label), model(changed, label)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_scales_of_a_markov_step_stand_alone() -> None:
    model = randomized(attention=AdjacentAttention()).eval()
    inputs = model.inputs(torch.randn(2, 13, 4), torch.tensor([1, 2]))
    whole = model.transform(inputs, range(3))
    alone = model.transform(replace(inputs, x_BlC=inputs.x_BlC[:, 5:]), range(2, 3))
    torch.testing.assert_close(alone, whole[:, 5:])


def test_activation_checkpointing_changes_no_gradient() -> None:
    x, label = torch.randn(2, 13, 4), torch.tensor([1, 2])
    gradients = []
    for flag in (False, True):
        model = randomized(checkpoint_activations=flag, label_drop=0.0, drop_path=0.0).train()
        model(x, label).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("history", [SlidingWindowHistory(2, queries=3), GlobalHistory(), MixedHistory(2)], ids=repr)
def test_config_round_trip(history) -> None:
    model = randomized(history=history, blocks=LlamaBlocks(rope_theta=100.0), attention=SpatialAttention(3))
    again = NextScaleTransformer.from_config(model.config)
    again.load_state_dict(model.state_dict())
    assert again.config == model.config
    x, label = torch.randn(1, 13, 4), torch.tensor([3])
    torch.testing.assert_close(again.eval()(x, label), model.eval()(x, label))


def test_a_window_forgets_and_global_history_does_not() -> None:
    label = torch.tensor([1])
    x = torch.randn(1, 13, 4)
    changed = x.clone()
    changed[:, :4] += 1.0  # the input of scale 1
    last = slice(5, 14)
    remembering = {SlidingWindowHistory(1): False, SlidingWindowHistory(2): True, GlobalHistory(): True}
    for history, remembers in remembering.items():
        model = randomized(history=history, attention=AdjacentAttention()).eval()
        same = torch.allclose(model(x, label)[:, last], model(changed, label)[:, last])
        assert same != remembers, history


def test_attentive_pool_is_cross_attention() -> None:
    torch.manual_seed(0)
    pool = AttentivePool(256, queries=2)
    torch.nn.init.normal_(pool.query)
    torch.nn.init.normal_(pool.v_bias)
    x = torch.randn(3, 7, 256)
    key, value = pool.kv(x).split(256, dim=-1)
    value = value + pool.v_bias
    q = pool.query.transpose(0, 1)[None].expand(3, -1, -1, -1)
    split = lambda t: t.unflatten(-1, (2, 128)).transpose(1, 2)  # noqa: E731
    expected = torch.nn.functional.scaled_dot_product_attention(q, split(key), split(value))
    torch.testing.assert_close(pool([pool.observe(x)]), pool.proj(expected.transpose(1, 2).flatten(2)))


def test_rotation_within_an_axis_depends_on_offsets_alone() -> None:
    pyramid = ScalePyramid([4])
    q, k = torch.randn(16), torch.randn(16)

    def scores(pair_within_axis: bool) -> torch.Tensor:
        rotate = PyramidRotation(pyramid, theta=100.0, pair_within_axis=pair_within_axis)
        every_q = rotate(q.expand(1, 16, 1, 1, 16), range(1))[0, :, 0, 0]
        every_k = rotate(k.expand(1, 16, 1, 1, 16), range(1))[0, :, 0, 0]
        return (every_q @ every_k.T).view(4, 4, 4, 4)  # qy qx ky kx

    proper, released = scores(True), scores(False)
    torch.testing.assert_close(proper[0, 1, 1, 2], proper[2, 0, 3, 1])
    assert not torch.isclose(released[0, 1, 1, 2], released[2, 0, 3, 1])


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (dict(width=130, heads=4), "multiple of 4"),
        (dict(depth=0, width=None, heads=None), "depth 0"),
        (dict(attention=SpatialAttention(7)), "larger than every map"),
        (dict(history=SlidingWindowHistory(), width=388, heads=1), "history"),
        (dict(backend="quick"), "choose auto"),
    ],
)
def test_bad_sizes_are_named(kwargs, words: str) -> None:
    with pytest.raises(UserError, match=words):
        NextScaleTransformer(SCALES, **{**SIZES, **kwargs})


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize(
    ("labels", "words"),
    [([0, -1], "label -1: "), ([0, 100], "label 100: "), ([0], r"labels of shape \(1,\): 2 teacher inputs")],
)
def test_labels_out_of_range_are_refused(labels: list[int], words: str, mode: bool) -> None:
    with pytest.raises(UserError, match=words):
        randomized().train(mode)(torch.randn(2, 13, 4), torch.tensor(labels))


def test_teacher_input_of_another_shape_is_refused() -> None:
    with pytest.raises(UserError, match=r"\(B, 13, 4\)"):
        randomized()(torch.randn(2, 14, 4), torch.tensor([0, 1]))
