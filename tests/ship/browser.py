"""Debian's Chromium, driven by Playwright's Python package: nothing is downloaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

OURS = ("http://127.0.0.1", "data:", "blob:", "file:")


@contextmanager
def browsing() -> Iterator[Any]:
    """A browser; a test that asks for one is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright (make install)")
    if CHROMIUM is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Any, address: str, **settings: Any) -> tuple[Any, list[str]]:
    """A page of a new visitor, and the list that takes what goes wrong in it."""
    page = browser.new_context(**settings).new_page()
    wrong: list[str] = []
    page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: request.url.startswith(OURS) or wrong.append(request.url))
    page.goto(address)
    return page, wrong
