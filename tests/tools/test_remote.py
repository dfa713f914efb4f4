"""Bytes that lie elsewhere, from a real server with faults: whole, or one line; broken transfers go on."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_server import FaultyServer, serving

from mvar_lightning.errors import UserError
from mvar_lightning.tools import remote
from mvar_lightning.tools.copies import download, local_copy
from mvar_lightning.tools.remote import TransferError, open_remote, plain

DATA = os.urandom(300_000)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setattr(remote, "WAITS", (0.01, 0.01, 0.01))
    monkeypatch.setenv("MVAR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "x.bin").write_bytes(DATA)
    with serving(tmp_path / "served") as server:
        yield server


def read(server: FaultyServer, expected: int = 0) -> bytes:
    with open_remote(f"{server.url}/x.bin", expected, "shard") as file:
        return file.read()


@pytest.mark.parametrize("expected", [0, len(DATA)])
def test_a_file_comes_whole(server, expected):
    assert read(server, expected) == DATA
    assert server.asked["/x.bin"] == 1


@pytest.mark.parametrize("lie", ["", "no ranges", "other range", "other bytes"])
def test_a_broken_transfer_gives_the_same_bytes_from_any_server(server, lie, caplog):
    server.breaks, server.lies = {"/x.bin": 1}, {"/x.bin": lie}
    with caplog.at_level(logging.WARNING):
        assert read(server, len(DATA)) == DATA
    assert "/x.bin: " in caplog.text and "trying again" in caplog.text


def test_a_transfer_that_breaks_at_nine_tenths_is_not_read_again(server):
    server.breaks, server.at = {"/x.bin": 1}, 0.9
    assert read(server) == DATA
    assert server.sent["/x.bin"] <= 1.01 * len(DATA)
    assert server.ranges[1][1] == f"bytes={int(0.9 * len(DATA)) - remote.TAIL}-"


def test_each_try_may_go_further(server, monkeypatch):
    """Tries are counted anew while bytes come: a bad line is no bad server."""
    monkeypatch.setattr(remote, "PROGRESS", 1000)
    server.breaks, server.at = {"/x.bin": 8}, 0.3
    assert read(server) == DATA
    assert server.asked["/x.bin"] == 9


@pytest.mark.parametrize("statuses", [[503], [500, 502, 429, 503]])
def test_a_server_that_does_not_work_is_told_with_the_tries(server, statuses):
    server.statuses = {"/x.bin": list(statuses)}
    with pytest.raises(UserError, match=r"^shard http://\S+/x\.bin: cannot be read \(HTTP error 503, 4 tries\); check"):
        read(server)


def test_a_server_that_works_again_is_read(server):
    server.statuses = {"/x.bin": [503, 429, 200]}
    assert read(server) == DATA


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_final_answers_are_not_asked_for_again(server, status):
    server.statuses = {"/x.bin": [status]}
    with pytest.raises(UserError, match=rf"cannot be read \(HTTP error {status}\); check the address"):
        read(server)
    assert server.asked["/x.bin"] == 1


@pytest.mark.parametrize("lie", ["longer", "shorter"])
def test_a_length_that_is_not_what_the_index_says(server, lie):
    server.lies = {"/x.bin": lie}
    with pytest.raises(UserError, match=rf"x\.bin: has \d+ bytes instead of {len(DATA)}"):
        read(server, len(DATA))


def test_a_length_that_the_server_does_not_keep(server):
    server.lies = {"/x.bin": "longer"}
    with pytest.raises(TransferError, match=rf"was changed .*{len(DATA) + 1000} bytes at first, {len(DATA)} now"):
        read(server)


def test_a_file_that_changes_while_it_is_read(server):
    server.breaks, server.lies = {"/x.bin": 1}, {"/x.bin": "changes"}
    with pytest.raises(TransferError, match=r"x\.bin was changed while it was read"):
        read(server)


def test_silent_and_slow_servers_end(server, monkeypatch):
    monkeypatch.setattr(remote, "SILENCE", 0.1)
    server.silent = {"/x.bin"}
    with pytest.raises(TransferError, match=r"broke off: no byte for 0 seconds, 4 tries"):
        read(server)
    server.silent, server.trickling = set(), {"/x.bin"}
    with pytest.raises((UserError, TransferError), match=r"\d+ bytes in 0 seconds, 4 tries"):
        read(server)


def test_nobody_there(server):
    with pytest.raises(UserError, match=r"^shard http://127\.0\.0\.1:9/x: cannot be read \(.*, 4 tries\)"):
        open_remote("http://127.0.0.1:9/x", what="shard").read()
    with pytest.raises(UserError, match=r"^http://127\.0\.0\.1:9/x: cannot be read \(.*, 4 tries\)"):
        local_copy("http://127.0.0.1:9", "x")


@pytest.mark.parametrize(("status", "words"), [(503, "HTTP error 503, 4 tries"), (404, "HTTP error 404"), (403, "403")])
def test_what_is_asked_of_a_file_before_it_is_copied_is_judged_alike(server, status, words):
    server.statuses, server.heads_too = {"/x.bin": [status]}, True
    with pytest.raises(UserError, match=rf"x\.bin: cannot be read \(.*{words}\)"):
        local_copy(server.url, "x.bin")


def test_forked_processes_read_too(server):
    assert read(server) == DATA  # the parent's loop is there, and must not be the child's
    child = os.fork()
    if not child:
        os._exit(0 if read(server) == DATA else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


REFUSED = (
    "pipe:true PIPE://true \tpipe:true pi\npe:true ftp://host/x ipfs://x x/y://z - file:///x memory://x HTTP://host/x "
    "https://host/a::file:///etc/passwd simplecache::https://host/a http:// http://[x"
)


@pytest.mark.parametrize("address", REFUSED.split(" "))
def test_only_listed_schemes_are_opened(address):
    with pytest.raises(UserError, match=r"runs a command|are not opened|is no address"):
        open_remote(address)


@pytest.mark.parametrize("scheme", ["gs", "az", "hf"])
def test_a_missing_package_is_named_by_its_extra(scheme, monkeypatch):
    import fsspec

    def lacks(*_: object, **__: object) -> None:
        raise ImportError("install it")

    monkeypatch.setattr(fsspec, "filesystem", lacks)
    with pytest.raises(
        UserError, match=rf"{scheme}:// needs another package .*pip install 'mvar-lightning\[{scheme}\]'"
    ):
        open_remote(f"{scheme}://bucket/x").read()


def test_file_addresses_are_paths():
    assert plain("file:///a%20b/c") == "/a b/c" and plain("a/b") == "a/b"
    with pytest.raises(UserError, match="a file of the machine 'host'"):
        plain("file://host/a")


# -- on the disk


def parts(folder: Path) -> list[Path]:
    return list(folder.glob(".*.part"))


def test_a_download_goes_on_where_it_was_killed(server, tmp_path):
    url, target = f"{server.url}/x.bin", tmp_path / "to" / "x.bin"
    server.breaks, server.at = {"/x.bin": 4}, 0.9
    with pytest.raises(UserError, match=r"broke off: .*; what came is kept, and the same command goes on"):
        download(url, target)
    assert len(parts(target.parent)) == 1 and not target.exists()
    server.sent.clear()
    told: list[int] = []
    digest = download(url, target, progress=lambda had, size: told.extend((had, size or 0)) or told.append)
    assert target.read_bytes() == DATA and digest == hashlib.sha256(DATA).hexdigest()
    assert server.sent["/x.bin"] < 0.01 * len(DATA)
    assert told[1] == len(DATA) == told[0] + sum(told[2:])
    assert not parts(target.parent)


def test_another_hash_leaves_nothing(server, tmp_path):
    with pytest.raises(UserError, match=r"has the SHA-256 \w{64} instead of 0123; nothing is kept"):
        download(f"{server.url}/x.bin", tmp_path / "y", "0123")
    assert not (tmp_path / "y").exists() and not parts(tmp_path)


def test_a_part_of_another_version_is_not_gone_on_with(server, tmp_path):
    server.breaks = {"/x.bin": 4}
    with pytest.raises(UserError, match="what came is kept"):
        download(f"{server.url}/x.bin", tmp_path / "y")
    other = os.urandom(len(DATA))
    (server.folder / "x.bin").write_bytes(other)
    server.versions["/x.bin"] += 1
    download(f"{server.url}/x.bin", tmp_path / "y")
    assert (tmp_path / "y").read_bytes() == other


def test_two_at_once_get_one_whole_file(server, tmp_path):
    done: list[str] = []
    url, target = f"{server.url}/x.bin", tmp_path / "y"
    children = []
    for _ in range(2):
        if not (child := os.fork()):
            try:
                download(url, target)
            finally:
                os._exit(0 if target.is_file() and target.read_bytes() == DATA else 1)
        children.append(child)
    done = [str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children]
    assert done == ["0", "0"] and not parts(tmp_path)


def test_what_cannot_be_written_is_told(server, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot be written"):
        download(f"{server.url}/x.bin", tmp_path / "file" / "y")


def test_copies_are_renewed_when_the_file_is(server):
    first = local_copy(server.url, "x.bin")
    assert first.read_bytes() == DATA and local_copy(server.url + "/", "x.bin") == first
    assert server.asked["/x.bin"] == 1
    (server.folder / "x.bin").write_bytes(DATA[:100])
    server.versions["/x.bin"] += 1
    assert local_copy(server.url, "x.bin").read_bytes() == DATA[:100]
