"""The site's lists are whole: every page has its chapter, every picture its command."""

from __future__ import annotations

import importlib
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mvar_lightning.cli import build_parser

ROOT = Path(__file__).parents[1]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "site"))
    for name in ("build", "gallery"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("build")


def test_every_page_stands_in_one_chapter(build: ModuleType) -> None:
    pages = [page for chapter in build.CHAPTERS.values() for page in chapter]
    written = {f"docs/{path.stem}" for kind in ("md", "ipynb") for path in (ROOT / "docs").glob(f"*.{kind}")}
    assert len(pages) == len(set(pages)) and {page for page in pages if page.startswith("docs/")} == written


def test_every_picture_has_its_command(build: ModuleType) -> None:
    assert {path.name for path in (ROOT / "docs" / "img").iterdir()} == set(build.GALLERY)


def test_the_commands_of_the_gallery_are_commands(build: ModuleType) -> None:
    """Each is one that the parser takes, of a recipe, a sweep's variant and a make target that are there."""
    targets = (ROOT / "Makefile").read_text()
    for file, (_, text) in build.GALLERY.items():
        for line in text.replace("\\\n", "").splitlines():
            words = shlex.split(line)
            if words[0] == "make":
                assert f"\n{words[1]}:" in targets, file
                continue
            assert words[0] == "mvar", file
            asked = build_parser().parse_args(words[1:])
            for recipe in {"train": words[2:3], "sweep": words[2:3]}.get(words[1], []):
                assert (ROOT / "recipes" / f"{recipe}.yaml").is_file(), file
            for checkpoint in asked.checkpoint if isinstance(getattr(asked, "checkpoint", None), list) else []:
                _, _, sweep, variant = checkpoint.partition("=")[2].split("/")[:4]
                assert f"{variant}:" in (ROOT / "recipes" / "ablations" / f"{sweep}.yaml").read_text(), checkpoint
