"""The site's lists are whole: every page has its chapter, every picture its command."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

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
