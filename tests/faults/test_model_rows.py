"""Checkpoints and library use: inputs that once went wrong, and what is right."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mvar_lightning.checkpoints import export_official, import_official, load, save
from mvar_lightning.checkpoints.assign import plain_names
from mvar_lightning.checkpoints.folder import open_checkpoint
from mvar_lightning.errors import UserError, check_types
from mvar_lightning.sampling import filter_logits, generate
from mvar_lightning.tools import files
from mvar_lightning.tools.tensors import write_tensors
from tests.faults.harness import ask, refused
from tests.faults.small_models import SCALES, lightning_content, published_pair, small_model, small_tokenizer

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(a: nn.Module | None, b: nn.Module | None) -> bool:
    assert a is not None and b is not None
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# data lost


@pytest.mark.parametrize("other", ["same.pth", "./same.pth", "link.pth", "sub/../same.pth"])
def test_export_of_two_parts_into_one_file(other: str, tmp_path: Path) -> None:
    save(tmp_path / "model", *published_pair())
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.pth").symlink_to("same.pth")
    answer = ask("export", "model", "--model", "same.pth", "--tokenizer", other, cwd=tmp_path)
    refused(answer, "one file for both", "--tokenizer")
    assert not (tmp_path / "same.pth").exists()


def test_export_over_what_it_reads(tmp_path: Path) -> None:
    save(tmp_path / "model", *published_pair())
    before = (tmp_path / "model/model.safetensors").read_bytes()
    answer = ask("export", "model", "--model", "model/model.safetensors", "--tokenizer", "t.pth", cwd=tmp_path)
    refused(answer, "file of a saved folder")
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
    torch.save(lightning_content(*published_pair()), tmp_path / "last.ckpt")
    answer = ask("export", "last.ckpt", "--model", "last.ckpt", "--tokenizer", "t.pth", cwd=tmp_path)
    refused(answer, "the checkpoint itself")


STOPPED = """
import os, pathlib
from tests.faults.small_models import small_model, small_tokenizer
from mvar_lightning import save
rename, calls = pathlib.Path.rename, []
def stop(self, target):
    calls.append(target)
    if len(calls) == 2:
        {end}
    return rename(self, target)
