"""One writer, one lock, one claim."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvar_lightning.errors import UserError
from mvar_lightning.tools.files import Lock, check_claim, claim, sha256_of, write, write_json, writing
from mvar_lightning.tools.tensors import write_tensors

FULL = Path("/dev/full")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_written_whole_and_nothing_else_is_left(tmp_path: Path, durable: bool) -> None:
    write(tmp_path / "a.txt", "süß", durable=durable)
    write(tmp_path / "b.npz", lambda file: np.savez(file, x=np.arange(3)), durable=durable)
    write_json(tmp_path / "c.json", {"a": 1}, durable=durable)
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "süß"
    assert np.load(tmp_path / "b.npz")["x"].tolist() == [0, 1, 2]
    assert (tmp_path / "c.json").read_text() == '{\n  "a": 1\n}\n'
    assert names(tmp_path) == ["a.txt", "b.npz", "c.json"]


def test_a_failure_leaves_the_file_before(tmp_path: Path) -> None:
    write(tmp_path / "a", b"before")

    def broken(file: Any) -> None:
        file.write(b"half")
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        write(tmp_path / "a", broken)
    assert (tmp_path / "a").read_bytes() == b"before" and names(tmp_path) == ["a"]


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize("content", [b"x" * 100_000, lambda file: torch.save(torch.zeros(100_000), file)])
def test_a_full_disk_is_told_as_such_also_where_torch_writes(tmp_path: Path, content: Any) -> None:
    (tmp_path / f".partial-{os.getpid()}-a").symlink_to(FULL)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "a", content)
    assert names(tmp_path) == []


def test_several_files_take_their_names_together_or_not_at_all(tmp_path: Path) -> None:
    targets = [tmp_path / "a.json", tmp_path / "b.png"]
    with pytest.raises(KeyError), writing(*targets) as (first, second):
        assert (first.suffix, second.suffix) == (".json", ".png")
        first.write_text("whole")
        raise KeyError
    assert names(tmp_path) == []


def test_whoever_writes_the_mode_is_the_umasks(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "a", b"")
        write_tensors(tmp_path / "b.safetensors", {"x": torch.zeros(2)})
        write_tensors(tmp_path / "c.pth", {"x": torch.zeros(2)})
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "a": 0o640,
        "b.safetensors": 0o640,
        "c.pth": 0o640,
    }


def test_a_durable_write_sweeps_what_a_killed_one_left_and_spares_a_living_one(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f".partial-{ended.pid}-a").write_bytes(b"litter")
    (tmp_path / f".partial-{os.getppid()}-a").write_bytes(b"of another process")
    (tmp_path / f".partial-{ended.pid}-b").write_bytes(b"of another file")
    write(tmp_path / "a", b"new", durable=True)
    assert names(tmp_path) == sorted([f".partial-{os.getppid()}-a", f".partial-{ended.pid}-b", "a"])


HOLD = """
import sys
from pathlib import Path
from mvar_lightning.tools.files import Lock
with Lock(Path(sys.argv[1]), "busy"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_one_processs_and_names_it_until_that_ends(tmp_path: Path) -> None:
    lock = Lock(tmp_path / ".lock", "folder: in use ({owner}); wait")
    command = [sys.executable, "-c", HOLD, tmp_path / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        for asked in (lock.take, lock.check):
            with pytest.raises(UserError, match=rf"folder: in use \(process {other.pid} on .*\); wait"):
                asked()
        other.kill()
    with lock:
        lock.check()
        with pytest.raises(UserError, match="in use"):
            Lock(tmp_path / ".lock", "in use").take()
    lock.check()


def test_a_folder_is_claimed_by_its_settings(tmp_path: Path) -> None:
    def refuse(name: str, theirs: Any, ours: Any) -> str:
        return f"{name} {theirs}, now {ours}"

    note = tmp_path / "new" / "note.json"
    assert not check_claim(note, {"a": 1}, refuse) and not note.parent.exists()
    claim(note, {"a": 1, "b": (1, 2)}, refuse)
    claim(note, {"a": 1}, refuse)
    assert check_claim(note, {"b": [1, 2]}, refuse)
    with pytest.raises(UserError, match="a 1, now 2"):
        claim(note, {"a": 2}, refuse)
    note.write_text("{")
    with pytest.raises(UserError, match=r"note\.json: is damaged .* begin anew"):
        claim(note, {"a": 1}, refuse)


def test_the_digest_of_several_files_is_that_of_them_in_a_row(tmp_path: Path) -> None:
    for name, content in (("a", b"1"), ("b", b"2"), ("c", b"12")):
        (tmp_path / name).write_bytes(content)
    assert sha256_of(tmp_path / "a", tmp_path / "b") == sha256_of(tmp_path / "c")
