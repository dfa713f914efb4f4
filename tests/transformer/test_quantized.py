"""Weights of few bits: near the model they were made of, small, saved and loaded, told where they fail."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.small_models import small_model, small_tokenizer
from torch import nn

from mvar_lightning import UserError, VARModule, generate, load, quantize
from mvar_lightning.checkpoints import export_official, load_initial_weights, save
from mvar_lightning.checkpoints.programs import programs
from mvar_lightning.cli import main
from mvar_lightning.commands.checkpoints import describe
from mvar_lightning.transformer import quantized
from mvar_lightning.transformer.acceleration import prepare
from mvar_lightning.transformer.linear import Linear
from mvar_lightning.transformer.quantized import KINDS, QuantizedLinear

ERROR = {"int8": 0.03, "int8-weights": 0.01, "int4-weights": 0.15}
"""Of a product of normal numbers, relative."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs", [128, 64, 6])
def test_a_product_is_near(kind: str, inputs: int) -> None:
    torch.manual_seed(0)
    layer, x = Linear(inputs, 32), torch.randn(2, 5, inputs)
    few = QuantizedLinear(inputs, 32, True, kind).take(layer)
    with torch.no_grad():
        expected, found = layer(x), few(x)
        assert (found - expected).norm() < ERROR[kind] * expected.norm()
        assert torch.allclose(few.with_bias(x, torch.ones(32)) - few.with_bias(x, None), torch.ones(()), atol=1e-5)
        assert few(x.bfloat16()).dtype == torch.bfloat16
    rounding = few.scale.repeat_interleave(few.group, dim=1) / 2
    assert ((few.dequantized() - layer.weight).abs() <= rounding * 1.0001).all()


