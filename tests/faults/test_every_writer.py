"""Every command that writes, where it cannot: another user, a read-only mount, no room, a closed pipe."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import ask, broken_promise

NOBODY = 65534

COMMANDS = {
    "shards make": ("images", "shards make {here}/images out --val-fraction 0.2"),
    "tokens make": (
        "tok shards",
        "tokens make --checkpoint {here}/tok --data {here}/shards --out out --resize-ratio 1.0 --num-workers 0",
    ),
    "train": ("recipes tok shards", "train {here}/recipes/var.yaml --run-folder out"),
    "fit": ("recipes tok shards", "fit --config {here}/recipes/var.yaml --run-folder out"),
    "sample": ("var", "sample --checkpoint {here}/var --count 1 --out out"),
    "edit": ("var ant.png", "edit --checkpoint {here}/var --image {here}/ant.png --box 0,0,.5,.5 --count 1 --out out"),
    "reconstruct": ("tok ant.png", "reconstruct --checkpoint {here}/tok {here}/ant.png --out out.png"),
    "evaluate tokenizer": (
        "tok shards",
        "evaluate tokenizer --checkpoint {here}/tok --data {here}/shards --features none --out out",
    ),
    "evaluate images": (
        "npz features.ts",
        "evaluate images --images {here}/npz/images.npz --reference {here}/npz/images.npz "
        "--features {here}/features.ts --out out",
    ),
    "analyze": ("var shards", "analyze attention --checkpoint {here}/var --data {here}/shards --out out"),
    "import": (
        "official",
        "import --architecture var --model {here}/official/var.pth --tokenizer {here}/official/var_tok.pth "
        "--patch-nums 1,2 --out out",
    ),
    "export": ("var", "export {here}/var --model out.pth --tokenizer out_tok.pth"),
}
"""What each needs, and the command; ``here`` is where that lies, and it writes into the current folder."""

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="another user and a mount need root")


@pytest.fixture(params=COMMANDS)
def argv(request: pytest.FixtureRequest, assets: Path, tmp_path: Path) -> list[str]:
    """A command with what it needs beside the folder that it writes to; others may read all of it."""
    needs, command = COMMANDS[request.param]
    for name in needs.split():
        source = assets / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    if "recipes" in needs:
        recipe = tmp_path / "recipes" / "var.yaml"
        text = recipe.read_text()
        for name in ("tok", "shards"):
            text = text.replace(f": {name}\n", f": {tmp_path / name}\n")
        recipe.write_text(text)
    for path in (tmp_path, *tmp_path.parents[:2], *tmp_path.rglob("*")):
        path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))
    (tmp_path / "work").mkdir()
    return shlex.split(command.format(here=tmp_path))


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "mounted"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", place], check=True)


def left(folder: Path) -> list[str]:
    """What a refused command leaves: nothing, or a folder of results without files that look whole."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


@ROOT
def test_another_user(argv: list[str], tmp_path: Path) -> None:
    answer = ask(*argv, cwd=tmp_path / "work", uid=NOBODY, seconds=60)
    assert broken_promise(answer) is None, answer.err
    assert answer.status == 2 and "ermission denied" in answer.line, answer.err
    assert left(tmp_path / "work") == []


@ROOT
def test_a_read_only_mount(argv: list[str], read_only: Path) -> None:
    answer = ask(*argv, cwd=read_only, seconds=60)
    assert broken_promise(answer) is None, answer.err
    assert answer.status == 2 and "ead-only" in answer.line, answer.err


def test_no_room(argv: list[str], tmp_path: Path) -> None:
    room = 0.002 if argv[0] in ("train", "fit") else 0.00001  # what a run says is written, too
    answer = ask(*argv, cwd=tmp_path / "work", file_mb=room, seconds=60)
    assert broken_promise(answer) is None, answer.err
    assert answer.status == 2, answer.err


def test_a_closed_pipe(argv: list[str], tmp_path: Path) -> None:
    answer = ask(*argv, cwd=tmp_path / "work", stdout="closed", seconds=60)
    assert answer.status == 0 and "Traceback" not in answer.err, answer.err
    assert left(tmp_path / "work")
