"""Requests with images of faces: off until the operator turns them on, kept for a day, and deleted with all of it."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import flask.testing
import pytest

from server.app import create_app
from server.settings import ServerSettings
from store.requests import Answer
from store.store import Store

FACES = {
    "width": 451,
    "height": 300,
    "faces": [
        {
            "box": {"left": 100.0, "top": 50.0, "width": 80.0, "height": 90.0},
            "eyes": [{"x": 120.0, "y": 80.0}, {"x": 160.0, "y": 82.0}],
            "angle": 2.9,
            "score": 0.9,
        },
        {"box": {"left": 1.0, "top": 5.0, "width": 8.0, "height": 9.0}, "eyes": [], "angle": 0.0, "score": 0.2},
    ],
}
Answerer = Callable[[], None]


@pytest.fixture
def faces_client(settings: ServerSettings, store: Store) -> flask.testing.FlaskClient:
    """The application with faces turned on."""
    return create_app(dataclasses.replace(settings, faces=True), store).test_client()


@pytest.fixture
def detect(store: Store) -> Answerer:
    """Answer all detections as a batcher would."""

    def answer() -> None:
        now = datetime.now(UTC)
        claims = store.requests.claim(
            models=["face_detector"], limit=9, now=now, lease_ends_at=now + timedelta(seconds=30), oldest_before=None
        )
        store.requests.finish(
            [
                Answer(claim=one, output=FACES, digest="d" * 64, chunk_id="c", provider="local", seconds=0.1)
                for one in claims
            ],
            now=now,
        )

    return answer


@pytest.mark.parametrize("model", ["face_detector", "face_crop", "face_quality", "face_pictures"])
def test_faces_are_refused_until_the_operator_turns_them_on(
    model: str, client: flask.testing.FlaskClient, photos: dict[str, bytes], stored_state: Callable[[], object]
) -> None:
    before = stored_state()

    reply = client.post(f"/requestPrediction/{model}", data=photos["rocket"], content_type="image/jpeg")

    assert (reply.status_code, reply.get_json()["code"]) == (403, "faces_are_off")
    assert "MLG_FACES" in reply.get_json()["reason"]
    assert stored_state() == before


def test_faces_are_refused_in_batches_and_when_requests_are_done_again(
    client: flask.testing.FlaskClient, photos: dict[str, bytes]
) -> None:
    batch = client.post("/requestPredictions/face_detector", data={"image": (io.BytesIO(photos["rocket"]), "a.jpg")})
    redo = client.post("/requests/redo?model=efficientnet_lite0&with=face_detector")

    assert (batch.status_code, redo.status_code) == (403, 403)


def test_models_of_faces_are_marked_in_the_list(client: flask.testing.FlaskClient) -> None:
    models = {model["name"]: model["takes_faces"] for model in client.get("/models").get_json()["models"]}

    assert models["face_detector"] and models["face_pictures"]
    assert not models["efficientnet_lite0"] and not models["crop"]


def test_faces_are_answered_with_boxes_and_eyes(
    faces_client: flask.testing.FlaskClient, photos: dict[str, bytes], detect: Answerer
) -> None:
    id = faces_client.post("/requestPrediction/face_detector", data=photos["rocket"], content_type="image/jpeg")
    detect()

    answer = faces_client.get(f"/readPrediction/{id.get_json()['req_id']}").get_json()
    few = faces_client.get(f"/readPrediction/{id.get_json()['req_id']}?min_score=0.5").get_json()

    assert answer["preds"] == FACES
    assert few["preds"]["faces"] == FACES["faces"][:1]


@pytest.mark.parametrize(("query", "seconds"), [("", 86400), ("?keep_seconds=60", 60), ("?keep_seconds=1e9", 86400)])
def test_faces_are_kept_for_a_day_at_most(
    query: str, seconds: float, faces_client: flask.testing.FlaskClient, photos: dict[str, bytes], store: Store
) -> None:
    reply = faces_client.post(
        f"/requestPrediction/face_detector{query}", data=photos["rocket"], content_type="image/jpeg"
    )

    assert store.requests.get(reply.get_json()["req_id"]).keep_seconds == seconds


def test_after_the_retention_time_nothing_is_left_of_a_face(
    faces_client: flask.testing.FlaskClient,
    photos: dict[str, bytes],
    detect: Answerer,
    store: Store,
    settings: ServerSettings,
) -> None:
    faces_client.post("/requestPrediction/face_detector", data=photos["rocket"], content_type="image/jpeg")
    detect()
    now = datetime.now(UTC) + timedelta(days=1, minutes=1)

    store.retention.purge(images_before=now - timedelta(days=7), results_before=now - timedelta(days=30), now=now)

    assert store.requests.list(limit=9) == []
    assert _files(settings.images) == []


def test_nothing_of_a_face_is_logged(
    faces_client: flask.testing.FlaskClient,
    photos: dict[str, bytes],
    detect: Answerer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)

    reply = faces_client.post(
        "/requestPrediction/face_detector",
        data={"image": (io.BytesIO(photos["rocket"]), "Ada Lovelace.jpg")},
    )
    detect()
    faces_client.get(f"/readPrediction/{reply.get_json()['req_id']}")

    assert "Lovelace" not in caplog.text and "eyes" not in caplog.text and json.dumps(FACES) not in caplog.text


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