def test_weights_that_whole_numbers_say_are_kept_exactly() -> None:
    for kind, most in (("int8", 127), ("int4-weights", 7)):
        layer = Linear(64, 8, bias=False)
        whole = torch.randint(-most, most + 1, (8, 64))
        whole[:, 0] = most
        with torch.no_grad():
            layer.weight.copy_(whole * 0.25)
        few = QuantizedLinear(64, 8, False, kind).take(layer)
        assert torch.equal(few.dequantized(), layer.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_does_not_depend_on_the_others_of_its_batch(kind: str) -> None:
    model, tokenizer = load("digits")
    assert model is not None
    quantize(model, kind)
    whole = generate(model, tokenizer, [3, 1, 3, 8], seeds=range(4)).tokens
    alone = [generate(model, tokenizer, label, seeds=seed).tokens for seed, label in enumerate([3, 1, 3, 8])]
    assert torch.equal(whole, torch.cat(alone))


def test_numbers_that_are_none_stay_so() -> None:
    few = QuantizedLinear(8, 4, True, "int8").take(Linear(8, 4))
    x = torch.randn(3, 8)
    with torch.no_grad():
        good = few(x)
        x[1, 2] = torch.nan
        assert torch.equal(few(x)[[0, 2]], good[[0, 2]]) and not torch.isfinite(few(x)[1]).any()
        x[1, 2] = torch.inf
        assert not torch.isfinite(few(x)[1]).any()
        assert few(torch.zeros(2, 8)).isfinite().all()
    bad = Linear(8, 4)
    nn.init.constant_(bad.weight, torch.nan)
    with pytest.raises(UserError, match="NaN or infinite"):
        QuantizedLinear(8, 4, True, "int8").take(bad)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_model_stays_what_it_is(kind: str, tmp_path: Path) -> None:
    model, tokenizer = load("digits")
    assert model is not None
    plain = deepcopy(model)
    assert quantize(model, kind) is model
    left = [
        type(layer) for part in (model.blocks, model.head) for layer in part.modules() if isinstance(layer, nn.Linear)
    ]
    assert not left, "all products of blocks and head"
    size, before = (sum(p.numel() * p.element_size() for p in m.parameters()) for m in (model, plain))
    assert size < (0.2 if kind == "int4-weights" else 0.3) * before
    labels, seeds = list(range(10)), list(range(10))
    ours, theirs = (generate(m, tokenizer, labels, seeds=seeds, top_k=1, cfg=0).tokens for m in (model, plain))
    # of the greedy tokens; after one that differs all later scales go another way, so the first ones are counted
    first = model.pyramid.span(range(2)).stop
    assert (ours[:, :first] == theirs[:, :first]).float().mean() > (0.6 if kind == "int4-weights" else 0.9)
    with torch.no_grad():
        x, label = tokenizer.teacher_input(theirs), torch.tensor(labels)
        ours_BLV, theirs_BLV = model(x, label), plain(x, label)
    assert (ours_BLV - theirs_BLV).norm() < (0.35 if kind == "int4-weights" else 0.08) * theirs_BLV.norm()

    save(tmp_path / "few", model, tokenizer)
    again, _ = load(tmp_path / "few")
    assert again is not None and again.quantized == kind
    for (name, saved), (_, loaded) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert saved.dtype == loaded.dtype and torch.equal(saved, loaded), name
    assert torch.equal(
        generate(again, tokenizer, labels, seeds=seeds).tokens, generate(model, tokenizer, labels, seeds=seeds).tokens
    )
    assert f"(weights in {kind})" in describe(str(tmp_path / "few"))
    assert torch.equal(
        generate(deepcopy(model), tokenizer, [1], seeds=[1]).tokens, generate(model, tokenizer, [1], seeds=[1]).tokens
    )


def test_autocast_and_quantized_weights_go_together() -> None:
    model, tokenizer = load("digits")
    assert model is not None
    prepare(model, "bf16", quantized="int8")
    with torch.autocast("cpu", torch.bfloat16):
        made = generate(model, tokenizer, [1, 2], seeds=[1, 2])
    assert torch.isfinite(made.images).all()


def test_what_cannot_be_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, tokenizer = quantize(small_model(), "int8"), small_tokenizer()
    save(tmp_path / "few", few, tokenizer)
    mistakes: list[tuple[Any, str]] = [
        (lambda: quantize(few, "int8"), "quantized already"),
        (lambda: quantize(small_model(), "int2"), "unknown"),
        (lambda: quantize(nn.Linear(2, 2), "int8"), "no linear layers"),
        (lambda: quantized.check_quantizable(small_model(), "int8", torch.device("cuda")), "CPUs"),
        (lambda: prepare(small_model(), "32", compiled=True, quantized="int8"), "not compiled"),
        (lambda: save(tmp_path / "half", few, tokenizer, half=True), "int8 already"),
        (lambda: programs(few, tokenizer), "no graph"),
        (lambda: export_official(few, tokenizer, tmp_path / "a.pth", tmp_path / "b.pth"), "in int8|none of the"),
        (lambda: load_initial_weights(small_model(), tmp_path / "few"), "for sampling"),
        (lambda: VARModule.load_from_checkpoint(tmp_path / "few"), "for sampling"),
        (
            lambda: VARModule(str(tmp_path / "few"), 3, depth=1, width=16, heads=2, init_from=str(tmp_path / "few")),
            "for sampling",
        ),
    ]
    for mistake, words in mistakes:
        with pytest.raises(UserError, match=words):
            mistake()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few"]
    with pytest.raises(UserError, match="CPUs"):  # moved afterwards
        few.blocks.to("meta")
        few.blocks[0].attention.qkv(torch.zeros(1, 1, 16, device="meta"))


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert (
        main(["sample", "--checkpoint", "digits", "--classes", "3", "--count", "2", "--out", out, "--quantize", "int8"])
        == 0
    )
    assert main(["sample", "--checkpoint", "digits", "--classes", "3", "--count", "2", "--out", out]) == 2
    assert "precision" in capsys.readouterr().err
    assert main(["export", "digits", "--folder", str(tmp_path / "few"), "--quantize", "int4-weights"]) == 0
    again = [
        "sample",
        "--checkpoint",
        str(tmp_path / "few"),
        "--classes",
        "3",
        "--count",
        "1",
        "--out",
        str(tmp_path / "b"),
    ]
    assert main(again) == 0
    assert main([*again, "--quantize", "int8"]) == 2
    assert "quantized already" in capsys.readouterr().err
