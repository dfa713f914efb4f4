"""Making shards in several processes, after a kill, with damage, and on a full disk: always the same bytes."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from webdataset import TarWriter as WebDatasetWriter

from mvar_lightning.cli import main
from mvar_lightning.data.check import check
from mvar_lightning.data.index import read_index
from mvar_lightning.data.making import shards
from mvar_lightning.data.making import writer as chunks
from mvar_lightning.data.making import writer as writing
from mvar_lightning.data.making.imagenet import scan_folder
from mvar_lightning.data.making.shards import ShardLimits, ShardsRequest, make_shards, work_path
from mvar_lightning.data.making.sources import Source
from mvar_lightning.errors import UserError
from mvar_lightning.tools.files import Lock


def shown(progress=lambda count: None, say=lambda line: None):
    """A bar for `make_shards` that tells these two."""
    return lambda unit, total: nullcontext(SimpleNamespace(advance=progress, say=say))


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
    make_shards(ShardsRequest(scan_folder(images), tmp_path / "expected", ShardLimits(5)))
    return contents(tmp_path / "expected")


@pytest.mark.slow
def test_processes_write_what_one_process_writes(images: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    done: list[int] = []
    make_shards(
        ShardsRequest(scan_folder(images), tmp_path / "out", ShardLimits(5), workers=2, resume=True),
        shown(progress=done.append),
    )
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
        make_shards(ShardsRequest(source, out, ShardLimits(5), resume=True))
    assert not out.exists()
    written.clear()
    monkeypatch.setattr(shards.ChunkWriter, "__call__", write)
    write_shard = shards.ChunkWriter._shard
    monkeypatch.setattr(
        shards.ChunkWriter, "_shard", lambda self, *rest: written.append(rest[0]) or write_shard(self, *rest)
    )
    make_shards(ShardsRequest(source, out, ShardLimits(5), resume=True))
    assert contents(out) == expected
    assert len(written) == len(list(out.rglob("*.tar"))) - 3, "finished chunks are not written again"


def test_finished_shards_that_were_damaged_since_are_written_again(
    images: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = scan_folder(images), tmp_path / "out"
    unfinished(source, out, monkeypatch)
    cut, changed, gone = (work_path(out) / "shards" / "train" / f"part-00000{n}-00.tar" for n in (1, 2, 3))
    cut.write_bytes(cut.read_bytes()[:100])
    data = bytearray(changed.read_bytes())
    data[len(data) // 2] ^= 1
    changed.write_bytes(data)
    gone.unlink()
    (work_path(out) / "records" / "val-000000.json").write_text('{"shards": ')
    make_shards(ShardsRequest(source, out, ShardLimits(5), resume=True))
    assert contents(out) == expected


def order_of(source: Source) -> list[str]:
    return [example.name for chunk in shards._chunks(source, ShardLimits(5), 0) for example in chunk.examples()]


def unfinished(source: Source, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is written, nothing has its name."""
    with monkeypatch.context() as patch:
        patch.setattr(shards, "SplitIndex", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make_shards(ShardsRequest(source, out, ShardLimits(5), resume=True))


@pytest.mark.parametrize("renames", [0, 3, 8])
def test_a_kill_between_two_renames_does_no_harm(
    images: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    source, out = scan_folder(images), tmp_path / "out"
    rename, renamed = Path.rename, []

    def some(self: Path, target: Path) -> Path:
        if len(renamed) == renames:
            raise ZeroDivisionError
        renamed.append(self)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", some)
        with pytest.raises(ZeroDivisionError):
            make_shards(ShardsRequest(source, out, ShardLimits(5), resume=True))
    with monkeypatch.context() as patch:
        patch.setattr(shards.ChunkWriter, "_shard", lambda *arguments: 1 / 0)
        make_shards(ShardsRequest(source, out, ShardLimits(5), resume=True))  # nothing is left to write
    assert contents(out) == expected


def test_unfinished_work_of_another_kind_is_refused_or_forgotten(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = scan_folder(images), tmp_path / "out"
    unfinished(source, out, monkeypatch)
    with pytest.raises(UserError, match=r"has other samples per shard \(5, now 6\); .* fresh"):
        make_shards(ShardsRequest(source, out, ShardLimits(6), resume=True))
    (images / "class0" / "0000.jpg").unlink()
    source = scan_folder(images)
    with pytest.raises(UserError, match=r"has other (train|val) images"):
        make_shards(ShardsRequest(source, out, ShardLimits(5), resume=True))
    make_shards(ShardsRequest(source, out, ShardLimits(9), resume=True, fresh=True))
    make_shards(ShardsRequest(source, tmp_path / "new", ShardLimits(9)))
    assert contents(out) == contents(tmp_path / "new")
    assert not work_path(out).exists()


def test_after_an_unreadable_image_the_work_goes_on_without_it_or_with_a_better_one(
    images: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    source, out = scan_folder(images), tmp_path / "out"
    bad = Path(order_of(source)[17])
    good = bad.read_bytes()
    bad.write_bytes(b"no picture")
    said: list[str] = []
    with pytest.raises(UserError, match=rf"{bad.name}: .*skip_damaged; what is finished is kept in .*\.out\.partial"):
        make_shards(ShardsRequest(source, out, ShardLimits(5), resume=True))
    index = make_shards(
        ShardsRequest(source, out, ShardLimits(5), resume=True, skip_damaged=True), shown(say=said.append)
    )
    assert sum(split.samples for split in index.splits.values()) == 39
    assert len(said) == 1 and "going on, 3 of 12 parts were finished" in said[0]
    with pytest.raises(UserError, match="skip_damaged"):
        make_shards(ShardsRequest(source, tmp_path / "more", ShardLimits(5), resume=True))
    bad.write_bytes(good)
    make_shards(ShardsRequest(source, tmp_path / "more", ShardLimits(5), resume=True))
    assert contents(tmp_path / "more") == expected


def test_what_was_skipped_is_looked_at_again_without_the_option(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (images / "class0" / "0000.jpg").write_bytes(b"no picture")
    source, out = scan_folder(images), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(shards, "SplitIndex", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make_shards(ShardsRequest(source, out, ShardLimits(5), resume=True, skip_damaged=True))
    with pytest.raises(UserError, match=r"0000\.jpg"):
        make_shards(ShardsRequest(source, out, ShardLimits(5), resume=True))


def test_a_part_without_a_readable_image_leaves_no_gap_in_the_numbers(images: Path, tmp_path: Path) -> None:
    source = scan_folder(images)
    make_shards(ShardsRequest(source, tmp_path / "whole", ShardLimits(1)))
    for path in sorted(images.rglob("*.jpg"))[::2]:
        path.write_bytes(b"no picture")
    index = make_shards(ShardsRequest(source, tmp_path / "out", ShardLimits(1), skip_damaged=True))
    assert check(tmp_path / "out") == []
    for name in ("train", "val"):
        names = [shard.name for shard in index.split(name).shards]
        assert names == [f"{name}/{number:06d}.tar" for number in range(len(names))]
    for path in images.rglob("*.jpg"):
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="all images of a split are damaged"):
        make_shards(ShardsRequest(source, tmp_path / "none", ShardLimits(1), skip_damaged=True))


def test_names_that_are_no_text_are_told_before_the_work_or_escaped(images: Path, tmp_path: Path) -> None:
    path = images / "class0" / os.fsdecode(b"\xff.jpg")
    path.write_bytes(b"no picture")
    make_shards(ShardsRequest(scan_folder(images), tmp_path / "out", skip_damaged=True))
    assert "class0/\\udcff.jpg: not a readable" in (tmp_path / "out" / "skipped.txt").read_text()
    (images / "class0").rename(images / os.fsdecode(b"\xfe"))
    with pytest.raises(UserError, match="its name is no text"):
        make_shards(ShardsRequest(scan_folder(images), tmp_path / "more"))


def test_decode_finds_truncated_images_while_copying(images: Path, tmp_path: Path) -> None:
    cut = images / "class0" / "0002.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    make_shards(ShardsRequest(scan_folder(images), tmp_path / "copied"))
    with pytest.raises(UserError, match=r"0002\.jpg: damaged picture"):
        make_shards(ShardsRequest(scan_folder(images), tmp_path / "decoded", decode=True))


def test_an_index_that_cannot_be_written_keeps_the_work(
    images: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = scan_folder(images), tmp_path / "out"

    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardIndex, "to_json", full)
        with pytest.raises(UserError, match=r"writing failed \(No space left on device\); what is finished is kept"):
            make_shards(ShardsRequest(source, out, ShardLimits(5), resume=True))
    with monkeypatch.context() as patch:
        patch.setattr(writing.TarWriter, "write", full)
        with pytest.raises(UserError, match="writing failed"):
            make_shards(ShardsRequest(source, out, ShardLimits(5), resume=True, fresh=True))
    assert not list(work_path(out).rglob("*.tar")), "an unfinished shard would fill the disk"
    make_shards(ShardsRequest(source, out, ShardLimits(5), resume=True))
    assert contents(out) == expected


def test_ctrl_c_says_what_is_kept(images: Path, tmp_path: Path) -> None:
    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"stopped; what is finished is kept in .*partial"):
        make_shards(ShardsRequest(scan_folder(images), tmp_path / "out", resume=True), shown(progress=stop))


def test_a_link_leads_to_the_destination_and_a_mount_point_is_refused(
    images: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big")
    make_shards(ShardsRequest(scan_folder(images), tmp_path / "link", ShardLimits(5), resume=True))
    assert contents(tmp_path / "big") == expected
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "mounted")
    with pytest.raises(UserError, match="mount point"):
        make_shards(ShardsRequest(scan_folder(images), tmp_path / "mounted", resume=True))


def test_damaged_images_stop_the_work_or_are_listed(images: Path, tmp_path: Path) -> None:
    (images / "class0" / "0000.jpg").write_bytes(b"no picture")
    (images / "class1" / "0001.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(UserError, match=r"000\d\.jpg: not a readable .*skip_damaged$"):
        make_shards(ShardsRequest(scan_folder(images), tmp_path / "out"))
    index = make_shards(ShardsRequest(scan_folder(images), tmp_path / "out", skip_damaged=True))
    assert sum(split.samples for split in index.splits.values()) == 38
    assert check(tmp_path / "out", decode=True) == []
    skipped = (tmp_path / "out" / "skipped.txt").read_text()
    assert skipped.count("\n") == 2 and "0000.jpg" in skipped and "0001.jpg" in skipped


def test_check_decodes_what_the_checksum_cannot_tell(images: Path, tmp_path: Path) -> None:
    whole = images / "class0" / "0002.jpg"
    whole.write_bytes(whole.read_bytes()[:-200])  # a readable header is enough to be copied
    make_shards(ShardsRequest(scan_folder(images), tmp_path / "out"))
    assert check(tmp_path / "out", workers=3) == []
    (problem,) = check(tmp_path / "out", workers=3, decode=True)
    assert "damaged picture" in problem


@pytest.mark.slow
def test_several_processes_tell_the_first_unreadable_image_and_a_killed_process(
    images: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both in one test: the processes take seconds to start."""
    source, out = scan_folder(images), tmp_path / "out"
    order = order_of(source)
    good = Path(order[17]).read_bytes(), Path(order[3]).read_bytes()
    for place in (17, 3):
        Path(order[place]).write_bytes(b"no picture")
    with pytest.raises(UserError, match=f"{Path(order[3]).name}: not a readable"):
        make_shards(ShardsRequest(source, out, ShardLimits(5), workers=3, resume=True))
    for place, data in zip((17, 3), good, strict=True):
        Path(order[place]).write_bytes(data)
    waiting = threading.Thread(target=kill_a_writer)
    waiting.start()
    with pytest.raises(UserError, match=r"a writing process was killed .*what is finished is kept"):
        make_shards(ShardsRequest(source, out, ShardLimits(5), workers=2, resume=True))
    waiting.join()
    make_shards(ShardsRequest(source, out, ShardLimits(5), workers=2, resume=True))
    assert contents(out) == expected


def kill_a_writer() -> None:
    """As soon as one is there: at times while the other is being started."""
    while not (writers := multiprocessing.active_children()):
        time.sleep(0.001)
    os.kill(writers[0].pid, signal.SIGKILL)


PROGRAM = "import sys; from mvar_lightning.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.slow
def test_a_killed_make_goes_on_to_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = make_images(tmp_path / "images", count=160, side=200)
    options = ("--samples-per-shard", "4", "--resize", "100")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    command = ["shards", "make", str(images), str(tmp_path / "out"), *options, "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *command], env=environment, stdout=subprocess.DEVNULL)
    records = work_path(tmp_path / "out") / "records"
    deadline = time.monotonic() + 120
    while len(list(records.glob("*.json"))) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists() and len(list(records.glob("*.json"))) >= 5
    assert main(command) == 0
    assert re.search(r"going on, \d+ of 40 parts were finished", capsys.readouterr().err)
    make_shards(ShardsRequest(scan_folder(images), tmp_path / "whole", ShardLimits(4), resize=100))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert read_index(tmp_path / "out").split("train").samples == 144


def test_two_at_one_destination_are_refused(images: Path, tmp_path: Path) -> None:
    folder = work_path(tmp_path / "out")
    folder.mkdir()
    with Lock(folder / "lock", ""), pytest.raises(UserError, match="another process is making it"):
        make_shards(ShardsRequest(scan_folder(images), tmp_path / "out", resume=True))


def test_examples_travel_to_other_processes_by_themselves(images: Path) -> None:
    source = scan_folder(images)
    chunk = chunks.Chunk("train", 0, 0, source.train, [3, 1])
    sent = pickle.dumps(chunk.by_itself())
    assert [example.load() for example in pickle.loads(sent).examples()] == [source.train[n].load() for n in (3, 1)]
    assert len(sent) < 1000, "two examples, not the split"


def test_shards_are_the_bytes_that_webdataset_writes() -> None:
    samples = [{"cls": b"3", "png": bytes(size)} for size in (0, 1, 511, 512, 70_000)] + [
        {"cls": b"12", "jpg": b"\xff"}
    ]
    ours, theirs = io.BytesIO(), io.BytesIO()
    tar = writing.TarWriter(ours)
    webdataset = WebDatasetWriter(theirs, user="mvar", group="mvar", mtime=0, encoder=False)
    for number, sample in enumerate(samples):
        content = tar.write({f"{number:08d}.{name}": data for name, data in sample.items()})
        assert content == webdataset.write({"__key__": f"{number:08d}", **sample})
    tar.end()
    webdataset.close()
    assert ours.getvalue() == theirs.getvalue()
