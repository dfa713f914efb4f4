"""Checkpoints at an address: copied by name, kept while they are the same, told where they are not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from faulty_server import FaultyServer, serving

from mvar_lightning import import_official, load, save
from mvar_lightning.checkpoints.source import Source, beside, open_tokenizer
from mvar_lightning.errors import UserError
from mvar_lightning.tools import remote
from tests.checkpoints.conftest import Pair


@pytest.fixture
def server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: dict[str, Pair], released: dict[str, tuple[Path, Path]]
) -> Iterator[FaultyServer]:
    monkeypatch.setattr(remote, "WAITS", (0.01,))
    monkeypatch.setenv("MVAR_CACHE", str(tmp_path / "cache"))
    model, tokenizer = pairs["var_tiny"]
    save(tmp_path / "s" / "run" / "model", model, tokenizer)
    save(tmp_path / "s" / "tok", None, tokenizer)
    for file, name in zip(released["var_tiny"], ("var.pth", "vae.pth"), strict=True):
        (tmp_path / "s" / name).write_bytes(file.read_bytes())
    with serving(tmp_path / "s") as server:
        yield server


@pytest.mark.parametrize("name", ["run/", "run/model"])
def test_a_folder_or_a_run_is_copied_and_loaded_once(server: FaultyServer, name: str, pairs: dict[str, Pair]) -> None:
    for _ in range(2):
        model, _ = load(f"{server.url}/{name}")
    assert model is not None
    weights = model.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in pairs["var_tiny"][0].state_dict().items())
    assert server.asked["/run/model/model.safetensors"] == 1
    assert load(f"{server.url}/tok")[0] is None


def test_released_files_are_read_from_addresses(server: FaultyServer, pairs: dict[str, Pair]) -> None:
    urls = f"{server.url}/var.pth", f"{server.url}/vae.pth"
    there = import_official(*urls, "var", patch_nums=pairs["var_tiny"][0].pyramid.sides)
    for one, other in zip(pairs["var_tiny"], there, strict=True):
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


def test_what_is_not_there_is_told_and_what_changed_is_copied_anew(
    server: FaultyServer, pairs: dict[str, Pair]
) -> None:
    with pytest.raises(UserError, match=rf"checkpoint {server.url}/none: has no config\.json, nor one in a model/"):
        load(f"{server.url}/none")
    with pytest.raises(UserError, match=rf"checkpoint {server.url}/none\.ckpt: cannot be read .*404"):
        load(f"{server.url}/none.ckpt")
    with pytest.raises(UserError, match=r"'ftp://host/none/config\.json'.* are not opened"):
        load("ftp://host/none")
    load(f"{server.url}/tok")
    (server.folder / "tok" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json"):
        load(f"{server.url}/tok")


def test_results_of_a_remote_checkpoint_are_written_here() -> None:
    assert beside("s3://bucket/run/") == Path("evaluation/run")
    assert Source("s3://bucket/run").inside_run() == Source("s3://bucket/run")
    with pytest.raises(UserError, match=r"no such|cannot be read"):
        open_tokenizer("none.pth")
