"""Mistakes of users, and the one line that 0.1.0 said to each before its files were moved.

``messages.json`` holds for each mistake the arguments, the exit status and that line. They were recorded on a16be38,
from a clone of it, with

    PYTHONPATH=. python .../tests/moving/test_messages.py

which runs the arguments in the file and writes what is said anew.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from mvar_lightning.cli import main

RECORD = Path(__file__).with_name("messages.json")
FILES = Path(__file__).with_name("made_by_0_1")
MISTAKES: list[dict[str, Any]] = json.loads(RECORD.read_text())

RECIPE_MISTAKES: dict[str, tuple[str, str, Any]] = {
    "misspelled": ("model", "depht", 2),
    "kernel": (
        "model",
        "attention",
        {"class_path": "mvar_lightning.SpatialAttention", "init_args": {"kernel_size": 2}},
    ),
    "argument": ("model", "attention", {"class_path": "mvar_lightning.SpatialAttention", "init_args": {"size": 3}}),
    "strategy": ("model", "attention", {"class_path": "mvar_lightning.FulAttention"}),
    "shards": ("data", "path", "data/none"),
    "size": ("data", "image_size", 16),
    "damaged": ("data", "path", "damaged"),
}
"""Recipe NAME.yaml is recipes/var.yaml with one setting that is wrong: section, name, value."""

SWEEP: dict[str, Any] = {
    "recipe": "recipes/var.yaml",
    "variants": {"deep": {"model.depth": 2}},
    "columns": [{"metric": "val/loss"}],
}
SWEEP_MISTAKES: dict[str, dict[str, Any]] = {
    "key": {"seed": [0]},
    "setting": {"variants": {"deep": {"model.depht": 2}}},
    "measure": {"columns": [{"metric": "val/loss", "measure": "mean"}]},
    "recipe": {"recipe": "recipes/none.yaml"},
    "good": {},
}


def prepare(folder: Path) -> None:
    """The old files, and beside them what a mistake needs: wrong recipes and sweeps, a damaged shard, a full folder."""
    shutil.copytree(FILES, folder, dirs_exist_ok=True)
    for name, (section, setting, value) in RECIPE_MISTAKES.items():
        content = yaml.safe_load((folder / "recipes/var.yaml").read_text())
        content[section]["init_args"][setting] = value
        (folder / f"recipes/{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    content = yaml.safe_load((folder / "recipes/var.yaml").read_text())
    content["model"]["class_path"] = "mvar_lightning.WARModule"
    (folder / "recipes/class.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    for name, changes in SWEEP_MISTAKES.items():
        (folder / f"sweep_{name}.yaml").write_text(yaml.safe_dump({**SWEEP, **changes}, sort_keys=False))
    shutil.copytree(folder / "data/digits", folder / "damaged")
    shard = folder / "damaged/train/000001.tar"
    shard.write_bytes(shard.read_bytes()[:20_000])
    shutil.copytree(folder / "runs/var/model", folder / "broken")
    weights = folder / "broken/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full/notes.txt").write_text("mine")
    (folder / "picture.png").write_text("no picture")


def said(arguments: Sequence[str], here: Path) -> dict[str, Any]:
    """Exit status and last line of standard error (of standard output where that is empty) of one command."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            status: Any = main(arguments)
        except SystemExit as end:  # a mistake that argparse finds
            status = end.code
    told = error.getvalue() if status == 2 else out.getvalue()
    lines = told.rstrip().splitlines()
    assert "Traceback" not in told, told
    return {"arguments": list(arguments), "status": status, "message": normal(lines[-1], here) if lines else ""}


def normal(line: str, here: Path) -> str:
    """A message without the machine's folders, and without the list of commands, to which some are added and from which
    `bench` was moved."""
    for path in {str(here.resolve()), str(here)}:
        line = line.replace(path, "<here>")
    return re.sub(r"(argument COMMAND: invalid choice: '[^']*') \(choose from .*\)", r"\1", line)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One place for all: a mistake leaves nothing behind."""
    folder = tmp_path_factory.mktemp("mistakes")
    prepare(folder)
    return folder


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: " ".join(mistake["arguments"])[:70])
def test_a_mistake_is_told_in_the_words_of_0_1(
    mistake: dict[str, Any], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.delenv("MVAR_TRACEBACK", raising=False)
    before = sorted(here.rglob("*"))
    found = said(mistake["arguments"], here)
    assert found == mistake
    assert sorted(here.rglob("*")) == before, "something was left behind"


def record() -> None:
    """Write ``messages.json`` anew: what the present code says to the arguments in it."""
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        prepare(here)
        os.chdir(here)
        found = [said(mistake["arguments"], here) for mistake in MISTAKES]
    RECORD.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    record()
