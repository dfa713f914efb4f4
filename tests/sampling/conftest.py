"""A tiny tokenizer, and tiny models whose every part matters (fresh ones gate their blocks almost shut)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mvar_lightning import MultiScaleTokenizer, NextScaleTransformer, save
from mvar_lightning.cli import main

Run = Callable[..., int]
SCALES, VOCAB, CODE_DIM, CLASSES = (1, 2, 3, 5), 48, 8, 5


def stir(module: torch.nn.Module, seed: int) -> None:
    """Every parameter anew, so large that it shows in the outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 4
            parameter.normal_(generator=generator).mul_(1 / math.sqrt(fan_in))


@pytest.fixture(scope="session")
def tokenizer() -> MultiScaleTokenizer:
    sizes = {"channels": 8, "channel_multipliers": (1, 1), "num_res_blocks": 1, "norm_groups": 4}
    made = MultiScaleTokenizer(SCALES, vocab_size=VOCAB, code_dim=CODE_DIM, **sizes)
    stir(made.quantizer, seed=1)
    return made.eval()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., NextScaleTransformer]:
    def make(scales: tuple[int, ...] = SCALES, vocab_size: int = VOCAB, **axes: Any) -> NextScaleTransformer:
        sizes = {"num_classes": CLASSES, "depth": 2, "width": 32, "heads": 2}
        model = NextScaleTransformer(scales, vocab_size=vocab_size, code_dim=CODE_DIM, **sizes, **axes)
        stir(model, seed=2)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def model(make_model: Callable[..., NextScaleTransformer]) -> NextScaleTransformer:
    return make_model()


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, model: NextScaleTransformer, tokenizer: MultiScaleTokenizer
) -> Path:
    folder = tmp_path_factory.mktemp("sampling") / "checkpoint"
    save(folder, model, tokenizer)
    return folder


@pytest.fixture
def sample(checkpoint: Path) -> Run:
    def run(out: Path, *arguments: str) -> int:
        return main(["sample", "--checkpoint", str(checkpoint), "--out", str(out), "--device", "cpu", *arguments])

    return run
