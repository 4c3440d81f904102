"""Chromium without a screen, for tests of the page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

# As root and without a network: no sandbox, and nothing that the browser fetches by itself.
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@contextmanager
def page_of(address: str, ready: str = "#right option", **context: Any) -> Iterator[Any]:
    """A page on an address, once it has what `ready` selects.

    Its `trouble` holds what the console said and what was fetched from elsewhere.
    """
    sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        page = browser.new_context(**context).new_page()
        page.trouble = []
        page.on("console", lambda message: page.trouble.append(message.text))
        page.on("pageerror", lambda error: page.trouble.append(str(error)))
        page.on(
            "request",
            lambda request: None if request.url.startswith((address, "data:")) else page.trouble.append(request.url),
        )
        page.goto(address)
        page.wait_for_selector(ready, state="attached")
        yield page
        browser.close()
