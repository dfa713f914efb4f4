"""Shards from addresses and brace ranges, over a real server: same stream, and every fault named."""

from __future__ import annotations

import logging
import re
from contextlib import ExitStack

import pytest
import torch
from faulty_server import serving

from mvar_lightning.data.check import check
from mvar_lightning.data.image_data import ShardsDataModule
from mvar_lightning.data.index import ShardInfo, read_index
from mvar_lightning.data.reading.place import ShardPlace, expand
from mvar_lightning.data.reading.samples import Faults, read_shard
from mvar_lightning.errors import UserError
from mvar_lightning.tools import remote


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(remote, "WAITS", (0.01, 0.01, 0.01))
    with ExitStack() as servers:
        yield lambda folder: servers.enter_context(serving(folder))


def module_of(path, **options) -> ShardsDataModule:
    defaults = {"image_size": 8, "batch_size": 4, "num_workers": 0, "resize_ratio": 1.0}
    return ShardsDataModule(path if path is None else str(path), **(defaults | options))


def images(loader) -> torch.Tensor:
    return torch.cat([batch["image"] for batch in loader])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_url_streams_what_its_folder_does(numbered_shards, serve, workers):
    folder = numbered_shards(train=20, val=9, samples_per_shard=5)
    here, there = module_of(folder), module_of(serve(folder).url, num_workers=workers)
    here.num_workers = workers
    there.prepare_data()
    there.setup("fit")
    assert there.class_names == here.class_names
    assert torch.equal(images(there.val_dataloader()), images(here.val_dataloader()))
    one, two = here.train_dataloader(), there.train_dataloader()
    assert len(two) == 5
    assert torch.equal(images(one), images(two))
    assert torch.equal(images(one), images(two))  # the next epoch


def test_shards_without_an_index_by_brace_ranges(numbered_shards, serve):
    folder = numbered_shards(train=20, val=8, samples_per_shard=5)
    want = images(module_of(folder).val_dataloader())
    for root in (folder, serve(folder).url):
        data = module_of(
            None,
            train_shards=f"{root}/train/{{000000..000003}}.tar",
            val_shards=[f"{root}/val/00000{{0,1}}.tar", f"{root}/val/00000{{2..3}}.tar"],
            num_classes=3,
            epoch_samples=16,
        )
        data.prepare_data()
        data.setup("fit")
        assert (data.num_classes, data.val_samples, len(data.train_dataloader())) == (3, 8, 4)
        assert torch.equal(images(data.val_dataloader()), want)
        assert len(images(data.train_dataloader())) == 16


def test_uncounted_training_shards_need_an_epoch(numbered_shards, serve):
    folder = numbered_shards()
    url = serve(folder).url
    options = {"val_shards": f"{url}/val/000000.tar", "num_classes": 3}
    data = module_of(None, train_shards=f"{url}/train/{{000000..000003}}.tar", **options)
    with pytest.raises(UserError, match="not counted; give epoch_samples"):
        data.train_dataloader()
    local = module_of(None, train_shards=f"{folder}/train/{{000000..000003}}.tar", **options)
    assert len(local.train_dataloader()) == 10


def test_a_transfer_that_breaks_off_is_taken_up_again(numbered_shards, serve, caplog):
    folder = numbered_shards()
    server = serve(folder)
    server.breaks, server.at = {"/train/000002.tar": 2}, 0.3
    shard = read_index(folder).split("train").shards[2]
    with caplog.at_level(logging.WARNING):
        got = list(read_shard(ShardPlace(server.url), shard, Faults(1)))
    assert got == list(read_shard(ShardPlace(str(folder)), shard, Faults(1)))
    assert server.asked["/train/000002.tar"] == 3
    assert f"shard {server.url}/train/000002.tar: " in caplog.text
    assert server.sent["/train/000002.tar"] <= shard.bytes + 2 * remote.TAIL


def test_a_transfer_that_never_succeeds_is_damage_and_named(numbered_shards, serve, caplog):
    folder = numbered_shards()
    server = serve(folder)
    server.breaks, server.at = {"/train/000002.tar": 99}, 0.25
    shard = read_index(folder).split("train").shards[2]
    with caplog.at_level(logging.WARNING):
        got = list(read_shard(ShardPlace(server.url), shard, Faults(num_shards=1000)))
    assert 0 < len(got) < 10
    assert server.asked["/train/000002.tar"] == 1 + len(remote.WAITS)
    assert "shard train/000002.tar is damaged: transfer broke off" in caplog.text
    with pytest.raises(UserError, match=r"train/000002\.tar is damaged: transfer broke off"):
        images(module_of(server.url).train_dataloader())


def test_a_silent_server_does_not_hang_the_run(numbered_shards, serve, monkeypatch):
    monkeypatch.setattr(remote, "SILENCE", 0.3)
    folder = numbered_shards()
    server = serve(folder)
    server.silent, server.at = {"/train/000001.tar"}, 0.1
    with pytest.raises(UserError, match=r"train/000001\.tar is damaged: transfer broke off: no byte for"):
        images(module_of(server.url).train_dataloader())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_the_server_lacks_is_named(numbered_shards, serve, workers):
    folder = numbered_shards()
    server = serve(folder)
    data = module_of(server.url, num_workers=workers)
    (folder / "train" / "000003.tar").unlink()
    with pytest.raises(UserError, match=rf"shard {server.url}/train/000003\.tar: cannot be read .*HTTP error 404"):
        images(data.train_dataloader())


