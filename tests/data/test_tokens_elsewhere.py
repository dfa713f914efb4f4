"""A token cache at an address: batches as from its folder, parts copied once, damage told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from faulty_server import FaultyServer, serving
from token_files import write_token_cache

from mvar_lightning.data.token_data import TokenShardsDataModule
from mvar_lightning.data.tokens.cache import check_cache, read_cache
from mvar_lightning.errors import UserError
from mvar_lightning.tools import remote


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setattr(remote, "WAITS", (0.01,))
    monkeypatch.setenv("MVAR_CACHE", str(tmp_path / "cache"))
    write_token_cache(tmp_path / "c", views=2)
    with serving(tmp_path / "c") as server:
        yield server


def tokens(path: object, split: str, workers: int = 0) -> torch.Tensor:
    data = TokenShardsDataModule(str(path), batch_size=4, num_workers=workers)
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader() if split == "train" else data.val_dataloader()
    return torch.cat([batch["tokens"] for batch in loader])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_folder(server: FaultyServer, workers: int) -> None:
    for split in ("train", "val"):
        assert torch.equal(tokens(server.url, split, workers), tokens(server.folder, split))
    for part in read_cache(server.folder).parts:
        assert server.asked[f"/{part.name}.npy"] <= 1, "copied once, by whichever process is first"


def test_what_is_damaged_or_gone_is_told(server: FaultyServer) -> None:
    assert check_cache(server.url) == []
    part = next(part for part in read_cache(server.folder).parts if part.samples)
    file = server.folder / f"{part.name}.npy"
    whole = file.read_bytes()
    (server.folder / "tokens.json").write_bytes((server.folder / "tokens.json").read_bytes() + b"\n")  # another cache
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"token cache {server.url}: {part.name}: damaged"):
        tokens(server.url, part.name.split("/")[0])
    file.unlink()
    problems = check_cache(server.url)
    assert len(problems) == 1 and f"{part.name}.npy: cannot be read (HTTP error 404)" in problems[0]
    (server.folder / "tokens.json").unlink()
    with pytest.raises(UserError, match=r"token cache http\S+/tokens\.json: cannot be read .*; give the address of"):
        read_cache(server.url)
