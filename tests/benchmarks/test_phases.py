"""The benchmark's phases are told apart where rows and logits come in chunks, and nothing compiles anew."""

from __future__ import annotations

from importlib import import_module
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import phases
from mvar_lightning import AdjacentAttention, MultiScaleTokenizer, NextScaleTransformer
from mvar_lightning.sampling import LinearGuidance, SamplingSettings, sample_pyramid
from mvar_lightning.sampling.draws import ImageNoise
from mvar_lightning.training.scale_groups import loss_of_groups
from mvar_lightning.transformer import acceleration as compiled
from mvar_lightning.transformer import transformer

SCALES, CLASSES = (1, 2, 3), 5


class Marks:
    """A stopwatch that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, str]] = []

    def mark(self, scale: int, phase: str) -> None:
        self.told.append((scale, phase))


@pytest.fixture
def ours() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 16, "code_dim": 4}
    model = NextScaleTransformer(
        SCALES, **sizes, num_classes=CLASSES, depth=2, width=8, heads=2, attention=AdjacentAttention()
    ).eval()
    small = {"channels": 8, "channel_multipliers": (1, 1), "num_res_blocks": 1, "norm_groups": 4}
    tokenizer = MultiScaleTokenizer(SCALES, **sizes, **small).eval()
    label_B = torch.tensor([0, 1])

    def sample() -> None:
        noise = ImageNoise([0, 1], model.pyramid, label_B.device)
        sample_pyramid(model, tokenizer, label_B, SamplingSettings(LinearGuidance(1.5)), noise)

    def train() -> None:
        idx_BL = torch.zeros(2, model.pyramid.num_tokens, dtype=torch.int64)
        groups = (range(len(SCALES)),)
        loss_of_groups(model, tokenizer.teacher_input(idx_BL), label_B, idx_BL, groups)[0].backward()

    return SimpleNamespace(sampler=model, trained=model, sample=sample, train=train)


def in_a_row(told: list[Any]) -> list[Any]:
    return [each for each, _ in groupby(told)]


def test_chunks_of_rows_and_logits_keep_their_phases(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer, "TOKENS_AT_ONCE", 1)
    monkeypatch.setattr(import_module("mvar_lightning.sampling.sampler"), "LOGITS_AT_ONCE", 1)
    watch = Marks()
    phases.sampled(ours, watch)
    found = in_a_row([phase for scale, phase in watch.told if scale == 2])
    # four rows, one by one; then of each image the conditional logits, the unconditional ones, and the draw
    rows, image = [phases.BLOCKS, phases.HEAD] * 4, [phases.CHOICE, phases.HEAD] * 2
    assert found == [phases.BLOCKS, phases.EMBED, *rows, phases.BLOCKS, *image * 2, phases.CHOICE]
    assert in_a_row([scale for scale, _ in watch.told]) == [-1, 0, 1, 2]


@pytest.mark.parametrize("part", ["sampled", "trained"])
def test_compiled_blocks_are_not_compiled_again(part: str, ours: Any) -> None:
    """Else the profile of `--compile` would be one of the compiler."""
    frames = torch._dynamo.utils.counters["frames"]
    frames.clear()
    compiled.compile_blocks(ours.sampler, backend="eager")
    {"sampled": ours.sample, "trained": ours.train}[part]()
    before = frames["total"]
    watch = Marks()
    getattr(phases, part)(ours, watch)
    assert frames["total"] == before > 0, "a hook on a block has it traced anew"
    expected = {"sampled": (2, phases.BLOCKS), "trained": (-1, phases.TRAIN["back"])}
    assert expected[part] in watch.told


def test_methods_are_put_back(ours: Any) -> None:
    before = {name: set(vars(owner)) for name, owner in (("model", ours.sampler), ("head", ours.sampler.head))}
    phases.sampled(ours, Marks())
    phases.trained(ours, Marks())
    assert before == {"model": set(vars(ours.sampler)), "head": set(vars(ours.sampler.head))}
