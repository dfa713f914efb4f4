"""Rows of signals to what makes data with processes of its own: to it alone (`kill`), or to all (Ctrl-C, SLURM)."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.faults.harness import Answer, ask, start

WATCHED = """
import os, signal, sys, time
from pathlib import Path
from mvar_lightning import cli
def others():
    group = str(os.getpgrp())
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if its == group and state != "Z" and stat.parent.name != str(os.getpid()):
            yield stat.parent.name
command = os.fork()
if command == 0:
    Path("command.new").write_text(str(os.getpid()))
    os.rename("command.new", "command")
    sys.exit(cli.main({argv!r}))
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
status = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
end = time.monotonic() + 10
while (left := list(others())) and time.monotonic() < end:
    time.sleep(0.02)
print("left:", *left)
sys.exit(status)
"""
"""Runs a command, and when it has ended waits for what it has started to end, too, or says what did not."""


def stopped(argv: list[str], cwd: Path, mark: str, number: signal.Signals, to: str) -> Answer:
    """A command that gets a signal once a file of this form is there."""
    begun = start(code=WATCHED.format(argv=argv), cwd=cwd, seconds=60)
    while not list(cwd.glob(mark)) and not begun.ended():
        time.sleep(0.005)
    assert not begun.ended(), begun.finish()
    if to == "command":
        os.kill(int((cwd / "command").read_text()), number)
    else:
        os.killpg(begun.pid, number)
    return begun.finish()


def check_stopped(answer: Answer, *words: str) -> None:
    assert answer.status == 130, (answer.status, answer.out, answer.err)
    lines = [line for line in answer.err.splitlines() if line.startswith("mvar: ")]
    assert len(lines) == 1 and answer.err.splitlines()[-1:] == lines, answer.err
    assert "Traceback" not in answer.err and all(word in lines[0] for word in words), answer.err
    assert answer.out.splitlines()[-1].split() == ["left:"], answer.out


SIGNALS = [
    (signal.SIGINT, "group"),
    pytest.param(signal.SIGTERM, "command", marks=pytest.mark.slow),
    pytest.param(signal.SIGTERM, "group", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("number", "to"), SIGNALS)
def test_making_shards(number: signal.Signals, to: str, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(32) % 2)
    argv = ["shards", "make", "set.npz", "out", "--workers", "2", "--samples-per-shard", "2", "--resize", "256"]
    check_stopped(stopped(argv, tmp_path, ".out*/records/[!.]*.json", number, to), "the same command goes on")
    assert not (tmp_path / "out").exists()
    records = len(list(tmp_path.glob(".out*/records/[!.]*.json")))
    answer = ask(*argv, cwd=tmp_path)
    assert answer.status == 0, answer.err
    assert f"going on, {records} of " in answer.out + answer.err
    check_tidy(tmp_path / "out")


@pytest.mark.parametrize(("number", "to"), SIGNALS)
def test_making_tokens(number: signal.Signals, to: str, tmp_path: Path, tokenizer: Path, shards: Path) -> None:
    argv = ["tokens", "make", "--checkpoint", str(tokenizer), "--data", str(shards), "--out", "cache", "--views", "40"]
    check_stopped(stopped(argv, tmp_path, "cache/*/0*.json", number, to), "the same command goes on")
    assert not (tmp_path / "cache/index.json").exists()
    records = [path.with_suffix("") for path in tmp_path.glob("cache/*/0*.json")]  # an array without is made again
    written = {each: each.stat().st_mtime_ns for path in records for each in path.parent.glob(f"{path.name}.*npy")}
    assert written
    answer = ask(*argv, cwd=tmp_path)
    assert answer.status == 0, answer.err
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in written.items())
    check_tidy(tmp_path / "cache")


def check_tidy(folder: Path) -> None:
    """What killed workers left is gone with what was made."""
    left = [path for path in (*folder.parent.iterdir(), *folder.rglob("*")) if path.name.startswith(".")]
    assert not left
