"""Requests with images of faces: off until the operator turns them on, kept for a day, and deleted with all of it."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import struct
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import flask.testing
import pytest
from PIL import Image

from batcher.pipelines import PipelineRunner
from provider_image.models.catalogue import CATALOGUE
from server.app import create_app
from server.settings import ServerSettings
from store.files import NewFile
from store.requests import Answer
from store.store import Store
from tests.provider_image.conftest import encode_image

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
        answer_model(store, "face_detector", FACES, {})

    return answer


@pytest.mark.parametrize(
    "model", ["face_detector", "face_crop", "face_quality", "face_pictures", "faces", "face_search"]
)
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


def test_requests_with_faces_are_tried_again_only_while_faces_are_on_and_kept(
    client: flask.testing.FlaskClient,
    faces_client: flask.testing.FlaskClient,
    store: Store,
    photos: dict[str, bytes],
) -> None:
    ids = []
    for model in ("face_detector", "faces"):
        reply = faces_client.post(f"/requestPrediction/{model}", data=photos["rocket"], content_type="image/jpeg")
        ids.append(reply.get_json()["req_id"])
        faces_client.delete(f"/requests/{ids[-1]}")

    refused = [client.post(f"/requests/{id}/retry").get_json()["code"] for id in ids]
    accepted = [faces_client.post(f"/requests/{id}/retry").status_code for id in ids]
    store.requests.expire(datetime.now(UTC) + timedelta(days=2))
    expired = [faces_client.post(f"/requests/{id}/retry") for id in ids]

    assert refused == ["faces_are_off"] * 2
    assert accepted == [200, 200]
    assert [reply.get_json()["code"] for reply in expired] == ["not_retryable"] * 2
    assert "kept" in expired[0].get_json()["reason"]


def test_a_training_cannot_take_the_name_of_a_pipeline(client: flask.testing.FlaskClient) -> None:
    replies = [
        client.post(f"/train/{name}", data=b"a,b\n1,2\n", content_type="text/csv") for name in ("faces", "facesearch")
    ]

    assert [(reply.status_code, reply.get_json()["code"]) for reply in replies] == [(409, "name_taken")] * 2


def test_nothing_is_learned_from_faces(
    faces_client: flask.testing.FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "efficientnet_lite0_embedding"
    monkeypatch.setitem(CATALOGUE, name, dataclasses.replace(CATALOGUE[name], takes_faces=True))
    faces_client.post("/collections", json={"name": "people", "model": name})

    zipped = faces_client.post("/train/people", data=b"PK", content_type="application/zip")
    collected = faces_client.post("/train/people?collection=people")

    assert [reply.get_json()["code"] for reply in (zipped, collected)] == ["unusable_examples"] * 2
    assert "takes faces" in zipped.get_json()["reason"] and "takes faces" in collected.get_json()["reason"]


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

    request = store.requests.get(reply.get_json()["req_id"])
    assert request.keep_seconds == seconds
    assert request.deadline_at is not None  # it is counted from when the parameters were read
    assert timedelta(hours=23) < request.deadline_at - request.created_at <= timedelta(days=1)


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


def test_crops_vectors_and_answers_of_a_pipeline_end_with_its_request(
    faces_client: flask.testing.FlaskClient, photos: dict[str, bytes], store: Store, settings: ServerSettings
) -> None:
    id = faces_client.post("/requestPrediction/face_search", data=photos["rocket"], content_type="image/jpeg")
    runner = PipelineRunner(store, settings.models, clock=lambda: datetime.now(UTC))
    vector = struct.pack("<1280f", 1, *[0] * 1279)
    answers: dict[str, tuple[object, dict[str, NewFile]]] = {
        "face_detector": (FACES, {}),
        "face_crop": (
            {"width": 8, "height": 8, "format": "png"},
            {"image": NewFile(data=encode_image(Image.new("RGB", (8, 8)), format="PNG"), media_type="image/png")},
        ),
        "face_pictures": (
            {"dimensions": 1280},
            {"vector": NewFile(data=vector, media_type="application/octet-stream")},
        ),
    }
    for model, (output, files) in answers.items():
        runner.run_ready()
        answer_model(store, model, output, files)
    runner.run_ready()
    assert count_vectors(store) == 1  # the other face has too low a score
    assert faces_client.get(f"/readPrediction/{id.get_json()['req_id']}").get_json()["status"] == "done"
    now = datetime.now(UTC) + timedelta(days=1, minutes=1)

    store.retention.purge(images_before=now - timedelta(days=7), results_before=now - timedelta(days=30), now=now)
    runner.run_ready()

    assert store.requests.list(limit=9) == []
    assert count_vectors(store) == 0
    assert _files(settings.images) == []


def count_vectors(store: Store) -> int:
    ((count,),) = store.database.rows("SELECT count(*) FROM collection_vectors")
    return int(count)


def answer_model(store: Store, model: str, output: object, files: dict[str, NewFile]) -> None:
    """Answer all requests to a model as a batcher would."""
    now = datetime.now(UTC)
    claims = store.requests.claim(
        models=[model], limit=9, now=now, lease_ends_at=now + timedelta(seconds=30), oldest_before=None
    )
    assert claims
    facts = {"output": output, "files": files, "digest": "d" * 64, "chunk_id": "c", "provider": "local", "seconds": 0.1}
    store.requests.finish([Answer(claim=one, **facts) for one in claims], now=now)  # type: ignore[arg-type]


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
