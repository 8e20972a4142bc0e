"""The page of the API in a real browser: its forms send what they say, and show what comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import RunningServer, start_server
from tests.server.pages.browser import browser_session, find_chromium

__all__ = ["start_server"]


@pytest.fixture
def base(start_server: Callable[..., RunningServer]) -> str:
    find_chromium()
    return start_server().base


def test_a_form_sends_its_call_and_shows_the_answer(base: str, photos: dict[str, bytes]) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium())
        with browser_session(browser, base, viewport={"width": 1100, "height": 900}) as visitor:
            page = visitor.page
            page.goto("/ui/api")

            def try_it(name_of_call: str, /, **values: Any) -> str:
                call = page.locator(f"section[aria-labelledby={name_of_call}]")
                call.get_by_text("Try it").click()
                for name, value in values.items():
                    field = call.locator(f"form.try [name={name}]").last
                    if isinstance(value, dict):
                        field.set_input_files(value)
                    else:
                        field.fill(value)
                call.get_by_role("button", name="Send").click()
                call.locator(".outcome p").filter(has_text=": ").wait_for()
                page.wait_for_function(
                    "id => document.querySelector(`section[aria-labelledby=${id}] .stop`).hidden", arg=name_of_call
                )
                return f"{call.locator('.outcome p').text_content()}\n{call.locator('.outcome pre').text_content()}"

            image = {"name": "rocket.jpg", "mimeType": "image/jpeg", "buffer": photos["rocket"]}
            sent = try_it("request_prediction", image=image)
            id = sent.partition('"req_id": "')[2].partition('"')[0]
            read = try_it("read_prediction", id=id)
            missing = try_it("cancel", id="nothing/at all")
            visitor.save_screenshot("api")
            page.set_viewport_size({"width": 375, "height": 800})
            too_wide = page.evaluate(
                "[...document.querySelectorAll('main *')].filter((one) => !one.closest('.wide, pre, .unseen') && "
                "one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 200))"
            )
        browser.close()

    assert sent.startswith("POST /requestPrediction/efficientnet_lite0: 202")
    assert f'"req_id": "{id}"' in read and '"status": "queued"' in read
    assert "/readPrediction/" in read.splitlines()[0] and ": 200" in read.splitlines()[0]
    assert missing.startswith("DELETE /requests/nothing%2Fat%20all: 404")
    assert not too_wide
