"""Shards from URLs, brace ranges and commands, over a real server: same stream, and every fault named."""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from mvar_lightning.data.image_data import ShardsDataModule
from mvar_lightning.data.index import ShardInfo, read_index
from mvar_lightning.data.reading import place as remote
from mvar_lightning.data.reading.place import ShardPlace, expand, index_at
from mvar_lightning.data.reading.samples import Faults, read_shard
from mvar_lightning.errors import UserError


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; `server.breaks[path]` times it breaks off in the middle, `server.silent` paths never end."""

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        path = Path(self.translate_path(self.path))
        breaks = self.server.breaks.get(self.path, 0)
        if not path.is_file() or (breaks < self.server.asked[self.path] and self.path not in self.server.silent):
            return super().do_GET()
        data = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        if self.path in self.server.silent:
            self.server.over.wait(20)
        self.close_connection = True
        return None

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(remote, "WAITS", (0.01, 0.01, 0.01))
    servers = []

    def start(folder: Path) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        server.asked, server.breaks, server.silent = Counter(), {}, set()
        server.over = threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.over.set()
        server.shutdown()
        server.server_close()


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
    server.breaks = {"/train/000002.tar": 2}
    shard = read_index(folder).split("train").shards[2]
    with caplog.at_level(logging.WARNING):
        got = list(read_shard(ShardPlace(server.url), shard, Faults(1)))
    assert got == list(read_shard(ShardPlace(str(folder)), shard, Faults(1)))
    assert server.asked["/train/000002.tar"] == 3
    assert f"{server.url}/train/000002.tar: ended after {shard.bytes // 2} of {shard.bytes} bytes" in caplog.text


def test_a_transfer_that_never_succeeds_is_damage_and_named(numbered_shards, serve, caplog):
    folder = numbered_shards()
    server = serve(folder)
    server.breaks = {"/train/000002.tar": 99}
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
    server.silent = {"/train/000001.tar"}
    with pytest.raises(UserError, match=r"train/000001\.tar is damaged: transfer broke off: no byte for"):
        images(module_of(server.url).train_dataloader())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_the_server_lacks_is_named(numbered_shards, serve, workers):
    folder = numbered_shards()
    server = serve(folder)
    data = module_of(server.url, num_workers=workers)
    (folder / "train" / "000003.tar").unlink()
    with pytest.raises(UserError, match=rf"shard {server.url}/train/000003\.tar: cannot be read .*HTTP error"):
        images(data.train_dataloader())


def test_a_url_without_an_index_says_so(tmp_path, serve):
    server = serve(tmp_path)
    with pytest.raises(UserError, match=rf"{server.url}/index\.json: cannot be read .*`mvar shards make`"):
        index_at(server.url)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(UserError, match="not a valid index"):
        index_at(server.url + "/")
    with pytest.raises(UserError, match="cannot be read"):
        index_at("http://127.0.0.1:9/nothing")
    with pytest.raises(UserError, match="of this kind are not opened"):
        index_at("ipfs://nothing")


@pytest.fixture
def fake_aws(tmp_path, monkeypatch):
    """A program `aws` that copies a file from `bucket/` and writes down what it was asked."""
    programs = tmp_path / "programs"
    programs.mkdir()
    program = programs / "aws"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ncat {tmp_path}/"${{4#s3://}}"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    return tmp_path


def test_s3_is_read_by_the_aws_program(numbered_shards, fake_aws):
    folder = numbered_shards(train=8, val=5, samples_per_shard=2)
    folder.rename(fake_aws / "bucket")
    here, there = module_of(fake_aws / "bucket"), module_of("s3://bucket")
    assert torch.equal(images(here.val_dataloader()), images(there.val_dataloader()))
    assert torch.equal(images(here.train_dataloader()), images(there.train_dataloader()))
    asked = (fake_aws / "asked").read_text().splitlines()
    assert asked[0] == "s3 cp --only-show-errors s3://bucket/index.json -"


def test_a_missing_program_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="needs the program `gsutil`"):
        index_at("gs://bucket/shards")


def test_commands_run_only_where_they_are_allowed(numbered_shards, tmp_path):
    folder = numbered_shards()
    shards = {
        "train_shards": f"pipe:touch {tmp_path}/ran; cat {folder}/train/000000.tar",
        "val_shards": f"{folder}/val/000000.tar",
        "num_classes": 3,
        "epoch_samples": 8,
    }
    with pytest.raises(UserError, match=r"pipe:touch .*runs a command; set data\.allow_pipe to true"):
        images(module_of(None, **shards).train_dataloader())
    assert not (tmp_path / "ran").exists()
    assert len(images(module_of(None, allow_pipe=True, **shards).train_dataloader())) == 8
    assert (tmp_path / "ran").exists()
    with pytest.raises(UserError, match="runs a command"):
        module_of(None, **(shards | {"val_shards": shards["train_shards"]})).setup("fit")


def test_a_name_in_a_local_index_is_never_a_url(tmp_path):
    for name in (f"pipe:touch {tmp_path}/owned", "http://127.0.0.1:9/x.tar"):
        with pytest.raises(UserError, match="cannot be opened"):
            ShardPlace(str(tmp_path), allow_pipe=True).open(ShardInfo(name, 1, 1, ""))
    assert not (tmp_path / "owned").exists()


def test_brace_ranges():
    assert expand("a/{08..11}.tar") == [f"a/{n}.tar" for n in ("08", "09", "10", "11")]
    assert expand(["{a,b}.tar", "pipe:cat x | awk '{print}'"]) == ["a.tar", "b.tar", "pipe:cat x | awk '{print}'"]
    with pytest.raises(UserError, match="a brace is not closed"):
        expand("a/{00..11.tar")


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
