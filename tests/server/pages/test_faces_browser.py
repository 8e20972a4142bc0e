"""The page about faces in a browser: it draws boxes, eyes and answers as they come, after consent."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from werkzeug.serving import make_server

from server.app import create_app
from server.settings import ServerSettings
from store.store import Store

FOUND = {
    "width": 451,
    "height": 300,
    "faces": [
        {
            "box": {"left": 100, "top": 50, "width": 80, "height": 90},
            "eyes": [{"x": 120, "y": 80}, {"x": 160, "y": 82}],
            "angle": 2.9,
            "score": 0.9,
        },
        {"box": {"left": 200, "top": 40, "width": 60, "height": 60}, "eyes": [], "angle": 0, "score": 0.4},
    ],
}
#: What is read one after the other: first the faces, then the answers for them.
ANSWERS: list[dict[str, Any]] = [
    {"status": "queued", "steps": {"detect": {"status": "done", "preds": FOUND}, "crop": [], "quality": []}},
    {
        "status": "done",
        "steps": {
            "detect": {"status": "done", "preds": FOUND},
            "crop": [{"status": "done", "files": {}}, {"status": "failed", "reason": "broken"}],
            "quality": [
                {"status": "done", "preds": {"problems": ["blurred"]}},
                {"status": "skipped", "reason": "The step crop failed."},
            ],
            "age": [{"status": "done", "preds": [["", "adult", 0.9], ["", "<b>child</b>", 0.1]]}],
        },
    },
]


@pytest.fixture
def address(settings: ServerSettings, store: Store) -> Iterator[str]:
    """The pages with faces turned on."""
    server = make_server("127.0.0.1", 0, create_app(dataclasses.replace(settings, faces=True), store), threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


def test_faces_are_drawn_as_they_come_after_consent(browser: Any, address: str, photos: dict[str, bytes]) -> None:
    sent, left = [], list(ANSWERS)

    def answer(route: Any) -> None:
        body = left.pop(0) if len(left) > 1 else left[0]
        route.fulfill(body=json.dumps({"success": True, "req_id": "a" * 32, **body}), content_type="application/json")

    def accept(route: Any) -> None:
        sent.append(route.request.url)
        route.fulfill(status=202, body=json.dumps({"success": True, "req_id": "a" * 32}))

    page = browser.new_page()
    page.set_default_timeout(120_000)
    page.route("**/requestPrediction/faces", accept)
    page.route("**/readPrediction/*", answer)
    page.route("**/events*", lambda route: route.abort())
    page.goto(f"{address}/ui/faces")
    photo = {"name": "a.jpg", "mimeType": "image/jpeg", "buffer": photos["chelsea"]}
    page.set_input_files("#files", photo)
    page.wait_for_function("document.activeElement.id === 'consent'")
    before = list(sent)
    page.check("#consent")
    page.set_input_files("#files", photo)

    page.wait_for_selector("#overlay rect")
    page.wait_for_selector("#delete:visible")
    shapes = [page.locator(f"#overlay {shape}").count() for shape in ("rect", "circle", "text")]
    cards = page.locator("#faces li").all_inner_texts()
    page.close()

    assert (before, len(sent)) == ([], 1)
    assert shapes == [2, 2, 2]
    assert "blurred" in cards[0] and "adult 90 %" in cards[0] and "<b>child</b> 10 %" in cards[0]
    assert "The step crop failed." in cards[1]
