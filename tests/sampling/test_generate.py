"""Sampling from caches equals teacher forcing, and an image depends on its label and seed alone."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mvar_lightning import (
    AdjacentAttention,
    FullAttention,
    GlobalHistory,
    LlamaBlocks,
    MixedHistory,
    MultiScaleTokenizer,
    NextScaleTransformer,
    SlidingWindowAttention,
    SlidingWindowHistory,
    SpatialAttention,
    VARBlocks,
)
from mvar_lightning.errors import UserError
from mvar_lightning.sampling import ConstantGuidance, ImageNoise, SamplingSettings, generate, sample_pyramid

MakeModel = Callable[..., NextScaleTransformer]

STRATEGIES = (FullAttention(), AdjacentAttention(), SlidingWindowAttention(2), SpatialAttention(3))
HISTORIES = (None, SlidingWindowHistory(2), GlobalHistory(queries=2), MixedHistory(2, queries=3))
SMALL: dict[str, Any] = {"channels": 8, "channel_multipliers": (1, 1), "num_res_blocks": 1, "norm_groups": 4}
BLOCKS = (VARBlocks(), VARBlocks(shared_adaln=True), LlamaBlocks())


@pytest.mark.parametrize(
    ("attention", "history", "blocks"),
    list(itertools.product(STRATEGIES, HISTORIES, BLOCKS)),
    ids=lambda axis: repr(axis),
)
def test_sampling_equals_teacher_forcing(
    attention: Any, history: Any, blocks: Any, make_model: MakeModel, tokenizer: MultiScaleTokenizer
) -> None:
    check_logits_of_sampling(make_model(attention=attention, history=history, blocks=blocks), tokenizer)


def check_logits_of_sampling(model: NextScaleTransformer, tokenizer: MultiScaleTokenizer) -> None:
    label_B, nobody_B, t = torch.tensor([0, 4]), torch.tensor([5, 5]), 0.5
    seen: list[Tensor] = []
    settings = SamplingSettings(ConstantGuidance(t), top_k=20, top_p=0.9)
    noise = ImageNoise([7, 8], model.pyramid, torch.device("cpu"))
    _, idx_BL = sample_pyramid(
        model, tokenizer, label_B, settings, noise, observe=lambda _, logits_BlV: seen.append(logits_BlV.clone())
    )
    x_BLZ = tokenizer.teacher_input(idx_BL)
    with torch.no_grad():
        expected_BLV = (1 + t) * model(x_BLZ, label_B) - t * model(x_BLZ, nobody_B)
    torch.testing.assert_close(torch.cat(seen, dim=1), expected_BLV, atol=2e-4, rtol=1e-4)
    assert expected_BLV.std() > 0.1 and (idx_BL[0] != idx_BL[1]).any()


@pytest.mark.parametrize("blocks", BLOCKS[::2], ids=repr)
@pytest.mark.parametrize("attention", STRATEGIES, ids=repr)
def test_wide_images_are_sampled_as_trained(attention: Any, blocks: Any, make_model: MakeModel) -> None:
    """Rectangular maps: every strategy with either kind of positions, and a history."""
    scales = [1, [1, 2], [2, 3], [3, 6]]
    torch.manual_seed(0)
    tokenizer = MultiScaleTokenizer(scales, vocab_size=48, code_dim=8, codebook_std=1.0, **SMALL).eval()
    model = make_model(scales=scales, attention=attention, history=SlidingWindowHistory(2), blocks=blocks)
    check_logits_of_sampling(model, tokenizer)
    images, _ = generate(model, tokenizer, [0, 4])
    assert images.shape == (2, 3, 6, 12) and tokenizer.image_size == (6, 12)


def test_greedy_is_the_argmax_of_teacher_forcing(model: NextScaleTransformer, tokenizer: MultiScaleTokenizer) -> None:
    label_B = torch.tensor([2, 1])
    images, idx_BL = generate(model, tokenizer, label_B, cfg=None, top_k=1)
    with torch.no_grad():
        logits_BLV = model(tokenizer.teacher_input(idx_BL), label_B)
        expected = tokenizer.decode(idx_BL).add(1).div(2)
    assert torch.equal(logits_BLV.argmax(-1), idx_BL)
    torch.testing.assert_close(images, expected)
    assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1


@pytest.mark.parametrize("more_smooth", [False, True])
def test_an_image_depends_on_its_label_and_seed_alone(
    more_smooth: bool, model: NextScaleTransformer, tokenizer: MultiScaleTokenizer
) -> None:
    labels, seeds = [0, 3, 3, -1], [11, 2**32 - 1, 5, 0]
    images, idx_BL = generate(model, tokenizer, labels, seeds=seeds, more_smooth=more_smooth)
    assert len({tuple(row.tolist()) for row in idx_BL}) == 4
    for order in ([2], [3, 1, 0], [1, 2]):
        some_labels, some_seeds = [labels[i] for i in order], torch.tensor([seeds[i] for i in order])
        again, again_BL = generate(model, tokenizer, some_labels, seeds=some_seeds, more_smooth=more_smooth)
        assert torch.equal(again_BL, idx_BL[order])
        torch.testing.assert_close(again, images[order], atol=1e-4, rtol=0)


def test_one_label_for_several_seeds(model: NextScaleTransformer, tokenizer: MultiScaleTokenizer) -> None:
    _, idx_BL = generate(model, tokenizer, 3, seeds=range(3))
    _, expected_BL = generate(model, tokenizer, torch.tensor([3, 3, 3]), seeds=[0, 1, 2])
    assert torch.equal(idx_BL, expected_BL)


def test_fresh_seeds_follow_the_global_generator(model: NextScaleTransformer, tokenizer: MultiScaleTokenizer) -> None:
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(generate(model, tokenizer, [0, 0])[1])
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0][0], runs[0][1])


def test_no_class_is_minus_one_or_the_last_index(model: NextScaleTransformer, tokenizer: MultiScaleTokenizer) -> None:
    idx_BL = [generate(model, tokenizer, label, cfg=3.0, seeds=[4])[1] for label in (-1, 5)]
    assert torch.equal(*idx_BL)


def test_more_smooth_feeds_mixtures_and_temperature_matters(
    model: NextScaleTransformer, tokenizer: MultiScaleTokenizer
) -> None:
    plain, plain_BL = generate(model, tokenizer, [1], seeds=[0])
    smooth, _ = generate(model, tokenizer, [1], seeds=[0], more_smooth=True)
    hot_BL = generate(model, tokenizer, [1], seeds=[0], temperature=3.0)[1]
    assert (plain - smooth).abs().max() > 1e-4 and not torch.equal(plain_BL, hot_BL)


def test_decoding_in_chunks_gives_the_same_images(model: NextScaleTransformer, tokenizer: MultiScaleTokenizer) -> None:
    def images(decode_chunk: int | None) -> Tensor:
        return generate(model, tokenizer, 1, seeds=range(5), decode_chunk=decode_chunk, temperature=1.0).images

    torch.testing.assert_close(images(2), images(None))


def test_modes_are_restored_and_no_gradient_is_kept(make_model: MakeModel, tokenizer: MultiScaleTokenizer) -> None:
    model = make_model(drop_path=0.9)
    expected = generate(model, tokenizer, [1], seeds=[0]).images
    model.train()
    model.blocks[0].eval()
    images = generate(model, tokenizer, [1], seeds=[0]).images
    assert torch.equal(images, expected) and not images.requires_grad
    assert model.training and not model.blocks[0].training and model.blocks[1].training
    assert not tokenizer.training


def test_runs_under_autocast(model: NextScaleTransformer, tokenizer: MultiScaleTokenizer) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images, idx_BL = generate(model, tokenizer, [1, 2], seeds=[0, 1])
    assert images.dtype == torch.float32 and images.isfinite().all() and idx_BL.dtype == torch.int64


@pytest.mark.parametrize(
    ("labels", "options", "said"),
    [
        ([6], {}, "label 6: the model knows classes 0 to 4"),
        ([-2], {}, "label -2"),
        ([], {}, "at least one"),
        ([0.5], {}, "whole numbers"),
        ([0, 1], {"seeds": [1]}, "1 of them.*2 images"),
        ([0, 1], {"seeds": 1}, "seeds 1"),
        ([0], {"seeds": [2**32]}, "4294967295"),
        ([0], {"seeds": [-1]}, "seed -1"),
        ([0], {"top_k": 0}, "top_k 0"),
        ([0], {"top_p": 1.5}, "top_p 1.5"),
        ([0], {"cfg": -0.1}, "cfg -0.1"),
        ([0], {"decode_chunk": 0}, "decode_chunk 0"),
    ],
)
def test_bad_input(
    labels: list[int], options: dict[str, Any], said: str, model: NextScaleTransformer, tokenizer: MultiScaleTokenizer
) -> None:
    with pytest.raises(UserError, match=said):
        generate(model, tokenizer, labels, **options)


def test_another_tokenizer_is_refused(make_model: MakeModel, tokenizer: MultiScaleTokenizer) -> None:
    with pytest.raises(UserError, match=r"scales: the model has \[1, 2, 3\]"):
        generate(make_model(scales=(1, 2, 3)), tokenizer, [0])
    with pytest.raises(UserError, match="vocab_size: the model has 49"):
        generate(make_model(vocab_size=49), tokenizer, [0])


@pytest.mark.parametrize("attention", [FullAttention(), SlidingWindowAttention(2), AdjacentAttention()], ids=repr)
@pytest.mark.parametrize("cfg", [0.0, 1.5])
def test_a_few_tokens_and_logits_at_a_time_give_the_same(
    attention: Any,
    cfg: float,
    make_model: MakeModel,
    tokenizer: MultiScaleTokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(attention=attention, history=SlidingWindowHistory(2))
    run = partial(generate, model, tokenizer, [0, 1, 2], cfg=cfg, seeds=[5, 6, 7])
    images, idx_BL = run()
    monkeypatch.setattr("mvar_lightning.transformer.transformer.TOKENS_AT_ONCE", 50)
    # the package's name `generate` is the function
    monkeypatch.setattr(importlib.import_module("mvar_lightning.sampling.sampler"), "LOGITS_AT_ONCE", 2000)
    images_in_parts, idx_in_parts = run()
    assert torch.equal(idx_in_parts, idx_BL)
    torch.testing.assert_close(images_in_parts, images)


def test_labels_and_seeds_in_tensors_of_their_own(make_model: MakeModel, tokenizer: MultiScaleTokenizer) -> None:
    """As a loop over a tensor gives them. Of a GPU, numpy takes none (a stand-in refuses as they do)."""

    class Elsewhere(Tensor):
        def __array__(self, *args: Any) -> Any:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

    model = make_model()
    labels, seeds = ([torch.tensor(value).as_subclass(Elsewhere) for value in each] for each in ((0, 4), (5, 6)))
    made, wanted = generate(model, tokenizer, labels, seeds=seeds), generate(model, tokenizer, [0, 4], seeds=[5, 6])
    assert torch.equal(made.images, wanted.images)
