"""Rows of faults in images, folders, shards and token caches, through the command line."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from mvar_lightning import ShardsDataModule
from mvar_lightning.data.index import read_index
from mvar_lightning.data.reading.place import expand
from mvar_lightning.errors import UserError
from tests.faults.harness import ask, broken_promise
from tests.faults.rows_kit import Members, link, write_tar


def picture(gray: int = 0, form: str = "PNG", side: int = 8, **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (gray, gray, gray)).save(buffer, form, **options)
    return buffer.getvalue()


def samples(count: int, first: int = 0, gray: int = 0) -> Members:
    rows = [((f"{n:04d}.png", picture(gray)), (f"{n:04d}.cls", b"%d" % (n % 2))) for n in range(first, first + count)]
    return [member for row in rows for member in row]


def module_of(tar: Path, **options) -> ShardsDataModule:
    defaults = {"image_size": 8, "batch_size": 2, "num_workers": 0, "resize_ratio": 1.0, "num_classes": 2}
    return ShardsDataModule(None, **({"train_shards": str(tar), "val_shards": str(tar)} | defaults | options))


def folder_of(tmp_path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_bytes(data)
    return tmp_path / "src"


def made(tmp_path: Path, *options: object):
    answer = ask("shards", "make", tmp_path / "src", tmp_path / "out", *options)
    assert broken_promise(answer) is None
    return answer


def total(out: Path) -> int:
    return sum(split.samples for split in read_index(out).splits.values())


# -- images and folders


def test_a_jpeg_with_further_pictures_behind_it_is_a_jpeg(tmp_path: Path) -> None:
    mpo = picture(50, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8), "white")])
    folder_of(tmp_path, {f"cat/{n}.jpg": mpo for n in range(4)})
    for options in ((), ("--skip-damaged", "--fresh", "--decode")):
        made(tmp_path, *options)
        assert total(tmp_path / "out") == 4
        assert ask("shards", "check", tmp_path / "out", "--decode").status == 0
        (tmp_path / "out").rename(tmp_path / f"out-{len(options)}")


def test_linked_folders_are_read_once_and_loops_end(tmp_path: Path) -> None:
    source = folder_of(tmp_path, {f"{where}/{n}.png": picture(n) for where in ("src/dog", "more") for n in range(5)})
    (source / "src" / "dog" / "more").symlink_to(source / "more")
    (source / "src" / "dog" / "again").symlink_to(source / "more")
    (source / "src" / "dog" / "up").symlink_to(source / "src")
    answer = ask("shards", "make", source / "src", tmp_path / "out")
    assert answer.status == 0 and total(tmp_path / "out") == 10
    assert "links to folders that are read already: 2" in answer.err


def test_classes_that_are_numbers_go_by_value(tmp_path: Path) -> None:
    folder_of(tmp_path, {f"{name}/{n}.png": picture(n) for name in range(12) for n in range(2)})
    answer = made(tmp_path)
    assert read_index(tmp_path / "out").class_names == tuple(map(str, range(12)))
    assert "label 0 is 0, label 11 is 11" in answer.err


def test_what_is_not_read_is_counted_by_kind(tmp_path: Path) -> None:
    files = {f"a/{n}.png": picture() for n in range(4)} | {f"a/{n}.bmp": picture(0, "BMP") for n in range(6)}
    folder_of(tmp_path, files | {"b/1.png": picture(), "b/2.png": picture(), "x.gif": b"", "b/notes": b""})
    answer = made(tmp_path)
    assert total(tmp_path / "out") == 6
    assert "left out of the images: 6 .bmp, 1 .gif, 1 without suffix" in answer.err
    folder_of(tmp_path, {"c/1.tiff": picture(0, "TIFF")})
    answer = ask("shards", "make", tmp_path / "src", tmp_path / "other")
    assert "no images in it, but 1 .tiff" in answer.line and answer.status == 2


def test_what_tools_leave_is_no_class_and_no_image(tmp_path: Path) -> None:
    left = ("__MACOSX/._1.png", "a/.ipynb_checkpoints/1.png", "a/@eaDir/1.png", "a/._1.png")
    folder_of(tmp_path, {f"{name}/{n}.png": picture() for name in "ab" for n in range(2)} | dict.fromkeys(left, b"x"))
    answer = made(tmp_path)
    assert read_index(tmp_path / "out").class_names == ("a", "b") and total(tmp_path / "out") == 4
    assert "folders of tools: 1 .ipynb_checkpoints, 1 @eaDir, 1 __MACOSX" in answer.err


def test_a_list_that_names_an_image_twice(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {f"{n}.png": picture(n) for n in range(4)})
    (folder / "list.csv").write_text("".join(f"{n}.png,a\n" for n in (0, 1, 2, 3)) + "./1.png,a\n0.png,a\n")
    answer = ask("shards", "make", folder / "list.csv", tmp_path / "out", "--val-fraction", "0.5")
    assert answer.status == 0 and total(tmp_path / "out") == 4
    assert "2 lines name an image again, which is taken once" in answer.err
    (folder / "list.csv").write_text("0.png,a,train\n1.png,a,train\n0.png,a,val\n")
    answer = ask("shards", "make", folder / "list.csv", tmp_path / "two")
    assert "line 3" in answer.line and "is a val, a line above says a train" in answer.line


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    source = folder_of(tmp_path, {f"{name}/{n}.png": picture() for name in "ab" for n in range(2)})
    for path in (tmp_path, *tmp_path.parents[:3]):
        path.chmod(0o755)
    (source / "b").chmod(0)
    (tmp_path / "here").mkdir(mode=0o777)
    (tmp_path / "here").chmod(0o777)
    answer = ask("shards", "make", source, tmp_path / "here" / "out", uid=12345)
    assert broken_promise(answer) is None and "cannot be read (Permission denied)" in answer.line


def test_a_pipe_among_the_images_is_not_waited_for(tmp_path: Path) -> None:
    source = folder_of(tmp_path, {f"a/{n}.png": picture() for n in range(2)})
    os.mkfifo(source / "a" / "2.png")
    answer = ask("shards", "make", source, tmp_path / "out", seconds=20)
    assert broken_promise(answer) is None and "2.png: cannot be read (not a plain file)" in answer.line


# -- shards


def test_two_samples_of_one_key_are_each_their_own_picture(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", samples(4) + samples(4, gray=255))
    data = module_of(tar, epoch_samples=8, shuffle_buffer=1)
    for _ in range(2):
        pixels = torch.cat([batch["image"] for batch in data.val_dataloader()])
        assert [int(one.max()) for one in pixels] == [0] * 4 + [255] * 4


def test_a_tar_made_on_a_mac(tmp_path: Path) -> None:
    double = [(f"{folder}._{name}", b"\0") for folder in ("", "./") for name, _ in samples(6)]
    tar = write_tar(tmp_path / "x.tar", samples(6) + double)
    data = module_of(tar)
    assert data.train_samples == 6
    assert sum(len(batch["label"]) for batch in data.val_dataloader()) == 6


@pytest.mark.parametrize("where", ["in a header", "between members", "in a picture", "at the end mark"])
def test_half_a_shard_is_refused_without_an_index(tmp_path: Path, where: str) -> None:
    tar = write_tar(tmp_path / "x.tar", samples(6))
    with tarfile.open(tar) as opened:
        member = opened.getmembers()[6]
        end = opened.getmembers()[-1].offset_data + 512
    cut = {"in a header": member.offset + 100, "between members": member.offset, "in a picture": member.offset_data + 9}
    tar.write_bytes(tar.read_bytes()[: cut.get(where, end)])
    with pytest.raises(UserError, match=r"x\.tar: it is cut off.*copy it again") as error:
        module_of(tar).setup("fit")
    assert "\n" not in str(error.value)


def test_two_archives_in_a_row_are_not_taken_for_the_first(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", samples(2))
    tar.write_bytes(2 * tar.read_bytes())
    with pytest.raises(UserError, match="goes on behind its end mark"):
        module_of(tar).setup("fit")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda members: [(f"img.{name}", data) for name, data in members], "a key ends at its first dot"),
        (lambda members: members[::2] + members[1::2], "side by side.*tar --sort=name"),
        (lambda members: [(n, d) if n.endswith("png") else (n, link("0.cls")) for n, d in members], "is a link"),
        (lambda members: members[::2], "no label"),
        (lambda members: [], "not a tar file|holds no samples"),
    ],
)
def test_why_a_shard_has_no_usable_sample(tmp_path: Path, change, reason: str) -> None:
    tar = write_tar(tmp_path / "x.tar", change(samples(6)))
    with pytest.raises(UserError, match=reason):
        module_of(tar).setup("fit")


def test_suffixes_are_read_in_upper_case(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", [(name.upper(), data) for name, data in samples(6)])
    assert sum(len(batch["label"]) for batch in module_of(tar).val_dataloader()) == 6


@pytest.mark.parametrize("label", [b"1.0", b"\xef\xbb\xbf1", b"", b"one"])
def test_a_split_whose_labels_are_none_is_refused_with_the_reason(tmp_path: Path, label: bytes) -> None:
    members = [(name, label if name.endswith(".cls") else data) for name, data in samples(6)]
    data = module_of(write_tar(tmp_path / "x.tar", members))
    for loader in (data.val_dataloader(), data.train_dataloader()):
        with pytest.raises(UserError, match=r"not one sample.*is not a number"):
            list(loader)


def test_a_consumer_whose_share_is_damaged_does_not_end_a_sound_split(tmp_path: Path) -> None:
    members = samples(6)
    members[0] = (members[0][0], b"no picture")
    data = module_of(write_tar(tmp_path / "x.tar", members), num_workers=6)
    loader = data.val_dataloader()
    assert sum(len(batch["label"]) for batch in loader) == 5
    loader.close()


def indexed(tmp_path: Path, members: Members, count: int) -> Path:
    """A folder of one shard of each split that its index lists as it is."""
    shards = []
    for split in ("train", "val"):
        tar = write_tar(tmp_path / "out" / split / "000000.tar", members)
        row = {"name": f"{split}/000000.tar", "samples": count, "bytes": tar.stat().st_size}
        shards.append(row | {"sha256": hashlib.sha256(tar.read_bytes()).hexdigest()})
    splits = {row["name"].split("/")[0]: {"shards": [row]} for row in shards}
    content = {"format": "mvar-shards-1", "class_names": ["a", "b"], "splits": splits}
    (tmp_path / "out" / "index.json").write_text(json.dumps(content))
    return tmp_path / "out"


def sparse() -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type = tarfile.GNUTYPE_SPARSE
    return info


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda members: [members[0], *members[2:]], "0000: has no label"),
        (lambda members: members[1:], "0000: has no picture"),
        (lambda members: [members[0], *members], "0000: has two members 0000.png"),
        (lambda members: [(members[0][0], link("x.png")), *members[1:]], "0000: member 0000.png is a link"),
        (lambda members: [(members[0][0], link("x", tarfile.SYMTYPE)), *members[1:]], "member 0000.png is a link"),
        (lambda members: [(members[0][0], sparse()), *members[1:]], "member 0000.png is no plain file"),
        (lambda members: [members[0], (members[1][0], b"7" * 5000), *members[2:]], "has 5000 bytes, more than 32"),
        (lambda members: [members[0], (members[1][0], b"7"), *members[2:]], "label b'7' is not one of 2 classes"),
        (lambda members: [(members[0][0], members[0][1][:40]), *members[1:]], "not a readable"),
    ],
)
def test_check_names_what_is_wrong_in_a_sample(tmp_path: Path, change, named: str) -> None:
    answer = ask("shards", "check", indexed(tmp_path, change(samples(4)), 4), "--decode")
    assert answer.status == 1 and "Traceback" not in answer.err
    assert named in answer.out and "2 problems in 2 shards" in answer.out


def test_fewer_validation_images_than_processes_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = module_of(write_tar(tmp_path / "x.tar", samples(3)))
    monkeypatch.setattr(data, "rank_and_world_size", lambda: (0, 4))
    with pytest.raises(UserError, match=r"has 3 images, fewer than the 4 processes"):
        data.val_dataloader()


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_a_set_within_the_buffer_comes_once_a_pass(tmp_path: Path, monkeypatch, workers: int, world: int) -> None:
    members = [m for n in range(20) for m in ((f"{n}.png", picture(10 * n)), (f"{n}.cls", b"0"))]
    tars = [write_tar(tmp_path / f"{k}.tar", members[10 * k : 10 * k + 10]) for k in range(4)]
    row = []
    for rank in range(world):
        shards = [str(tar) for tar in tars]
        data = module_of(tars[0], train_shards=shards, num_workers=workers, shuffle_buffer=20)
        monkeypatch.setattr(data, "rank_and_world_size", lambda rank=rank: (rank, world))
        loader = data.train_dataloader()
        row += [int(one.max()) for batch in loader for one in batch["image"]]
        loader.close()
    assert sorted(row) == [10 * n for n in range(20)] != row


def test_many_names_of_shards(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    rows = "".join(f"      - x/{n:06d}.tar\n" for n in range(11_000))
    recipe.write_text(f"data:\n  class_path: ShardsDataModule\n  init_args:\n    train_shards:\n{rows}")
    answer = ask("fit", "--config", recipe, cwd=tmp_path)
    assert broken_promise(answer) is None and answer.status == 2
    assert "brace range" in answer.line and "shards.txt" in answer.line
    write_tar(tmp_path / "a.tar", samples(2))
    (tmp_path / "shards.txt").write_text("a.tar\n\na.tar\n")
    assert module_of(tmp_path / "shards.txt").train_samples == 4


@pytest.mark.parametrize("pattern", ["{0..9999999}.tar", "{a,b}" * 40 + ".tar"])
def test_names_beyond_number_are_not_even_listed(pattern: str) -> None:
    with pytest.raises(UserError, match="more than 1000000 names"):
        expand(pattern)


# -- addresses


@pytest.mark.parametrize(
    "address", ["PIPE://true", "memory://x.tar", "x/y://z.tar", "ftp://127.0.0.1:9/x.tar", "-://x"]
)
def test_addresses_of_other_kinds_are_refused(address: str) -> None:
    with pytest.raises(UserError, match=r"runs a command|are not opened"):
        list(module_of(Path("x"), train_shards=address, val_shards=address).val_dataloader())
