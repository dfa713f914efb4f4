"""Which keys stay: ScaleKV against a selection by hand, and nothing else changed where nothing is dropped."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from faults.small_models import CONVOLUTIONS, SIZES
from torch import Tensor

from mvar_lightning import UserError, edit, generate
from mvar_lightning.attention import (
    AdjacentAttention,
    AttentionStrategy,
    FullAttention,
    KeepAll,
    KVCache,
    ScaleKV,
    SlidingWindowAttention,
    SpatialAttention,
    choose_backend,
)
from mvar_lightning.attention.scored_cache import ScoredCache
from mvar_lightning.pyramid import PUBLISHED_SIDES, ScalePyramid
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.transformer import LlamaBlocks, MixedHistory, NextScaleTransformer, SlidingWindowHistory

PYRAMID = ScalePyramid([1, 2, 3, 4, 5, 8])
BATCH, HEADS, HEAD_DIM, LAYERS = 2, 3, 8, 1
SHAPE: dict[str, Any] = {"batch": BATCH, "heads": HEADS, "head_dim": HEAD_DIM, "device": torch.device("cpu")}
SHAPE |= {"dtype": torch.float32}


class Grouped(AttentionStrategy):
    """Scales 0 to 2 see each other, then 3 to 5 do."""

    def first_key_scale(self, scale: int, pyramid: ScalePyramid) -> int:
        return 0 if scale < 3 else 3


class PassesOver(AttentionStrategy):
    """Scale 3 sees itself alone, and scale 4 everything again."""

    def first_key_scale(self, scale: int, pyramid: ScalePyramid) -> int:
        return 3 if scale == 3 else 0


STRATEGIES = [FullAttention(), SlidingWindowAttention(2), SlidingWindowAttention(3), Grouped()]


def qkv() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, HEADS, PYRAMID.num_tokens, HEAD_DIM, generator=generator) for _ in range(3)]


def window_by_hand(side: int) -> list[int]:
    patch = side // 4
    return [(i * patch + patch // 2) * side + j * patch + patch // 2 for i in range(4) for j in range(4)]


def scores_by_hand(
    q: Tensor, k: Tensor, positions: list[int], scale: int, first: int
) -> tuple[list[int], dict[int, float]]:
    """The window, and the score of every other position from ``first`` on, of one row and head: q (l, D) of the scale,
    k (L, D) of the pyramid."""
    start, places = PYRAMID.offsets[scale], window_by_hand(PYRAMID.sides[scale])
    window = [start + place for place in places]
    others = [p for p in positions if p not in window]
    products = (q[places] @ k.T / HEAD_DIM**0.5).sum(dim=0).tolist()
    near = {n: [o for o in others[max(0, n - 2) : n + 3] if o >= first] for n in range(len(others))}
    return window, {p: max(products[o] for o in near[n]) for n, p in enumerate(others) if p >= first}


@pytest.mark.parametrize("name", ["dense", "per_scale"])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_a_layer_keeps_what_a_selection_by_hand_keeps_and_reads_just_that(
    strategy: AttentionStrategy, name: str
) -> None:
    q, k, v = qkv()
    backend, policy = choose_backend(name, strategy, PYRAMID), ScaleKV(0.2, [])
    cache = policy.make(backend.plan, layers=LAYERS, **SHAPE)
    sizes = policy.kept(backend.plan, LAYERS)
    dropped = 0
    for number, layer in enumerate(cache.layers):
        held = torch.zeros(BATCH, HEADS, 0, dtype=torch.int64)
        for scale in range(len(PYRAMID)):
            own, first = PYRAMID.slice_of(scale), PYRAMID.offsets[strategy.first_key_scale(scale, PYRAMID)]
            keys, values = layer.extend(q[:, :, own], k[:, :, own], v[:, :, own], scale)
            out = backend(q[:, :, own], keys, values, range(scale, scale + 1), 0.7)
            seen = torch.zeros(BATCH, HEADS, PYRAMID.num_tokens, dtype=torch.bool).scatter(2, held, True)
            seen[:, :, own] = True
            assert not seen[:, :, :first].any(), "out of sight"
            scores = (q[:, :, own] @ k.mT * 0.7).masked_fill(~seen[:, :, None], -torch.inf)
            torch.testing.assert_close(out, scores.softmax(-1) @ v, atol=1e-5, rtol=1e-5)
            size = sizes[number][scale]
            last = scale + 1 == len(PYRAMID)
            alive = 0 if last else PYRAMID.offsets[scale + 1] - PYRAMID.offsets[backend.plan.cache_start(scale + 1)]
            if not size:
                held = held[:, :, :0]
                continue
            before, held = held, layer.positions(scale).long()  # type: ignore[attr-defined]
            assert held.shape[2] == size and (held.diff(dim=2) > 0).all()
            if size == alive:
                continue
            dropped += 1
            start = PYRAMID.offsets[backend.plan.cache_start(scale + 1)]
            for row, head in ((0, 1), (1, 2)):
                positions = [*before[row, head].tolist(), *range(own.start, own.stop)]
                window, score = scores_by_hand(q[row, head, own], k[row, head], positions, scale, start)
                stay = held[row, head].tolist()
                assert set(stay) >= set(window) and set(stay) <= {*window, *score}
                gone = [score[p] for p in score if p not in stay]
                assert min(score[p] for p in stay if p not in window) >= max(gone, default=-torch.inf) - 1e-5
    assert dropped


def test_budgets_are_met_at_every_scale() -> None:
    for sides in PUBLISHED_SIDES.values():
        pyramid = ScalePyramid(sides)
        for layers, drafters in ((16, [0]), (32, [0, 23]), (40, [0, 1, 2]), (3, [0, 1, 2]), (4, [])):
            for budget in (0.05, 0.5, 1.0):
                policy, plan = ScaleKV(budget, drafters), FullAttention().plan(pyramid)
                sizes, mean = policy.kept(plan, layers), int(budget * pyramid.num_tokens)
                for scale in range(len(pyramid) - 1):
                    there = pyramid.offsets[scale + 1]
                    total = sum(of_layer[scale] for of_layer in sizes)
                    assert total <= layers * mean and all(of_layer[scale] <= there for of_layer in sizes)
                    assert total == layers * there if there <= mean else total > layers * mean - layers
                    assert all(of_layer[scale] >= min(there, 16) for of_layer in sizes)
                    if drafters:
                        most = (layers * mean - (layers - len(drafters)) * 16) // len(drafters)
                        assert sizes[drafters[0]][scale] == (min(there, most) if there > mean else there)


def test_a_tenth_of_512_pixels_is_held_in_an_eighth_of_the_memory() -> None:
    plan = FullAttention().plan(ScalePyramid(PUBLISHED_SIDES[512]))
    shape = {**SHAPE, "device": torch.device("meta")}
    whole, scored = (policy.make(plan, layers=16, **shape) for policy in (KeepAll(), ScaleKV(0.1)))
    assert scored.nbytes < 0.13 * whole.nbytes
    assert whole.nbytes == 2 * 16 * BATCH * HEADS * 2240 * HEAD_DIM * 4


AXES: dict[str, dict[str, Any]] = {
    "full": {"attention": FullAttention()},
    "window": {"attention": SlidingWindowAttention(3), "history": SlidingWindowHistory(2)},
    "llama": {"attention": FullAttention(), "history": MixedHistory(2), "blocks": LlamaBlocks()},
    "grouped": {"attention": Grouped()},
}
LABELS, SEEDS = [0, 2, 1], [5, 6, 7]


def tokenizer() -> MultiScaleTokenizer:
    torch.manual_seed(0)
    return MultiScaleTokenizer(PYRAMID.sides, **SIZES, **CONVOLUTIONS).eval()


def model(seed: int = 1, **axes: Any) -> NextScaleTransformer:
    torch.manual_seed(seed)
    sizes = {"num_classes": 3, "width": 16, "heads": 2, "depth": 3, "gamma_init": 0.5}
    made = NextScaleTransformer(PYRAMID.sides, **SIZES, **sizes, **axes).eval()
    with torch.no_grad():
        made.head.linear.weight.mul_(100)  # at first all codes are nearly equally likely, whatever is read
    return made


@pytest.mark.parametrize("name", AXES)
def test_at_a_full_budget_sampling_is_teacher_forcing_and_below_it_is_not(name: str) -> None:
    whole = model(**AXES[name])
    greedy = generate(whole, tokenizer(), LABELS, cfg=0, top_k=1, cache_policy=ScaleKV(1.0)).tokens
    with torch.no_grad():
        logits_BLV = whole(tokenizer().teacher_input(greedy), torch.tensor(LABELS))
    assert torch.equal(logits_BLV.argmax(dim=-1), greedy)
    logits = [generate_logits(whole, policy) for policy in (KeepAll(), ScaleKV(1.0), ScaleKV(0.2, [1]))]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)
    assert (logits[2] - logits[0]).abs().max() > 1e-3, "nothing was dropped"


@torch.no_grad()
def generate_logits(whole: NextScaleTransformer, policy: Any) -> Tensor:
    """Of the last scale, of fixed tokens."""
    idx_BL = torch.randint(16, (2, PYRAMID.num_tokens), generator=torch.Generator().manual_seed(0))
    inputs = tokenizer().teacher_input(idx_BL)
    state = whole.begin(torch.tensor([0, 1]), 2, policy=policy)
    for scale in range(len(PYRAMID)):
        own = PYRAMID.slice_of(scale)
        logits = whole.step(state, scale, inputs[:, own.start - 1 : own.stop - 1] if scale else None)
    return logits


@pytest.mark.parametrize("name", AXES)
def test_an_image_does_not_depend_on_its_batch_or_on_how_rows_are_cut(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, policy = model(**AXES[name]), ScaleKV(0.2)
    together = generate(whole, tokenizer(), LABELS, seeds=SEEDS, cache_policy=policy).tokens
    alone = generate(whole, tokenizer(), LABELS[1:2], seeds=SEEDS[1:2], cache_policy=policy).tokens
    assert torch.equal(together[1:2], alone)
    monkeypatch.setattr("mvar_lightning.transformer.transformer.TOKENS_AT_ONCE", 100)
    whole.equal_rows = True
    cut = generate(whole, tokenizer(), LABELS, seeds=SEEDS, cache_policy=policy).tokens
    assert torch.equal(cut, together)


def test_two_models_and_edits_take_a_policy() -> None:
    whole, mask = model(attention=FullAttention()), torch.ones(16, 16, dtype=torch.bool)
    alone = generate(whole, tokenizer(), LABELS, seeds=SEEDS).tokens
    stages = [(range(4), whole), (range(4, 6), deepcopy(whole))]
    assert torch.equal(generate(stages, tokenizer(), LABELS, seeds=SEEDS, cache_policy=ScaleKV(1.0)).tokens, alone)
    less = generate(stages, tokenizer(), LABELS, seeds=SEEDS, cache_policy=ScaleKV(0.14, [])).tokens
    drafted = PYRAMID.offsets[4]
    assert torch.equal(less[:, :drafted], alone[:, :drafted]) and not torch.equal(less, alone)
    finisher = model(seed=2, attention=AdjacentAttention())
    stages = [(range(5), whole), (range(5, 6), finisher)]
    generate(stages, tokenizer(), LABELS, seeds=SEEDS, cache_policy=ScaleKV(0.2))
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    made = [
        edit(whole, tokenizer(), image, mask, LABELS, seeds=SEEDS, cache_policy=policy).tokens
        for policy in (None, ScaleKV(1.0), ScaleKV(0.14, []))
    ]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize(
    ("policy", "axes", "words"),
    [
        (lambda: ScaleKV(0.0), {}, "cache_budget 0"),
        (lambda: ScaleKV(1.5), {}, "at most 1"),
        (lambda: ScaleKV(0.5, [0, 0]), {}, "twice"),
        (lambda: ScaleKV(0.5, ["a"]), {}, "list of layers"),  # type: ignore[list-item]
        (lambda: ScaleKV(0.1), {}, "keeps 11 of 119 tokens, fewer than the window of 16; give at least 0.135"),
        (lambda: ScaleKV(0.5, [3]), {}, "cache_drafters 3: the model has layers 0 to 2"),
        (lambda: ScaleKV(0.5), {"attention": AdjacentAttention()}, "keeps no keys"),
        (lambda: ScaleKV(0.5), {"attention": SpatialAttention(3, scales=1)}, "keeps no keys"),
        (lambda: ScaleKV(0.5), {"attention": PassesOver()}, "passes over"),
        (lambda: "scale_kv", {}, "give KeepAll"),
    ],
)
def test_what_makes_no_sense_is_told_before_anything_is_drawn(policy: Any, axes: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        generate(model(**axes), tokenizer(), LABELS, cache_policy=policy())


def test_policies_are_plain_values() -> None:
    from mvar_lightning.attention import CachePolicy

    for policy in (KeepAll(), ScaleKV(0.25, [0, 2])):
        assert CachePolicy.from_config(policy.config()) == policy
    assert repr(ScaleKV()) == "ScaleKV(budget=0.1, drafters=[0])"


def test_by_default_the_cache_is_the_plain_one() -> None:
    state = model(attention=FullAttention()).begin(torch.tensor([0]), 1)
    assert type(state.cache) is KVCache and not isinstance(state.cache, ScoredCache)
