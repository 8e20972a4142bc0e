"""The API reference in a browser: its forms send the call and show the response."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import RunningServer, start_server
from tests.server.pages.browser import browser_session

__all__ = ["start_server"]


@pytest.fixture
def base(browser: Any, start_server: Callable[..., RunningServer]) -> str:
    return start_server().base


def test_a_form_sends_its_call_and_shows_the_response(browser: Any, base: str, photos: dict[str, bytes]) -> None:
    with browser_session(browser, base, viewport={"width": 1100, "height": 900}) as session:
        page = session.page
        page.goto("/ui/api")

        def try_call(operation_id: str, /, **values: Any) -> str:
            call = page.locator(f"section[aria-labelledby={operation_id}]")
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
                "id => document.querySelector(`section[aria-labelledby=${id}] .stop`).hidden", arg=operation_id
            )
            return f"{call.locator('.outcome p').text_content()}\n{call.locator('.outcome pre').text_content()}"

        image = {"name": "rocket.jpg", "mimeType": "image/jpeg", "buffer": photos["rocket"]}
        sent = try_call("request_prediction", image=image)
        id = sent.partition('"req_id": "')[2].partition('"')[0]
        read = try_call("read_prediction", id=id)
        missing = try_call("cancel", id="nothing/at all")
        session.save_screenshot("api")
        page.set_viewport_size({"width": 375, "height": 800})
        too_wide = page.evaluate(
            "[...document.querySelectorAll('main *')]"
            ".filter((element) => !element.closest('.table-scroll, pre, .visually-hidden'))"
            ".filter((element) => element.getBoundingClientRect().right > innerWidth + 1)"
            ".map((element) => element.outerHTML.slice(0, 200))"
        )

    assert sent.startswith("POST /requestPrediction/efficientnet_lite0: 202")
    assert f'"req_id": "{id}"' in read and '"status": "queued"' in read
    assert "/readPrediction/" in read.splitlines()[0] and ": 200" in read.splitlines()[0]
    assert missing.startswith("DELETE /requests/nothing%2Fat%20all: 404")
    assert not too_wide
