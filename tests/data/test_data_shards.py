"""Writing shards: what goes in comes out, twice the same, and nothing half-written."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from mvar_lightning.data.check import check
from mvar_lightning.data.index import read_index
from mvar_lightning.data.making import writer as writing
from mvar_lightning.data.making.imagenet import scan_folder
from mvar_lightning.data.making.shards import ShardLimits, ShardsRequest, make_shards
from mvar_lightning.data.making.sources import Example, Source
from mvar_lightning.data.making.writer import shrink
from mvar_lightning.errors import UserError


def members_of(folder: Path, split: str) -> dict[str, bytes]:
    found = {}
    for path in sorted((folder / split).glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    return found


def test_every_file_goes_in_unchanged_with_its_class(image_folder, tmp_path):
    index = make_shards(ShardsRequest(scan_folder(image_folder, val_fraction=0.25), tmp_path / "out"))
    assert index.class_names == ("ant", "bee", "cat")
    assert read_index(tmp_path / "out") == index
    expected = sorted(
        (path.read_bytes(), label)
        for label, name in enumerate(index.class_names)
        for path in (image_folder / name).iterdir()
        if path.suffix != ".txt"
    )
    written = []
    for split in ("train", "val"):
        members = members_of(tmp_path / "out", split)
        images = {name: data for name, data in members.items() if not name.endswith(".cls")}
        assert len(images) == index.splits[split].samples == len(members) / 2
        written += [(data, int(members[name.split(".")[0] + ".cls"])) for name, data in images.items()]
    assert sorted(written) == expected
    assert index.splits["val"].samples == 3 * round(19 * 0.25)


def test_suffix_follows_the_content_not_the_name(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "src" / "one").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "src" / "one" / f"{name}.JPEG", "PNG")
    make_shards(ShardsRequest(scan_folder(tmp_path / "src", 0.5), tmp_path / "out"))
    assert set(members_of(tmp_path / "out", "train")) == {"00000000.cls", "00000000.png"}


def test_two_runs_write_the_same_bytes(image_folder, tmp_path):
    for name in ("one", "two"):
        make_shards(ShardsRequest(scan_folder(image_folder), tmp_path / name, ShardLimits(samples=7)))
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert len(files) > 8
    assert files == sorted(p.relative_to(tmp_path / "two") for p in (tmp_path / "two").rglob("*") if p.is_file())
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


def test_shards_mix_the_classes(numbered_shards):
    folder = numbered_shards(train=60, samples_per_shard=15)
    for path in (folder / "train").glob("*.tar"):
        with tarfile.open(path) as tar:
            labels = {tar.extractfile(member).read() for member in tar if member.name.endswith(".cls")}
        assert labels == {b"0", b"1", b"2"}


def test_limits_of_samples_and_bytes(tmp_path):
    examples = tuple(Example(str(n), 0, lambda: _png(tmp_path)) for n in range(10))
    source = Source(("x",), examples, examples[:1])
    counts = [
        s.samples for s in make_shards(ShardsRequest(source, tmp_path / "a", ShardLimits(3))).splits["train"].shards
    ]
    assert counts == [3, 3, 3, 1]
    counts = [
        s.samples for s in make_shards(ShardsRequest(source, tmp_path / "b", ShardLimits())).splits["train"].shards
    ]
    assert counts == [3, 3, 3, 1]  # a small set still gets four shards
    counts = [
        s.samples
        for s in make_shards(ShardsRequest(source, tmp_path / "c", ShardLimits(bytes=1))).splits["train"].shards
    ]
    assert counts == [1] * 10


def _png(tmp_path: Path) -> bytes:
    path = tmp_path / "x.png"
    if not path.exists():
        Image.new("RGB", (4, 4)).save(path)
    return path.read_bytes()


def test_resize_shrinks_the_shorter_side_and_leaves_small_images(image_folder):
    data = (image_folder / "cat" / "0.webp").read_bytes()
    small = Image.open(io.BytesIO(shrink(data, "webp", 11)))
    assert (small.size, small.format) == ((12, 11), "WEBP")
    assert shrink(data, "webp", 22) == data


def test_given_splits_are_kept_and_must_agree(image_folder, tmp_path):
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "train").symlink_to(image_folder)
    (folder / "val" / "bee").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "val" / "bee" / "x.png")
    source = scan_folder(folder)
    assert (len(source.train), len(source.val)) == (57, 1)
    assert source.val[0].label == 1
    (folder / "val" / "bee").rename(folder / "val" / "dog")
    with pytest.raises(UserError, match="class 'dog'"):
        scan_folder(folder)


def test_the_split_depends_on_the_seed_alone(image_folder):
    names = [[example.name for example in scan_folder(image_folder, 0.3, seed).val] for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.mkdir(), "no class folders .it is empty"),
        (lambda folder: (folder / "a").mkdir(parents=True), "no images in its class folders"),
        (lambda folder: (folder.mkdir(), (folder / "x.jpg").touch()), "holds files only"),
    ],
)
def test_sources_that_hold_nothing(tmp_path, prepare, message):
    prepare(tmp_path / "src")
    with pytest.raises(UserError, match=message):
        scan_folder(tmp_path / "src")


def test_an_empty_class_and_a_wrong_fraction_are_named(image_folder):
    (image_folder / "dog").mkdir()
    with pytest.raises(UserError, match="dog"):
        scan_folder(image_folder)
    (image_folder / "dog").rmdir()
    with pytest.raises(UserError, match=r"fraction 1\.5"):
        scan_folder(image_folder, 1.5)


def test_an_unreadable_image_is_named_and_nothing_is_left(image_folder, tmp_path):
    (image_folder / "bee" / "bad.png").write_bytes(b"not a picture")
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"bee/bad\.png: not a readable"):
        make_shards(ShardsRequest(scan_folder(image_folder), tmp_path / "out"))
    assert set(tmp_path.iterdir()) == before


def test_a_destination_in_use_is_refused_and_untouched(image_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty"):
        make_shards(ShardsRequest(scan_folder(image_folder), tmp_path / "out"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        make_shards(ShardsRequest(scan_folder(image_folder), tmp_path / "file" / "out"))


def test_no_permission_to_write(image_folder, tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(UserError, match=r"out: cannot be written \(Permission denied\)"):
        make_shards(ShardsRequest(scan_folder(image_folder), tmp_path / "out"))


def test_a_full_disk_leaves_nothing(image_folder, tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing.TarWriter, "write", full)
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"writing failed \(No space left on device\)"):
        make_shards(ShardsRequest(scan_folder(image_folder), tmp_path / "out"))
    assert set(tmp_path.iterdir()) == before


def test_an_empty_destination_is_filled(numbered_shards, image_folder, tmp_path):
    (tmp_path / "out").mkdir()
    make_shards(ShardsRequest(scan_folder(image_folder), tmp_path / "out"))
    assert check(tmp_path / "out") == []
    assert (tmp_path / "out").stat().st_mode & 0o055 == 0o055 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_check_names_what_is_wrong(numbered_shards):
    folder = numbered_shards()
    assert check(folder) == []
    flipped, cut, gone = (folder / "train" / f"00000{n}.tar" for n in range(3))
    data = bytearray(flipped.read_bytes())
    data[1500] ^= 1
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-100])
    gone.unlink()
    (folder / "val" / "extra.tar").touch()
    problems = check(folder)
    assert [problem.split(":")[0] for problem in problems] == [
        "train/000000.tar",
        "train/000001.tar",
        "train/000002.tar",
        "val/extra.tar",
    ]
    assert "checksum" in problems[0]
    assert "bytes instead of" in problems[1]
    assert "missing" in problems[2]


def test_check_counts_samples(numbered_shards, edit_index):
    folder = numbered_shards()
    edit_index(folder, lambda content: content["splits"]["val"]["shards"][0].update(samples=9))
    assert check(folder) == ["val/000000.tar: 3 samples instead of 9"]


@pytest.mark.parametrize("name", ["pipe:cat x.tar", "../x.tar", "/etc/x.tar", "a/../x.tar", "https://host/x.tar"])
def test_shard_names_that_leave_the_folder_are_refused(numbered_shards, edit_index, name):
    folder = numbered_shards()
    edit_index(folder, lambda content: content["splits"]["train"]["shards"][0].update(name=name))
    with pytest.raises(UserError, match="not a valid index"):
        read_index(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "other"}', "\x00"])
def test_a_broken_index_is_one_clear_line(tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(UserError, match="not a valid index") as error:
        read_index(tmp_path)
    assert "\n" not in str(error.value)


def test_index_layout(numbered_shards):
    content = json.loads((numbered_shards() / "index.json").read_text())
    assert set(content) == {"format", "class_names", "splits"}
    train = content["splits"]["train"]
    assert (train["samples"], len(train["shards"])) == (40, 4)
    assert set(train["shards"][0]) == {"name", "samples", "bytes", "sha256"}
    assert train["bytes"] == sum(shard["bytes"] for shard in train["shards"])
