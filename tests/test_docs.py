"""The documents name what is there: links, files, modules and their names, commands."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mvar_lightning.cli import build_parser

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
TODAYS = [path for path in DOCUMENTS if path.name not in ("log.md", "CHANGELOG.md")]
"""The others name files and commands of their day."""

ELSEWHERE = ("models/", "utils/")
"""Beginnings of paths in the references."""

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
each_of_today = pytest.mark.parametrize("path", TODAYS, ids=lambda path: path.name)


@each_document
def test_relative_links_lead_to_files(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
    broken = [target for target in targets if "://" not in target and not (path.parent / target).exists()]
    assert not broken


@each_of_today
def test_files_that_are_named_are_there(path: Path) -> None:
    """Given from the top of the repository, from the package, or from the recipes."""
    named = set(re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|yaml|sbatch))`", path.read_text()))
    folders = (ROOT, ROOT / "mvar_lightning", ROOT / "recipes")
    missing = {name for name in named if not any((folder / name).exists() for folder in folders)}
    missing = {name for name in missing if not name.startswith(ELSEWHERE)}
    assert not missing


def names_in(text: str) -> Iterator[tuple[str, str | None]]:
    """(module or class path, None) as written, and (module, name) of every import."""
    for module, names in re.findall(r"from (mvar_lightning[\w.]*) import ([\w, ]+)", text):
        yield from ((module, name.strip()) for name in names.split(","))
    for dotted in re.findall(r"(?<![\w./])mvar_lightning(?:\.\w+)+(?!\w*/)", text):
        yield dotted, None


@each_of_today
@pytest.mark.filterwarnings("ignore:.*the old name works:FutureWarning")
def test_modules_and_names_are_there(path: Path) -> None:
    missing = [f"{module} {name or ''}" for module, name in names_in(path.read_text()) if not exists(module, name)]
    assert not missing


def exists(dotted: str, name: str | None) -> bool:
    parts = dotted.split(".") + ([name] if name else [])
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@each_of_today
def test_commands_are_there(path: Path) -> None:
    (commands,) = (action.choices for action in build_parser()._subparsers._group_actions)
    named = set(re.findall(r"(?:^|`)mvar ([a-z]+)", path.read_text(), flags=re.MULTILINE))
    gone = {"bench"} if path.name == "moving_from_0.md" else set()
    assert named - gone <= set(commands) - {"bench"}
