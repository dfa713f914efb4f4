"""`mvar plan`, and what it says of a card that is too small or not there."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mvar_lightning import AdjacentAttention, FullAttention, LlamaBlocks, NextScaleTransformer, UserError, VARBlocks
from mvar_lightning.cli import main
from mvar_lightning.pyramid import PUBLISHED_SIDES
from mvar_lightning.runs.plan import KEPT, check_card, plan
from mvar_lightning.training.scale_groups import kept_of_token

ROOT = Path(__file__).parents[2]
D16 = ROOT / "recipes/var/d16.yaml"


class Card(NamedTuple):
    total_memory: float


def test_the_table_and_a_card_that_is_too_small(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(D16)]) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("310,283,520", "96 x 8 x 1 = 768", "optimizer state", "peak of a device"))
    assert main(["plan", str(D16), "--card", "24GB"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "over 90% of 24 GB" in error and "batch_size 24, accumulate_grad_batches 4" in error
    assert "checkpoint_activations: true" in error


def test_what_it_names_fits() -> None:
    changed = ["--data.batch_size=24", "--trainer.accumulate_grad_batches=4"]
    assert not plan(D16, card="24GB").fits and plan(D16, changed, card="24GB").fits
    eager = plan(D16, ["--model.compile_blocks=false"])
    assert eager.shape.peak() == pytest.approx(71 * 2**30, rel=0.03), "as was counted"
    with pytest.raises(UserError, match="such as 80GB"):
        plan(D16, card="large")


def test_a_recipe_for_gpus_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"written for GPUs of 80 GB; torch is built .*accelerator=cpu"):
        check_card(D16, [], "auto")
    check_card(D16, [], "cpu")
    check_card(ROOT / "recipes/var/digits.yaml", [], "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for size, fits in ((24e9, False), (80e9, True)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, size=size: Card(size))
        if fits:
            check_card(D16, [], "auto")
        else:
            with pytest.raises(UserError, match="over 90% of 24 GB; would fit: batch_size 24"):
                check_card(D16, [], "auto")


@pytest.mark.parametrize("blocks", [VARBlocks(), LlamaBlocks()], ids=["var", "llama"])
def test_the_tables_bytes_are_near_what_autograd_keeps(blocks: VARBlocks | LlamaBlocks) -> None:
    """On a CPU, whose casts are others: norms stay in bf16 there, attention keeps more."""
    sizes = dict(vocab_size=16, code_dim=4, num_classes=3, depth=1, width=256, heads=4)
    attention = FullAttention() if isinstance(blocks, VARBlocks) else AdjacentAttention()
    model = NextScaleTransformer(PUBLISHED_SIDES[256], attention=attention, blocks=blocks, **sizes)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        assert kept_of_token(model) / 256 == pytest.approx(KEPT[type(blocks).__name__][0], rel=0.15)