pathlib.Path.rename = stop
save("model", None, small_tokenizer())
"""


@pytest.mark.parametrize("end", ["raise KeyboardInterrupt", "os._exit(9)"])
def test_an_interrupt_between_the_renames_of_save(end: str, pair: Any, folder: Path) -> None:
    answer = ask(code=STOPPED.format(end=end), cwd=folder.parent)
    assert answer.status in (1, 9)
    model, _ = load(folder)
    assert same(model, pair[0]), "the one before stands"
    save(folder, None, pair[1])
    assert load(folder)[0] is None
    assert names(folder.parent) == ["model"], "nothing is left beside it"


def test_a_runs_folder_stands_for_its_model_during_the_exchange(pair: Any, folder: Path) -> None:
    run = folder.parent / "run"
    run.mkdir()
    folder.rename(run / f".before-{os.getppid()}-model")
    assert same(load(run)[0], pair[0])
    assert same(load(run / "model")[0], pair[0])


def test_a_link_to_a_folder_stays_one(pair: Any, folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to("model")
    save(link, None, pair[1])
    assert link.is_symlink() and load(folder)[0] is None


@pytest.mark.parametrize("number", [4194305, os.getpid()], ids=["larger than any", "this one's"])
def test_what_a_killed_save_left_is_swept(number: int, pair: Any, folder: Path) -> None:
    """In a container, process after process has the same number."""
    left = folder.parent / f".partial-{number}-model"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    save(folder, *pair)
    assert not left.exists()


def test_the_folder_before_is_of_the_process_that_replaces_it(pair: Any, folder: Path) -> None:
    """One at work keeps its own; what a killed one had put aside comes back, or goes where another stands."""
    working, killed = (folder.parent / f".before-{number}-model" for number in (os.getppid(), 4194305))
    shutil.copytree(folder, working)
    folder.rename(killed)
    with pytest.raises(OSError, match="No space"), files.writing_folder(folder):
        raise OSError(28, "No space")
    assert same(load(folder)[0], pair[0]) and not killed.exists()
    shutil.copytree(folder, killed)
    save(folder, None, pair[1])
    assert names(folder.parent) == [working.name, "model"]


# wrong in silence


def test_files_have_the_umasks_mode(pair: Any, tmp_path: Path) -> None:
    from mvar_lightning.metrics.classifier import DatasetClassifier, save_classifier

    before = os.umask(0o022)
    try:
        save(tmp_path / "model", *pair)
        save_classifier(DatasetClassifier(2, 8), tmp_path / "classifier.safetensors")
        export_official(*published_pair(), tmp_path / "m.safetensors", tmp_path / "t.pth")
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*") if path.is_file()}
    assert set(modes.values()) == {"0o644"}, modes
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755


def test_flipped_bytes_in_a_lightning_checkpoint(pair: Any, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(lightning_content(*pair), path)
    weight = pair[0].word_embedding.weight
    content = bytearray(path.read_bytes())
    place = content.index(weight.detach().numpy().tobytes()[:16])
    content[place + 5] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load(path)
    with pytest.raises(UserError, match="damaged"):
        open_checkpoint(path)  # what a resume asks first
    refused(ask("sample", "--checkpoint", path, "--count", 1, cwd=tmp_path), "last.ckpt", "damaged")
    assert ask("info", path).status == 0, "the record is whole, and nothing else is told of"


def test_flipped_bytes_in_a_folder(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x10
    path.write_bytes(content)
    refused(ask("sample", "--checkpoint", folder, "--count", 1, cwd=folder.parent), "model.safetensors", "damaged")


def test_folders_from_before_checksums_and_files_without_any_are_read(pair: Any, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["crc32"]
    (folder / "config.json").write_text(json.dumps(config))
    assert same(load(folder)[0], pair[0])
    content = lightning_content(*pair)
    torch.save(content, folder.parent / "old.ckpt", _use_new_zipfile_serialization=False)
    assert same(load(folder.parent / "old.ckpt")[0], pair[0])
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, folder.parent / "none.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(load(folder.parent / "none.ckpt")[0], pair[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("whose", ["model", "tokenizer"])
def test_weights_that_are_no_numbers(value: float, whose: str, tmp_path: Path) -> None:
    model, tokenizer = small_model(), small_tokenizer()
    damaged = model.word_embedding if whose == "model" else tokenizer.post_quant_conv
    nn.init.constant_(damaged.weight, value)
    for top_k in (None, 1, 5):
        with pytest.raises(UserError, match=rf"{whose}: some (logits|pixels) are NaN or infinite"):
            generate(model, tokenizer, 1, top_k=top_k)
    if whose == "model":
        save(tmp_path / "model", model, tokenizer)
        answer = ask("sample", "--checkpoint", "model", "--count", 1, cwd=tmp_path)
        refused(answer, "NaN or infinite", "earlier checkpoint")


def test_ties_of_top_k_stay_and_the_nucleus_is_of_what_it_kept() -> None:
    kept = filter_logits(torch.tensor([3.0, 2.9, 2.9, 2.9, 0.0]), top_k=2, top_p=0.5).isfinite()
    assert kept.tolist() == [True, True, True, True, False]
    assert filter_logits(torch.tensor([3.0, 2.9, 2.8, 2.7]), top_k=2, top_p=0.5).isfinite().tolist() == [True] + 3 * [
        False
    ]


# sizes and kinds: judged by the file's own tensors


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("model", {"depth": 1_000_000}),
        ("model", {"depth": -1}),
        ("model", {"width": 10**30}),
        ("model", {"heads": -2}),
        ("model", {"heads": 0}),
        ("model", {"num_classes": "many"}),
        ("model", {"scales": [1, 2, 10**9]}),
        ("model", {"scales": [1.5]}),
        ("model", {"scales": {"1": 2}}),
        ("model", {"drop_path": float("nan")}),
        ("model", {"blocks": {"class": "VARBlocks", "mlp_ratio": 1e30}}),
        ("model", {"blocks": []}),
        ("model", {"attention": {"class": ["FullAttention"]}}),
        ("tokenizer", {"channels": -8}),
        ("tokenizer", {"num_res_blocks": 10**9}),
        ("tokenizer", {"phi_layers": 10**9}),
        ("tokenizer", {"channel_multipliers": [2] * 40}),
        ("tokenizer", {"vocab_size": 2**62}),
        ("tokenizer", {"phi_ratio": "a"}),
        ("tokenizer", {"norm_groups": 0}),
    ],
)
def test_sizes_that_the_weights_contradict(part: str, change: dict[str, Any], folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[part] |= change
    (folder / "config.json").write_text(json.dumps(config))
    answer = ask("info", folder, seconds=10, memory_mb=2000)
    refused(answer, str(folder))
    assert answer.seconds < 5
    with pytest.raises(UserError, match=part):
        load(folder)


def test_json_that_is_nested_deep(folder: Path) -> None:
    (folder / "config.json").write_text('{"format": ' + "[" * 100_000 + "]" * 100_000 + "}")
    refused(ask("info", folder), "config.json", "JSON")


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.complex64])
@pytest.mark.parametrize("form", ["folder", "ckpt", "released"])
def test_weights_of_another_kind(kind: torch.dtype, form: str, pair: Any, folder: Path) -> None:
    model, tokenizer = pair
    name = "word_embedding.weight"
    state = dict(model.state_dict()) | {name: model.state_dict()[name].to(kind)}
    if form == "folder":
        write_tensors(folder / "model.safetensors", state)
        config = json.loads((folder / "config.json").read_text())
        config.pop("crc32")
        (folder / "config.json").write_text(json.dumps(config))
        source = folder
    elif form == "ckpt":
        content = lightning_content(model, tokenizer)
        content["state_dict"] |= {f"model.{key}": tensor for key, tensor in state.items()}
        source = folder.parent / "last.ckpt"
        torch.save(content, source)
    else:
        export_official(*published_pair(), folder.parent / "m.pth", folder.parent / "t.pth")
        released = torch.load(folder.parent / "m.pth")
        released["word_embed.weight"] = released["word_embed.weight"].to(kind)
        torch.save(released, folder.parent / "m.pth")
        with pytest.raises(UserError, match=r"m\.pth: word_embedding.*plain floating-point"):
            import_official(folder.parent / "m.pth", folder.parent / "t.pth", "var", SCALES)
        return
    with pytest.raises(UserError, match=f"{name}: its numbers are .*plain floating-point"):
        load(source)


@pytest.mark.parametrize(
    "odd", [None, 3, [], {1: torch.zeros(1)}, {"model.x": 1}, {"model.x": torch.zeros(2).to_sparse()}]
)
def test_state_dicts_that_are_none(odd: Any, pair: Any, tmp_path: Path) -> None:
    torch.save(lightning_content(*pair) | {"state_dict": odd}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"last\.ckpt"):
        load(tmp_path / "last.ckpt")
    torch.save(odd, tmp_path / "m.pth")
    answer = ask(
        "import", "--architecture", "var", "--model", "m.pth", "--tokenizer", "m.pth", "--out", "o", cwd=tmp_path
    )
    refused(answer, "m.pth")


@pytest.mark.parametrize("prefix", ["_forward_module.", "module.", "_orig_mod.", "_forward_module._orig_mod."])
def test_names_of_wrappers_are_read(prefix: str, pair: Any, tmp_path: Path) -> None:
    content = lightning_content(*pair)
    content["state_dict"] = {prefix + key: tensor for key, tensor in content["state_dict"].items()}
    torch.save(content, tmp_path / "last.ckpt")
    assert same(load(tmp_path / "last.ckpt")[0], pair[0])
    model, tokenizer = published_pair()
    export_official(model, tokenizer, tmp_path / "m.pth", tmp_path / "t.pth")
    for name in ("m.pth", "t.pth"):
        state = torch.load(tmp_path / name)
        torch.save({prefix + key: tensor for key, tensor in state.items()}, tmp_path / name)
    assert same(import_official(tmp_path / "m.pth", tmp_path / "t.pth", "var", SCALES)[0], model)


def test_names_that_are_no_wrappers_stay() -> None:
    own = {"blocks.0.module.weight": 1, "blocks.0.weight": 2}
    assert plain_names({f"module._orig_mod.{name}": value for name, value in own.items()}, "x") == own


class Annotated:
    def __init__(self, anything: Any = None, pair: tuple[int, str] = (1, "a"), many: tuple[int, ...] = ()) -> None: ...


def test_arguments_of_an_axis_of_ones_own_are_compared_with_their_types() -> None:
    init = Annotated.__init__
    check_types(init, {"anything": [1], "pair": [1, "a"], "many": [1, 2, 3]})
    for wrong in ({"pair": ["a", 1]}, {"pair": [1]}, {"many": [1, "a"]}):
        with pytest.raises(UserError, match="must be tuple"):
            check_types(init, wrong)


@pytest.mark.parametrize("index", ["999999999", "9" * 5000])
def test_names_that_count_to_more_than_there_is(index: str, tmp_path: Path) -> None:
    export_official(*published_pair(), tmp_path / "m.pth", tmp_path / "t.pth")
    for name, key in (("m.pth", "blocks.{}.attn.proj.bias"), ("t.pth", "quantize.quant_resi.qresi_ls.{}.weight")):
        state = torch.load(tmp_path / name)
        torch.save(state | {key.format(index): torch.zeros(4)}, tmp_path / f"odd-{name}")
    for files_ in (("odd-m.pth", "t.pth"), ("m.pth", "odd-t.pth")):
        with pytest.raises(UserError, match="a name counts to 999"):
            import_official(*(tmp_path / name for name in files_), "var", SCALES)
