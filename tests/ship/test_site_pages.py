"""The site builds without a warning, and its pages hold what they promise, in a browser of either look and width."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ship.browser import browsing, opened

from mvar_lightning.cli import COMMANDS

ROOT = Path(__file__).parents[2]
SECONDS = 90
"""Of a processor: a machine may have other work."""

pytestmark = pytest.mark.ship


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sphinx checks links between pages and their anchors; any warning ends it."""
    pytest.importorskip("sphinx"), pytest.importorskip("myst_nb")
    folder, before = tmp_path_factory.mktemp("site"), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "site" / "build.py", folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < SECONDS
    return folder / "html"


def test_every_command_recipe_and_picture_has_its_place(site: Path) -> None:
    options = (site / "generated" / "options.html").read_text()
    assert "mvar demo" in options and "--strips" in options and len(COMMANDS) > 10
    for recipe in (ROOT / "recipes").glob("*/*.yaml"):
        page = (site / "generated" / f"recipes_{recipe.parent.name}.html").read_text()
        assert f"{recipe.parent.name}/{recipe.stem}" in page
    gallery = (site / "generated" / "gallery.html").read_text()
    assert all(file.name in gallery for file in (ROOT / "docs" / "img").iterdir())
    sampling = (site / "reference" / "sampling.html").read_text()
    assert all(words in sampling for words in ("Parameters", "Raises", "UserError", "in [-1, 1]"))
    assert "arXiv 2505.12742" in (site / "reference" / "attention.html").read_text()


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """Of the site, served as `make docs-serve` does: a browser searches no files."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_it_is_searched_and_fits_its_window(address: str) -> None:
    with browsing() as browser:
        for width, scheme in ((1280, "light"), (390, "dark")):
            page, wrong = opened(browser, f"{address}/index.html", viewport={"width": width, "height": 800},
                                 color_scheme=scheme)  # fmt: skip
            for name in ("index", "docs/first_steps", "generated/options", "reference/sampling", "generated/gallery"):
                page.goto(f"{address}/{name}.html")
                assert page.evaluate("document.documentElement.scrollWidth") <= width, name
            page.goto(f"{address}/search.html?q=SpatialAttention")
            page.locator("#search-results li a").first.wait_for(timeout=30_000)
            assert not wrong
