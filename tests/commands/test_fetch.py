"""`mvar fetch` from a local server: whole files by their names, resumed, hashed, or one line; and what finds them."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from faulty_server import FaultyServer, serving

from mvar_lightning.checkpoints import released
from mvar_lightning.checkpoints.folder import located
from mvar_lightning.cli import main
from mvar_lightning.metrics.features import INCEPTION_ADDRESS
from mvar_lightning.tokenizer.perceptual import VGG_ADDRESS, VGG_HASH
from mvar_lightning.tools import remote

DATA = os.urandom(200_000)
FILE = "vgg16-397923af.pth"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setattr(remote, "WAITS", (0.01,))
    monkeypatch.setenv("MVAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    pinned = {"vgg": hashlib.sha256(DATA).hexdigest()}
    files = tuple(replace(file, sha256=pinned.get(file.name, file.sha256)) for file in released.FILES)
    monkeypatch.setattr(released, "FILES", files)
    served = tmp_path / "served"
    served.mkdir()
    for name in (FILE, "var_d20.pth", "var_d16.pth"):
        (served / name).write_bytes(DATA)
    with serving(served) as server:
        yield server


def kept(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.suffix != ".lock")


def test_a_file_is_fetched_once_and_found_by_its_name(server, tmp_path, capsys):
    for _ in range(2):
        assert main(["fetch", "vgg", "--mirror", server.url]) == 0
        said = capsys.readouterr().out
        assert str(tmp_path / "cache" / "weights" / FILE) in said and "as it must be" in said
    assert server.asked[f"/{FILE}"] == 1
    for name in (FILE, f"weights/{FILE}"):
        assert located(name) == tmp_path / "cache" / "weights" / FILE
    assert located(f"elsewhere/{FILE}") == Path("elsewhere") / FILE
    Path(FILE).write_text("one that is here")
    assert located(FILE) == Path(FILE)


def test_what_is_not_pinned_is_said_so_with_its_hash(server, capsys):
    assert main(["fetch", "var-d20", "var_d20.pth", "--mirror", server.url, "--to", "here"]) == 0
    said = capsys.readouterr().out
    assert f"SHA-256 {hashlib.sha256(DATA).hexdigest()} (not pinned" in said and said.count("SHA-256") == 1
    assert Path("here/var_d20.pth").read_bytes() == DATA


def test_another_hash_is_refused_and_nothing_kept(server, tmp_path, capsys):
    assert main(["fetch", "var-d16", "--mirror", server.url]) == 2
    assert "instead of 4f6151aad91c" in capsys.readouterr().err
    assert kept(tmp_path) == ["weights"]
    assert main(["fetch", "vgg", "--mirror", server.url]) == 0
    (tmp_path / "cache" / "weights" / FILE).write_bytes(b"changed since")
    assert main(["fetch", "vgg", "--mirror", server.url]) == 2
    assert "remove it and fetch it again" in capsys.readouterr().err


def test_a_fetch_that_is_killed_goes_on(server, tmp_path, capsys):
    server.silent, server.at = {f"/{FILE}"}, 0.9
    command = [sys.executable, "-m", "mvar_lightning", "fetch", "vgg", "--mirror", server.url]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not any(p.stat().st_size for p in (tmp_path / "cache").rglob("*.part")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err == "mvar: fetch: interrupted; the same command goes on\n"
    had = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.part"))
    server.silent = set()
    server.sent.clear()
    assert main(["fetch", "vgg", "--mirror", server.url]) == 0
    assert server.sent[f"/{FILE}"] == len(DATA) - had + remote.TAIL
    assert kept(tmp_path) == [FILE, "weights"]


def test_mistakes_are_one_line(server, tmp_path, capsys):
    for argv, message in (
        (["vg"], "no released file 'vg'; did you mean vgg?"),
        (["nothing"], "mvar fetch --list lists them"),
        (["markov-var-d16"], "no address of its weights"),
        (["vgg", "--mirror", "here"], "--mirror here: is no address"),
        (["vgg", "--mirror", "ftp://x"], "are not opened"),
        (["mvar-d16", "--mirror", server.url], f"{server.url}/mvar-d16.pth: cannot be read (HTTP error 404)"),
        (["vgg", "--mirror", server.url, "--to", f"served/{FILE}"], "cannot be written"),
    ):
        assert main(["fetch", *argv]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err
    assert not kept(tmp_path) or kept(tmp_path) == ["weights"]


def test_the_list_needs_no_network(server, capsys):
    assert main(["fetch"]) == main(["fetch", "--list", "vgg"]) == 0
    said = capsys.readouterr().out
    for file in released.FILES:
        assert f"{file.name}: {file.address}" in said
    assert not server.ranges


def test_addresses_are_those_that_the_rest_of_the_suite_names(monkeypatch):
    by_name = {file.name: file for file in released.FILES}
    assert by_name["inception"].address == INCEPTION_ADDRESS and by_name["vgg"].address == VGG_ADDRESS
    assert by_name["vgg"].sha256.startswith(VGG_HASH)
    for file in released.FILES:
        stem = file.file.removesuffix(".pth").rpartition("-")[2]
        assert not file.sha256 or len(file.sha256) == 64
        assert stem not in ("6726825d", "397923af") or file.sha256.startswith(stem)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    assert by_name["var-d16"].source() == "https://mirror.example/FoundationVision/var/resolve/main/var_d16.pth"
    assert by_name["vgg"].source() == VGG_ADDRESS
