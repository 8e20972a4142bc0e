"""A browser for the tests of the pages: Debian's chromium, driven by playwright."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.programs import find_program

SCREENSHOTS = Path(__file__).parents[3] / ".screenshots"
#: Options of a session.
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
DESKTOP = {"viewport": {"width": 1200, "height": 800}}
#: Messages of the browser about errors that the tests provoke.
EXPECTED_MESSAGES = ("the server responded with a status of 4", "the server responded with a status of 5")


def find_chromium() -> str:
    """Return the path of the browser."""
    return find_program("chromium", "chromium-browser", package="chromium")


class BrowserSession:
    """A browser context that records requests to other hosts and errors in the console."""

    def __init__(self, browser: Any, base: str, **options: Any) -> None:
        self.base = base
        self.context = browser.new_context(base_url=base, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(120_000)
        self.foreign_urls: list[str] = []
        self.errors: list[str] = []
        self.context.on("request", self._note_request)
        self.context.on("console", self._note_message)
        self.context.on("weberror", lambda error: self.errors.append(str(error.error)))

    def _note_request(self, request: Any) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("blob", "data") and not request.url.startswith(f"{self.base}/"):
            self.foreign_urls.append(request.url)

    def _note_message(self, message: Any) -> None:
        if message.type == "error" and not any(words in message.text for words in EXPECTED_MESSAGES):
            self.errors.append(message.text)

    def save_screenshot(self, name: str, *, is_full_page: bool = True) -> None:
        """Save a screenshot of the page. :param is_full_page: include what is below the viewport."""
        SCREENSHOTS.mkdir(exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=is_full_page, animations="disabled")


@contextmanager
def browser_session(browser: Any, base: str, **options: Any) -> Iterator[BrowserSession]:
    """Open a page; check at the end that it contacted no other host and logged no error."""
    session = BrowserSession(browser, base, **options)
    try:
        yield session
    finally:
        session.context.close()
    assert not session.foreign_urls, session.foreign_urls
    assert not session.errors, session.errors
