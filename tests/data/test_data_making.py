"""Making shards in several processes, after a kill, with damage, and on a full disk: always the same bytes."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvar_lightning.data import chunks, shards
from mvar_lightning.data.index import check, read_index
from mvar_lightning.data.shards import ShardLimits, write_shards
from mvar_lightning.data.sources import scan_folder
from mvar_lightning.data.work_folder import work_path
from mvar_lightning.errors import UserError


def make_images(folder: Path, count: int = 40, side: int = 24) -> Path:
    generator = np.random.default_rng(0)
    for number in range(count):
        (folder / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"class{number % 2}" / f"{number:04d}.jpg")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images")


@pytest.fixture
def expected(images: Path, tmp_path: Path) -> dict[str, bytes]:
    write_shards(scan_folder(images), tmp_path / "expected", ShardLimits(5))
    return contents(tmp_path / "expected")


@pytest.mark.slow
def test_processes_write_what_one_process_writes(images: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    done: list[int] = []
    write_shards(scan_folder(images), tmp_path / "out", ShardLimits(5), progress=done.append, workers=2, resume=True)
    assert contents(tmp_path / "out") == expected
    assert sum(done) == 40
    assert not work_path(tmp_path / "out").exists()


def test_work_goes_on_where_it_stopped(
    images: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = shards.ChunkWriter.__call__

    def failing(self: shards.ChunkWriter, chunk: chunks.Chunk, *report: object) -> chunks.ChunkRecord:
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(f"{chunk.split} {chunk.number}")
        return write(self, chunk)

    monkeypatch.setattr(shards.ChunkWriter, "__call__", failing)
    source, out = scan_folder(images), tmp_path / "out"
    with pytest.raises(UserError, match=r"No space left on device\); what is finished is kept in .*partial"):
        write_shards(source, out, ShardLimits(5), resume=True)
    assert not out.exists()
    written.clear()
    monkeypatch.setattr(
        shards.ChunkWriter, "__call__", lambda self, chunk, *report: written.append("x") or write(self, chunk)
    )
    write_shards(source, out, ShardLimits(5), resume=True)
    assert contents(out) == expected
    assert len(written) == len(list(out.rglob("*.tar"))) - 3, "finished chunks are not written again"


def test_a_finished_shard_that_was_cut_off_is_written_again(
    images: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = scan_folder(images), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_named", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_shards(source, out, ShardLimits(5), resume=True)
    part = work_path(out) / "train" / "part-000001-00.tar"
    part.write_bytes(part.read_bytes()[:100])
    write_shards(source, out, ShardLimits(5), resume=True)
    assert contents(out) == expected


def test_a_kill_between_two_renames_does_no_harm(
    images: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = scan_folder(images), tmp_path / "out"
    rename, renamed = Path.rename, []

    def twice(self: Path, target: Path) -> Path:
        if len(renamed) == 2:
            raise ZeroDivisionError
        renamed.append(self)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", twice)
        with pytest.raises(ZeroDivisionError):
            write_shards(source, out, ShardLimits(5), resume=True)
    write_shards(source, out, ShardLimits(5), resume=True)
    assert contents(out) == expected


def test_unfinished_work_of_another_kind_is_refused(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = scan_folder(images), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_named", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_shards(source, out, ShardLimits(5), resume=True)
    with pytest.raises(UserError, match=r"has other samples per shard; .* --fresh"):
        write_shards(source, out, ShardLimits(6), resume=True)
    (images / "class0" / "0000.jpg").unlink()
    with pytest.raises(UserError, match=r"has other (train|val) images"):
        write_shards(scan_folder(images), out, ShardLimits(5), resume=True)


def test_damaged_images_stop_the_work_or_are_listed(images: Path, tmp_path: Path) -> None:
    (images / "class0" / "0000.jpg").write_bytes(b"no picture")
    (images / "class1" / "0001.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(UserError, match=r"000\d\.jpg: not a readable .*--skip-damaged"):
        write_shards(scan_folder(images), tmp_path / "out")
    index = write_shards(scan_folder(images), tmp_path / "out", skip_damaged=True)
    assert sum(split.samples for split in index.splits.values()) == 38
    assert check(tmp_path / "out", decode=True) == []
    skipped = (tmp_path / "out" / "skipped.txt").read_text()
    assert skipped.count("\n") == 2 and "0000.jpg" in skipped and "0001.jpg" in skipped


def test_check_decodes_what_the_checksum_cannot_tell(images: Path, tmp_path: Path) -> None:
    whole = images / "class0" / "0002.jpg"
    whole.write_bytes(whole.read_bytes()[:-200])  # a readable header is enough to be copied
    write_shards(scan_folder(images), tmp_path / "out")
    assert check(tmp_path / "out", workers=3) == []
    (problem,) = check(tmp_path / "out", workers=3, decode=True)
    assert "damaged picture" in problem


PROGRAM = "import sys; from mvar_lightning.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.slow
def test_a_killed_make_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", count=600, side=200)
    options = ("--samples-per-shard", "10", "--resize", "100")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(out: str, *more: str) -> list[str]:
        return [sys.executable, "-c", PROGRAM, "shards", "make", str(images), str(tmp_path / out), *options, *more]

    subprocess.run(command("whole", "--workers", "1"), check=True, env=environment, capture_output=True)
    process = subprocess.Popen(command("out", "--workers", "2"), env=environment, stdout=subprocess.DEVNULL)
    records = work_path(tmp_path / "out") / "records"
    deadline = time.monotonic() + 60
    while len(list(records.glob("*.json"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists() and len(list(records.glob("*.json"))) >= 5
    again = subprocess.run(command("out", "--workers", "1"), check=True, env=environment, capture_output=True)
    assert b"going on with what is finished" in again.stdout
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert read_index(tmp_path / "out").split("train").samples == 540


def test_two_at_one_destination_are_refused(images: Path, tmp_path: Path) -> None:
    import fcntl

    folder = work_path(tmp_path / "out")
    folder.mkdir()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is making it"):
            write_shards(scan_folder(images), tmp_path / "out", resume=True)


def test_examples_travel_to_other_processes_by_themselves(images: Path) -> None:
    import pickle

    source = scan_folder(images)
    chunk = chunks.Chunk("train", 0, 0, source.train, [3, 1])
    sent = pickle.loads(pickle.dumps(chunk))
    assert [example.load() for example in sent.examples] == [source.train[3].load(), source.train[1].load()]
    buffer = io.BytesIO(pickle.dumps(chunk))
    assert len(buffer.getvalue()) < 1000, "two examples, not the split"
