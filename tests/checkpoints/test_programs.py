"""Encode, decode and the transformer as programs: the numbers of the modules, at any batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from faults.small_models import small_model, small_tokenizer

from mvar_lightning import UserError, generate
from mvar_lightning.checkpoints.programs import export_programs, programs
from mvar_lightning.cli import main


@pytest.mark.slow
def test_programs_of_torch_export_give_the_modules_numbers_at_any_batch(tmp_path: Path) -> None:
    model, tokenizer = small_model().eval(), small_tokenizer().eval()
    export_programs(tmp_path / "out", model, tokenizer, "pt2", class_names=())
    found = {file.stem: torch.export.load(file).module() for file in (tmp_path / "out").glob("*.pt2")}
    assert found.keys() == {"encode", "decode", "transformer"}
    for batch in (1, 5):
        image = torch.rand(batch, 3, tokenizer.image_size, tokenizer.image_size) * 2 - 1
        idx_BL, label_B = tokenizer.encode(image), torch.arange(batch) % (model.num_classes + 1)
        with torch.no_grad():
            logits = model(tokenizer.teacher_input(idx_BL), label_B)
            assert torch.equal(found["encode"](image), idx_BL)
            assert torch.allclose(found["decode"](idx_BL), tokenizer.decode(idx_BL), atol=1e-5)
            assert torch.allclose(found["transformer"](idx_BL, label_B), logits, atol=1e-4)
    record = json.loads((tmp_path / "out" / "programs.json").read_text())
    assert record["no_class"] == model.num_classes
    assert record["programs"]["transformer"] == {"takes": ["tokens", "label"], "gives": "logits"}
    # whoever samples runs the transformer once a scale
    label_B, idx_BL = torch.tensor([0, 1]), torch.zeros(2, model.pyramid.num_tokens, dtype=torch.int64)
    for scale in range(model.pyramid.num_scales):
        tokens = model.pyramid.slice_of(scale)
        with torch.no_grad():
            idx_BL[:, tokens] = found["transformer"](idx_BL, label_B)[:, tokens].argmax(dim=-1)
    assert torch.equal(idx_BL, generate(model, tokenizer, label_B, cfg=None, top_k=1).tokens)


def test_what_cannot_be_exported_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for arguments in (
        ["digits", "--onnx", str(tmp_path / "full")],
        ["digits", "--onnx", str(tmp_path / "new"), "--half"],
        ["digits", "--onnx", str(tmp_path / "new"), "--pt2", str(tmp_path / "other")],
        ["digits"],
    ):
        assert main(["export", *arguments]) == 2
        err = capsys.readouterr().err
        assert err.startswith("mvar: error: ") and err.count("\n") == 1
    assert [file.name for file in tmp_path.rglob("*")] == ["full", "mine.txt"]
    with pytest.raises(UserError, match="form"):
        export_programs(tmp_path / "new", None, small_tokenizer(), "torchscript")
    with pytest.raises(UserError, match="flex"):
        model = small_model()
        model.backend.name = "flex"
        programs(model, small_tokenizer())


def test_missing_packages_of_onnx_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnx and onnxscript: not installed; pip install mvar-lightning\[onnx\]"):
        export_programs(tmp_path / "out", None, small_tokenizer())
    assert not (tmp_path / "out").exists()
