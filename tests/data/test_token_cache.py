"""The cache on disk: its size, its faults, and a job that goes on where it was left."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from token_files import token_job, token_settings, write_numbered_part, write_token_cache

from mvar_lightning.data.tokens import cache as token_cache
from mvar_lightning.data.tokens.cache import check_cache, open_part, read_cache
from mvar_lightning.errors import UserError
from mvar_lightning.tools.ranks import Ranks

SIDES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_view_of_680_tokens_takes_1360_bytes_and_its_label_four(tmp_path: Path) -> None:
    cache = write_token_cache(tmp_path / "c", train=(50,), val=(1,), scales=SIDES_256, views=3)
    part = cache.split("train")[0]
    headers = 2 * 128
    assert part.bytes == 50 * (3 * 1360 + 4) + headers
    tokens, labels = open_part(cache, part)
    assert (tokens.dtype, tokens.shape, labels.shape) == (np.uint16, (3, 50, 680), (50,))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_the_type_follows_the_vocabulary(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    cache = write_token_cache(tmp_path / "c", vocab_size=vocab_size)
    assert open_part(cache, cache.split("train")[0])[0].dtype == dtype


def test_the_index_comes_back_as_it_was_written(tmp_path: Path) -> None:
    cache = write_token_cache(tmp_path / "c", views=2)
    assert read_cache(tmp_path / "c") == cache
    assert (cache.samples("train"), cache.samples("val"), cache.damaged) == (20, 8, 0)
    assert check_cache(tmp_path / "c") == []
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"tokens.json", "train", "val"}
    assert all(name.endswith((".npy", "tokens.json")) for name in content_of(tmp_path / "c"))


def rewrite(folder: Path, change: Callable[[Any], None]) -> None:
    content = json.loads((folder / "tokens.json").read_text())
    change(content)
    (folder / "tokens.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "tokens.json").unlink(), "has no tokens.json.*interrupted"),
        (lambda folder: (folder / "tokens.json").write_text("{"), "not a valid index"),
        (lambda folder: rewrite(folder, lambda c: c.update(format="mvar-tokens-9")), "'mvar-tokens-9' is not"),
        (lambda folder: rewrite(folder, lambda c: c["settings"].pop("scales")), "no entry 'scales'"),
        (lambda folder: rewrite(folder, lambda c: c["settings"].update(vocab_size="x")), "vocab_size 'x'"),
        (
            lambda folder: rewrite(folder, lambda c: c["splits"]["val"]["parts"][0].update(name="../../etc")),
            "'../../etc'",
        ),
    ],
)
def test_a_wrong_index_is_told(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    write_token_cache(tmp_path / "c")
    spoil(tmp_path / "c")
    with pytest.raises(UserError, match=message):
        read_cache(tmp_path / "c")


def test_a_folder_that_is_no_cache_says_what_to_run(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "index.json").touch()
    for name, message in (("none", "does not exist; make it with `mvar tokens make"), ("images", "holds images")):
        with pytest.raises(UserError, match=message):
            read_cache(tmp_path / name)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "cannot be opened"),
        (cut, "cut off or no array file"),
        (lambda path: path.write_bytes(b""), "cut off or no array file"),
        (lambda path: path.write_bytes(b"\x80\x04." * 99), "cut off or no array file"),
        (lambda path: np.save(path, np.load(path).astype(np.int16)), r"holds int16 \(1, 7, 5\) instead of uint16"),
        (lambda path: np.save(path, np.load(path)[:, :6]), r"holds uint16 \(1, 6, 5\) instead of"),
        (lambda path: np.save(path, np.load(path).astype(object), allow_pickle=True), "cut off or no array file"),
    ],
)
def test_a_damaged_part_is_one_clear_line(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    cache = write_token_cache(tmp_path / "c")
    spoil(tmp_path / "c" / "train" / "000000.npy")
    with pytest.raises(UserError, match=rf"train/000000\.npy.*{message}.*run the same `mvar tokens` command again"):
        open_part(cache, cache.split("train")[0])


def test_check_names_what_is_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    write_token_cache(folder)
    flipped = folder / "train" / "000001.npy"
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\xff")
    cut(folder / "train" / "000002.npy")
    (folder / "val" / "000000.labels.npy").unlink()
    (folder / "val" / "000009.npy").touch()
    problems = check_cache(folder)
    messages = (
        "train/000001: damaged",
        "train/000002: .* bytes instead of",
        "val/000000.labels.npy: missing",
        "val/000009.npy: not in tokens.json",
    )
    assert [bool(re.match(*pair)) for pair in zip(messages, problems, strict=True)] == [True] * 4


def test_check_finds_tokens_that_are_none(tmp_path: Path) -> None:
    """Written so, with a true checksum."""
    job = token_job(tmp_path / "c", train=(3,), val=(2,))
    job.begin()
    job.write(job.tasks[0], np.full((1, 3, 5), 4096), np.zeros(3), ())
    job.write(job.tasks[1], np.zeros((1, 2, 5)), np.full(2, 3), ())
    job.finish()
    assert check_cache(tmp_path / "c") == ["train/000000: token 4096 of 4096 codes", "val/000000: label 3 of 3 classes"]


# -- the job


def test_an_interrupted_job_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    write_token_cache(tmp_path / "whole", views=2)
    job = token_job(tmp_path / "c", views=2)
    job.begin()
    for task in job.todo()[:3]:
        write_numbered_part(job, task)
    with pytest.raises(UserError, match=r"part val/000000 is missing; run the same command again"):
        job.finish()
    # a finished part that has changed since is made again, an unfinished one leaves nothing that counts
    cut(tmp_path / "c" / "train" / "000001.npy")
    (tmp_path / "c" / "val" / ".partial-1234567-000000.npy").write_bytes(b"half")
    again = token_job(tmp_path / "c", views=2)
    again.begin()
    assert [task.part for task in again.todo()] == ["train/000001", "val/000000", "val/000001"]
    assert [task.part for task in Ranks(1, 2).share(again.todo())] == ["val/000000"]
    for task in again.todo():
        write_numbered_part(again, task)
    again.finish()
    assert content_of(tmp_path / "c") == content_of(tmp_path / "whole")


def test_a_finished_cache_is_left_alone_or_mended(tmp_path: Path) -> None:
    write_token_cache(tmp_path / "c")
    before = content_of(tmp_path / "c")
    job = token_job(tmp_path / "c")
    job.begin()
    assert job.todo() == []
    (tmp_path / "c" / "val" / "000001.npy").unlink()
    (task,) = job.todo()
    write_numbered_part(job, task)
    job.finish()
    assert content_of(tmp_path / "c") == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer_hash": "f" * 64}, "tokenizer 0123456789ab, now it is ffffffffffff"),
        ({"data_sha256": "other"}, "data data, now it is other"),
        ({"views": 2}, "views 1, now it is 2"),
        ({"batch_size": 8}, "batch_size 4, now it is 8"),
    ],
)
def test_parts_of_another_job_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    for finished in (False, True):
        folder = tmp_path / str(finished)
        job = token_job(folder)
        job.begin()
        for task in job.todo() if finished else job.todo()[:1]:
            write_numbered_part(job, task)
        if finished:
            job.finish()
        before = content_of(folder)
        with pytest.raises(UserError, match=f"was begun with {message}; .*another out"):
            token_job(folder, **change).begin()
        assert content_of(folder) == before


def test_a_job_without_a_finished_part_may_begin_otherwise(tmp_path: Path) -> None:
    """Out of memory at the first batch: the next try takes a smaller one."""
    token_job(tmp_path / "c").begin()
    smaller = token_job(tmp_path / "c", batch_size=2)
    smaller.begin()
    for task in smaller.todo():
        write_numbered_part(smaller, task)
    assert smaller.finish().settings.batch_size == 2


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    for folder in (tmp_path, tmp_path / "photo.jpg"):
        with pytest.raises(UserError, match="holds something else than a token cache"):
            token_job(folder).begin()


def test_a_full_disk_is_one_line_and_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = token_job(tmp_path / "c")
    job.begin()
    first, second = job.todo()[:2]
    write_numbered_part(job, first)

    def full(file: Any, array: Any, **options: Any) -> None:
        file.write(b"some of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(token_cache.np.lib.format, "write_array", full)
        with pytest.raises(UserError, match=r"No space left on device.*parts are kept.*the same command again"):
            write_numbered_part(job, second)
    assert not list((tmp_path / "c").rglob(".partial-*"))
    assert second in job.todo() and first not in job.todo()


def test_an_unwritable_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        token_job(tmp_path / "file" / "c").begin()


def test_two_jobs_do_not_write_at_once(tmp_path: Path) -> None:
    job = token_job(tmp_path / "c")
    job.begin()
    other = f"import fcntl; f = open({str(tmp_path / 'c' / '.lock')!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX);"
    command = [sys.executable, "-c", other + "print('locked', flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="another `mvar tokens` is writing it"), job.locked():
            pass
        process.communicate("\n")
    with job.locked():
        pass
    assert not (tmp_path / "c" / ".lock").exists()


def test_settings_survive_json() -> None:
    settings = token_settings(views=4, flip=True, resize_ratio=1.125)
    assert token_cache.CacheSettings.from_plain(json.loads(json.dumps(settings.to_plain()))) == settings
    assert dataclasses.replace(settings, views=2) != settings
