"""The suite's own folders and Lightning's files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mvar_lightning import checkpoints
from mvar_lightning.attention import SpatialAttention
from mvar_lightning.checkpoints import load, load_tokenizer, save
from mvar_lightning.checkpoints.folder import is_released
from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer import MultiScaleTokenizer, fingerprint
from mvar_lightning.transformer import GlobalHistory, LlamaBlocks, NextScaleTransformer

SCALES = [1, 2, 3]


@pytest.fixture(scope="module")
def tokenizer() -> MultiScaleTokenizer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 16, "code_dim": 4, "channels": 8, "norm_groups": 4, "num_res_blocks": 1}
    return MultiScaleTokenizer(SCALES, **sizes, channel_multipliers=[1, 1]).eval()


@pytest.fixture(scope="module")
def model() -> NextScaleTransformer:
    torch.manual_seed(1)
    axes: dict[str, Any] = {"attention": SpatialAttention(3, [2]), "history": GlobalHistory(2), "blocks": LlamaBlocks()}
    return NextScaleTransformer(SCALES, vocab_size=16, code_dim=4, num_classes=3, depth=2, width=64, **axes).eval()


@pytest.fixture
def folder(model: NextScaleTransformer, tokenizer: MultiScaleTokenizer, tmp_path: Path) -> Path:
    save(tmp_path / "checkpoint", model, tokenizer)
    return tmp_path / "checkpoint"


def lightning_content(model: nn.Module | None, tokenizer: MultiScaleTokenizer) -> dict[str, Any]:
    """What the LightningModules write."""
    state = {f"tokenizer.{key}": value for key, value in tokenizer.state_dict().items()}
    record = {
        "format": 1,
        "kind": "tokenizer" if model is None else "next_scale",
        "tokenizer": tokenizer.config,
        "tokenizer_hash": fingerprint(tokenizer),
    }
    if model is not None:
        state |= {f"model.{key}": value for key, value in model.state_dict().items()}
        record["model"] = model.config
    state["loss.lpips.weight"] = torch.zeros(1)
    return {"state_dict": state, "mvar_lightning": record, "epoch": 2, "global_step": 7}


def assert_same(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert a.config == b.config and not a.training


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_folder_round_trip(folder: Path, model: NextScaleTransformer, tokenizer: MultiScaleTokenizer) -> None:
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.safetensors"}
    loaded, loaded_tokenizer = load(folder)
    assert loaded is not None
    assert_same(loaded, model)
    assert_same(loaded_tokenizer, tokenizer)
    label_B, idx_BL = torch.tensor([0, 2]), torch.randint(0, 16, (2, 14))
    x_BLZ = tokenizer.teacher_input(idx_BL)
    assert torch.equal(loaded(x_BLZ, label_B), model(x_BLZ, label_B))
    assert torch.equal(loaded_tokenizer.decode(idx_BL), tokenizer.decode(idx_BL))
    loaded(x_BLZ, label_B).sum().backward()


def test_tokenizer_alone(tokenizer: MultiScaleTokenizer, tmp_path: Path) -> None:
    save(tmp_path / "t", None, tokenizer)
    assert not (tmp_path / "t" / "model.safetensors").exists()
    none, loaded = load(tmp_path / "t")
    assert none is None
    assert_same(loaded, tokenizer)
    assert_same(load_tokenizer(tmp_path / "t"), tokenizer)


def test_a_runs_folder_stands_for_the_model_in_it(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    folder.rename(tmp_path / "run" / "model")
    model, tokenizer = load(tmp_path / "run")
    assert model is not None and fingerprint(tokenizer) == fingerprint(load_tokenizer(tmp_path / "run" / "model"))
    with pytest.raises(UserError, match=r"not a checkpoint folder, it has no config\.json \(nor has a model/ in it\)"):
        load(tmp_path)


def test_which_files_are_released_ones(folder: Path, tmp_path: Path) -> None:
    own = [folder, folder.parent, tmp_path / "last.ckpt", tmp_path / "none", folder / "tokenizer.safetensors"]
    (tmp_path / "weights.pth").mkdir()
    assert not any(is_released(path) for path in [*own, tmp_path / "weights.pth"])
    assert all(is_released(tmp_path / name) for name in ("vae.pth", "vae.safetensors", "tokenizer.safetensors"))
    for name in ("tokenizer.safetensors", "model.safetensors", "config.json"):
        with pytest.raises(UserError, match=rf"{name}: is one file of a saved folder.*; give .*checkpoint$"):
            load_tokenizer(folder / name)


def test_save_replaces_a_checkpoint_and_nothing_else(
    folder: Path, tokenizer: MultiScaleTokenizer, tmp_path: Path
) -> None:
    save(folder, None, tokenizer)
    assert load(folder)[0] is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds something else"):
        save(other, None, tokenizer)
    (other / "config.json").write_text('{"format": 1, "kind": "tokenizer", "library": "another"}')
    with pytest.raises(UserError, match="'another'"):
        save(other, None, tokenizer)
    with pytest.raises(UserError, match="is a file"):
        save(other / "thesis.txt", None, tokenizer)
    assert (other / "thesis.txt").read_text() == "years of work"


def test_a_failing_save_leaves_the_old_checkpoint(
    folder: Path, model: NextScaleTransformer, tokenizer: MultiScaleTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(path: Path, state: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(checkpoints.folder, "write_tensors", full_disk)
    with pytest.raises(UserError, match="no space"):
        save(folder, None, tokenizer)
    assert_same(load(folder)[1], tokenizer)
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


def test_pair_must_fit(tokenizer: MultiScaleTokenizer, tmp_path: Path) -> None:
    other = NextScaleTransformer([1, 3], vocab_size=16, code_dim=4, num_classes=3, depth=1)
    with pytest.raises(UserError, match="scales"):
        save(tmp_path / "c", other, tokenizer)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c.update(format=2), "format 2"),
        (lambda c: c.pop("format"), "not a checkpoint of mvar_lightning"),
        (lambda c: c.update(library="other"), "'other'"),
        (lambda c: c.pop("model"), "'model' is missing"),
        (lambda c: c["model"].pop("depth"), r"wrong shape|missing|unexpected"),
        (lambda c: c["model"].pop("scales"), "cannot be built"),
        (lambda c: c["model"].update(secret=1), "secret"),
        (lambda c: c["model"].update(scales=[1, 2, 4]), "not the tokenizer's"),
        (lambda c: c["model"]["attention"].update({"class": "Telepathy"}), "Telepathy"),
        (lambda c: c["tokenizer"].pop("scales"), "not the tokenizer's"),
        (lambda c: c["tokenizer"].update(channels=16), "wrong shape: encoder"),
        (lambda c: c["tokenizer"].update(phi_ratio=0.25), "hash"),
        (lambda c: (c["tokenizer"].update(scales=[1, 2, 4]), c["model"].update(scales=[1, 2, 4])), "hash"),
        (lambda c: c.update(tokenizer_hash="0" * 64), "hash"),
    ],
)
def test_changed_configuration(change: Callable[[dict[str, Any]], Any], told: str, folder: Path) -> None:
    edit_config(folder, change)
    with pytest.raises(UserError, match=told) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_damaged_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        load(tmp_path / "none")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load(folder)
    load_tokenizer(folder)
    weights.unlink()
    with pytest.raises(UserError, match="no such file"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        load(folder)


def test_lightning_checkpoint(model: NextScaleTransformer, tokenizer: MultiScaleTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(lightning_content(model, tokenizer), path)
    loaded, loaded_tokenizer = load(path)
    assert loaded is not None
    assert_same(loaded, model)
    assert_same(loaded_tokenizer, tokenizer)
    torch.save(lightning_content(None, tokenizer), path)
    assert load(path)[0] is None
    assert_same(load_tokenizer(path), tokenizer)


def test_compiled_names(model: NextScaleTransformer, tokenizer: MultiScaleTokenizer, tmp_path: Path) -> None:
    content = lightning_content(model, tokenizer)
    content["state_dict"] = {
        key.replace("model.", "model._orig_mod.").replace("blocks.0.", "blocks.0._orig_mod."): tensor
        for key, tensor in content["state_dict"].items()
    }
    torch.save(content, tmp_path / "last.ckpt")
    loaded, _ = load(tmp_path / "last.ckpt")
    assert loaded is not None
    assert_same(loaded, model)


def test_other_weights_than_recorded(tokenizer: MultiScaleTokenizer, tmp_path: Path) -> None:
    content = lightning_content(None, tokenizer)
    content["mvar_lightning"]["tokenizer_hash"] = "0" * 64
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="hash"):
        load(tmp_path / "a.ckpt")


def test_foreign_lightning_checkpoints(tokenizer: MultiScaleTokenizer, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'fired'}",)

    path = tmp_path / "last.ckpt"
    for content, told in (
        ({"state_dict": {}, "epoch": 1}, "not a Lightning checkpoint of this suite"),
        ({**lightning_content(None, tokenizer), "callbacks": Bomb()}, "nothing was executed"),
        ({**lightning_content(None, tokenizer), "mvar_lightning": {"format": 9, "kind": "tokenizer"}}, "format 9"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=told):
            load(path)
    assert not (tmp_path / "fired").exists()
    content = lightning_content(None, tokenizer)
    del content["state_dict"]["tokenizer.quant_conv.weight"]
    torch.save(content, path)
    with pytest.raises(UserError, match=r"missing: quant_conv\.weight"):
        load(path)


def test_half_of_the_space(model: NextScaleTransformer, tokenizer: MultiScaleTokenizer, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save(tmp_path / "whole", model, tokenizer)
    save(tmp_path / "half", model, tokenizer, half=True)
    sizes = [(tmp_path / kind / "model.safetensors").stat().st_size for kind in ("half", "whole")]
    assert sizes[0] < 0.65 * sizes[1]
    found, codes = load(tmp_path / "half")
    assert found is not None and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for name, tensor in found.state_dict().items():
        wanted = before[name].half().float() if before[name].dtype == torch.float32 else before[name]
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, wanted)
    save(tmp_path / "again", found, codes, half=True)  # rounding twice changes nothing
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "half" / "config.json").read_bytes()


def test_weights_too_large_for_float16(tokenizer: MultiScaleTokenizer, tmp_path: Path) -> None:
    large = MultiScaleTokenizer(**tokenizer.config)
    large.load_state_dict(tokenizer.state_dict())
    with torch.no_grad():
        next(iter(large.parameters())).fill_(1e5)
    with pytest.raises(UserError, match="too large for float16"):
        save(tmp_path / "half", None, large, half=True)
    assert not (tmp_path / "half").exists()


def test_the_record_of_half_is_true_or_false(
    model: NextScaleTransformer, tokenizer: MultiScaleTokenizer, tmp_path: Path
) -> None:
    save(tmp_path / "half", model, tokenizer, half=True)
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    (tmp_path / "half" / "config.json").write_text(json.dumps(config | {"half": "yes"}))
    with pytest.raises(UserError, match="'half' is not true or false"):
        load(tmp_path / "half")


def test_a_model_that_ships_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load("digits")
    assert model is not None and model.num_classes == 10 and tokenizer.image_size == 16
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    with pytest.raises(UserError, match="nothing: no such checkpoint"):
        load("nothing")