def test_a_url_without_an_index_says_so(tmp_path, serve):
    server = serve(tmp_path)
    with pytest.raises(UserError, match=rf"{server.url}/index\.json: cannot be read .*`mvar shards make`"):
        read_index(server.url)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(UserError, match="not a valid index"):
        read_index(server.url + "/")
    with pytest.raises(UserError, match="cannot be read"):
        read_index("http://127.0.0.1:9/nothing")
    with pytest.raises(UserError, match="of this kind are not opened"):
        read_index("ipfs://nothing")


def test_commands_are_not_run(numbered_shards, tmp_path):
    folder = numbered_shards()
    shards = {"val_shards": f"{folder}/val/000000.tar", "num_classes": 3, "epoch_samples": 8}
    command = f"pipe:touch {tmp_path}/ran; cat {folder}/train/000000.tar"
    with pytest.raises(UserError, match=r"shards pipe:touch .*: runs a command, which is not done any more"):
        images(module_of(None, train_shards=command, **shards).train_dataloader())
    with pytest.raises(UserError, match=r"data\.allow_pipe True: commands are not run any more"):
        module_of(None, train_shards=command, allow_pipe=True, **shards)
    of_0_1 = {"train_shards": shards["val_shards"], "allow_pipe": False}
    assert module_of(None, **of_0_1, **shards).val_samples
    assert not (tmp_path / "ran").exists()


def test_file_addresses_are_local(numbered_shards):
    folder = numbered_shards()
    here, there = module_of(folder), module_of(f"file://{folder}")
    assert torch.equal(images(here.val_dataloader()), images(there.val_dataloader()))
    name = f"file://{folder}/val/{{000000..000001}}.tar"
    named = module_of(None, train_shards=name, val_shards=name, num_classes=3)
    assert named.train_samples == 6
    with pytest.raises(UserError, match=r"data folder /none: does not exist"):
        _ = module_of("file:///none").index


def test_shards_at_an_address_are_checked(numbered_shards, serve, rewrite_shard):
    folder = numbered_shards()
    server = serve(folder)
    assert check(server.url, decode=True) == []
    assert max(server.asked.values()) == 1
    rewrite_shard(folder, "train/000001.tar", lambda name, data: (name, b"x" if name.endswith("cls") else data))
    shard = folder / "train" / "000002.tar"
    shard.write_bytes(shard.read_bytes()[:-600] + bytes(599) + b"x")
    (folder / "train" / "000003.tar").unlink()
    cut = folder / "val" / "000000.tar"
    cut.write_bytes(cut.read_bytes()[:-512])
    problems = "\n".join(check(server.url, decode=True))
    for problem in (
        r"train/000001.tar, \S+: label b'x' is not a number",
        r"train/000002.tar: damaged \(its content does not match the checksum",
        rf"{server.url}/train/000003.tar: cannot be read \(HTTP error 404\)",
        rf"{server.url}/val/000000.tar: has \d+ bytes instead of \d+",
    ):
        assert re.search(problem, problems), problems


def test_a_name_in_a_local_index_is_never_a_url(tmp_path):
    for name in (f"pipe:touch {tmp_path}/owned", "http://127.0.0.1:9/x.tar"):
        with pytest.raises(UserError, match="cannot be opened"):
            ShardPlace(str(tmp_path)).open(ShardInfo(name, 1, 1, ""))
    assert not (tmp_path / "owned").exists()


def test_brace_ranges():
    assert expand("a/{08..11}.tar") == [f"a/{n}.tar" for n in ("08", "09", "10", "11")]
    assert expand(["{a,b}.tar", "pipe:cat x | awk '{print}'"]) == ["a.tar", "b.tar", "pipe:cat x | awk '{print}'"]
    with pytest.raises(UserError, match="a brace is not closed"):
        expand("a/{00..11.tar")


def test_list_files_and_too_many_names(tmp_path):
    (tmp_path / "shards.txt").write_text("a.tar\nhttps://host/b.tar\n")
    assert expand(str(tmp_path / "shards.txt")) == [str(tmp_path / "a.tar"), "https://host/b.tar"]
    with pytest.raises(UserError, match="more than 1000000 names"):
        expand("x/{0..999999}/{0..9}.tar")
    with pytest.raises(UserError, match=r"none\.txt: cannot be read"):
        expand("none.txt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one"),
        ({"path": "x", "train_shards": "y"}, "give one"),
        ({"train_shards": "y", "num_classes": 3}, r"give data\.val_shards"),
        ({"train_shards": "y", "val_shards": "y"}, r"give data\.val_shards and data\.num_classes"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(UserError, match=message):
        module_of(**({"path": None} | options))


def test_what_is_wrong_with_named_shards(numbered_shards, tmp_path):
    folder = numbered_shards()
    good = f"{folder}/train/000000.tar"
    (tmp_path / "bad.tar").write_text("no tar")
    for shards, message in ((f"{folder}/train/9.tar", "9.tar: missing"), (f"{tmp_path}/bad.tar", "not a tar file")):
        with pytest.raises(UserError, match=message):
            _ = module_of(None, train_shards=good, val_shards=shards, num_classes=3).index
    with pytest.raises(UserError, match=r"num_classes 4: .* has 3"):
        _ = module_of(folder, num_classes=4).index
