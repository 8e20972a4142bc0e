"""Fixtures of the tests of pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.pages.browser import find_chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One browser for this module; its event loop would disturb the tests of other modules."""
    path = find_chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()
