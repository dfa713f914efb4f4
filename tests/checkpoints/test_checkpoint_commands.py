"""`mvar import`, `mvar export` and `mvar info`."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from mvar_lightning.checkpoints import load, save
from mvar_lightning.commands import checkpoints
from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer import MultiScaleTokenizer, fingerprint
from mvar_lightning.transformer import NextScaleTransformer

Files = dict[str, tuple[Path, Path]]


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers(required=True)
    checkpoints.add_parser(subparsers)
    parsed = parser.parse_args([str(argument) for argument in arguments])
    return int(parsed.run(parsed))


def import_mvar(released: Files, out: Path) -> int:
    model, tokenizer = released["mvar_tiny"]
    options = ("--patch-nums", "1,2,3,4,6,8", "--kernel-size", 3, "--first-neighborhood-scale", 4)
    return run("import", "--architecture", "mvar", "--model", model, "--tokenizer", tokenizer, "--out", out, *options)


def test_import_info_export(released: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert import_mvar(released, tmp_path / "mvar") == 0
    capsys.readouterr()
    assert run("info", tmp_path / "mvar") == 0
    told = capsys.readouterr().out
    model, tokenizer = load(tmp_path / "mvar")
    assert model is not None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = (
        "mvar",
        "SpatialAttention(kernel_size=3, scales=[4, 5])",
        "NoHistory()",
        "VARBlocks(",
        "depth",
        "1 2 3 4 6 8",
    )
    for fact in (*facts, f"{parameters:,}", fingerprint(tokenizer), "64 codes of length 32", "channels 32"):
        assert fact in told, fact
    assert run("export", tmp_path / "mvar", "--model", tmp_path / "m.pth", "--tokenizer", tmp_path / "t.pth") == 0
    for source, target in zip(released["mvar_tiny"], (tmp_path / "m.pth", tmp_path / "t.pth"), strict=True):
        before, after = (torch.load(path, weights_only=True) for path in (source, target))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_a_failing_import_writes_nothing(released: Files, tmp_path: Path) -> None:
    model, tokenizer = released["mvar_tiny"]
    with pytest.raises(UserError, match="looks like var or mvar"):
        run(
            "import",
            "--architecture",
            "markov_var",
            "--model",
            model,
            "--tokenizer",
            tokenizer,
            "--out",
            tmp_path / "x",
        )
    assert not list(tmp_path.iterdir())


def test_bad_patch_nums(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("import", "--architecture", "var", "--model", "m", "--tokenizer", "t", "--out", "o", "--patch-nums", "1,x")
    assert "give whole numbers" in capsys.readouterr().err


def test_info_of_a_tokenizer_and_of_an_own_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = MultiScaleTokenizer(
        [1, 2], vocab_size=8, code_dim=4, channels=8, norm_groups=4, channel_multipliers=[1, 1]
    )
    save(tmp_path / "t", None, tokenizer)
    assert run("info", tmp_path / "t") == 0
    told = capsys.readouterr().out
    assert "depth" not in told and fingerprint(tokenizer) in told
    with pytest.raises(UserError, match="tokenizer alone"):
        run("export", tmp_path / "t", "--model", tmp_path / "m.pth", "--tokenizer", tmp_path / "t.pth")
    from mvar_lightning.attention import SlidingWindowAttention

    model = NextScaleTransformer(
        [1, 2], vocab_size=8, code_dim=4, num_classes=2, depth=1, attention=SlidingWindowAttention(1)
    )
    save(tmp_path / "own", model, tokenizer)
    run("info", tmp_path / "own")
    assert "none of the published ones" in capsys.readouterr().out
