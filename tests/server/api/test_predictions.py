"""The HTTP API without errors."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import flask.testing
import pytest
from PIL import Image

from provider_image import errors
from provider_image.models.artefact import find_artefact
from provider_image.models.catalogue import CATALOGUE
from provider_image.models.speed import Speed, write_speed
from server.app import create_app
from server.errors import HTTP_STATUS
from server.settings import ServerSettings
from store.states import RequestState
from store.store import Store
from tests.reduced_models import install_copy

MODEL = "efficientnet_lite0"
URL = f"/requestPrediction/{MODEL}"


def form(data: bytes, name: str = "kitten.jpg") -> dict[str, Any]:
    return {"image": (io.BytesIO(data), name)}


def test_a_form_is_acknowledged_with_an_id_and_is_durable(
    client: flask.testing.FlaskClient, store: Store, photos: dict[str, bytes]
) -> None:
    response = client.post(URL, data=form(photos["coffee"]))

    answer = response.json
    assert response.status_code == 202
    assert answer == {
        "success": True,
        "req_id": answer["req_id"],
        "status": "queued",
        "status_url": f"/readPrediction/{answer['req_id']}",
        "model": "efficientnet_lite0",
        "cached": False,
    }
    request = store.requests.get(answer["req_id"])
    assert (request.state, request.name) == (RequestState.QUEUED, "kitten.jpg")
    assert store.images.read(request.image_sha256) == photos["coffee"]


@pytest.mark.parametrize("content_type", ["image/jpeg", "image/x-whatever", "application/octet-stream", None])
def test_raw_bytes_are_accepted(
    client: flask.testing.FlaskClient, store: Store, photos: dict[str, bytes], content_type: str | None
) -> None:
    response = client.post(URL, data=photos["rocket"], content_type=content_type)

    assert response.status_code == 202
    assert store.images.read(store.requests.get(response.json["req_id"]).image_sha256) == photos["rocket"]


def test_a_body_without_a_declared_length_is_accepted(
    client: flask.testing.FlaskClient, photos: dict[str, bytes]
) -> None:
    chunked = {"wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"}

    response = client.post(
        URL, input_stream=io.BytesIO(photos["rocket"]), content_type="image/jpeg", environ_overrides=chunked
    )

    assert response.status_code == 202


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_is_accepted(client: flask.testing.FlaskClient, image_format: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "teal").save(file, image_format)

    response = client.post(URL, data=form(file.getvalue(), f"picture.{image_format.lower()}"))

    assert response.status_code == 202, response.text


@pytest.mark.parametrize("name", ["EfficientNet_Lite0", "EFFICIENTNET-LITE0", "efficientnetlite0"])
def test_a_model_is_found_in_any_case(client: flask.testing.FlaskClient, photos: dict[str, bytes], name: str) -> None:
    response = client.post(f"/requestPrediction/{name}", data=form(photos["rocket"]))

    assert response.json["model"] == "efficientnet_lite0"


def test_a_read_shows_why_a_request_waits(client: flask.testing.FlaskClient, photos: dict[str, bytes]) -> None:
    id = client.post(URL, data=form(photos["rocket"])).json["req_id"]

    for response in (client.get(f"/readPrediction/{id}"), client.post(f"/readPrediction/{id}")):
        answer = response.json
        assert response.status_code == 200
        assert (answer["success"], answer["status"], answer["preds"]) == (True, "queued", None)
        assert "mlg batch" in answer["waiting_for"]
        assert answer["eta_seconds"] is None
        assert datetime.fromisoformat(answer["created_at"]).tzinfo is not None
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["X-Content-Type-Options"] == "nosniff"


def test_an_answer_has_five_rows_by_default(
    client: flask.testing.FlaskClient, photos: dict[str, bytes], answer: Callable[..., list[str]]
) -> None:
    id = client.post(URL, data=form(photos["rocket"])).json["req_id"]

    answer()

    read = client.get(f"/readPrediction/{id}").json
    assert (read["status"], len(read["preds"])) == ("done", 5)
    assert read["preds"][0] == ["n00000020", "label_0", 0.095238]
    assert {"finished_at", "cached", "provider", "seconds", "digest", "attempts"} <= read.keys()
    assert "waiting_for" not in read
    assert len(client.get(f"/readPrediction/{id}?top=20").json["preds"]) == 20
    assert len(client.post(f"/readPrediction/{id}", data={"top": "1"}).json["preds"]) == 1


def test_top_of_the_request_is_in_the_status_url(
    client: flask.testing.FlaskClient, photos: dict[str, bytes], answer: Callable[..., list[str]], store: Store
) -> None:
    in_query = client.post(URL + "?top=3", data=form(photos["rocket"])).json
    in_form = client.post(URL, data={**form(photos["coffee"]), "top": "2"}).json

    answer()

    assert [len(client.get(made["status_url"]).json["preds"]) for made in (in_query, in_form)] == [3, 2]
    assert store.requests.get(in_query["req_id"]).params == {}


def test_a_failed_request_has_a_reason(
    client: flask.testing.FlaskClient, photos: dict[str, bytes], answer: Callable[..., list[str]]
) -> None:
    id = client.post(URL, data=form(photos["rocket"])).json["req_id"]

    answer(fail_with="The image is damaged.")

    read = client.get(f"/readPrediction/{id}").json
    assert (read["status"], read["preds"]) == ("failed", None)
    assert (read["reason"], read["code"], read["attempts"]) == ("The image is damaged.", "broken_image", 1)


def test_an_equal_image_is_answered_at_once_unless_fresh(
    settings: ServerSettings, client: flask.testing.FlaskClient, store: Store, photos: dict[str, bytes]
) -> None:
    from datetime import UTC, timedelta

    from provider_image.models.artefact import find_artefact
    from store.requests import Answer

    digest = find_artefact(settings.models, "efficientnet_lite0").digest
    client.post(URL, data=form(photos["rocket"]))
    now = datetime.now(UTC)
    (claim,) = store.requests.claim(
        models=["efficientnet_lite0"],
        limit=1,
        now=now,
        lease_ends_at=now + timedelta(seconds=30),
        oldest_before=None,
    )
    row = [["n1", "missile", 0.5]]
    store.requests.finish(
        [Answer(claim=claim, output=row, digest=digest, chunk_id="c", provider="p", seconds=0.1)], now=now
    )

    again = client.post(URL, data=form(photos["rocket"])).json
    fresh = client.post(URL + "?fresh=1", data=form(photos["rocket"])).json

    assert (again["status"], again["cached"]) == ("done", True)
    assert client.get(again["status_url"]).json["preds"] == row
    assert (fresh["status"], fresh["cached"]) == ("queued", False)


def test_a_queued_request_can_be_cancelled_once_and_queued_again(
    client: flask.testing.FlaskClient, photos: dict[str, bytes], answer: Callable[..., list[str]]
) -> None:
    id = client.post(URL, data=form(photos["rocket"])).json["req_id"]

    cancelled = client.delete(f"/requests/{id}")
    again = client.delete(f"/requests/{id}")
    retried = client.post(f"/requests/{id}/retry")
    answer()
    too_late = [client.delete(f"/requests/{id}"), client.post(f"/requests/{id}/retry")]

    assert (cancelled.status_code, cancelled.json["status"]) == (200, "cancelled")
    assert (again.status_code, again.json["code"]) == (409, "not_cancellable")
    assert (retried.status_code, retried.json["status"]) == (200, "queued")
    assert [(late.status_code, late.json["code"]) for late in too_late] == [
        (409, "not_cancellable"),
        (409, "not_retryable"),
    ]


def test_the_models_are_listed_with_what_is_installed(client: flask.testing.FlaskClient) -> None:
    models = {model["name"]: model for model in client.get("/models").json["models"]}

    assert models.keys() == CATALOGUE.keys()
    assert models["efficientnet_lite0"]["installed"]
    assert len(models["efficientnet_lite0"]["digest"]) == 64
    assert models["efficientnet_lite0"]["storage"] == "f32"
    assert models["efficientnet_lite0"]["size_bytes"] > 18e6
    assert models["nasnet_large"]["height"] == 331
    assert not models["vgg16"]["installed"]
    assert models["vgg16"]["install"] == "mlg models compile vgg16"
    assert [models["vgg16"][fact] for fact in ("digest", "size_bytes", "storage", "images_per_second")] == [None] * 4


def test_a_measured_speed_is_listed_while_the_digest_matches(
    settings: ServerSettings, client: flask.testing.FlaskClient, models_folder: Path
) -> None:
    settings.models.unlink()
    shutil.copytree(models_folder, settings.models)
    digest = find_artefact(settings.models, MODEL).digest

    def listed(measured: str) -> float | None:
        speed = Speed(
            digest=measured, images_per_second=123.4, threads=2, precision="f32", measured_at="2026-01-01T00:00:00Z"
        )
        assert write_speed(settings.models, MODEL, speed)
        return {model["name"]: model for model in client.get("/models").json["models"]}[MODEL]["images_per_second"]

    assert listed(digest) == 123.4
    assert listed("0" * 64) is None


def test_a_copy_in_another_precision_is_listed_with_its_figures(
    settings: ServerSettings, client: flask.testing.FlaskClient, models_folder: Path
) -> None:
    settings.models.unlink()
    shutil.copytree(models_folder / MODEL, settings.models / MODEL)
    copy = install_copy(settings.models, MODEL)

    models = {model["name"]: model for model in client.get("/models").json["models"]}
    home = client.get("/", headers={"Accept": "text/html"}).text

    assert models[MODEL]["reduced"] is None and models[copy.name]["digest"] == copy.digest != models[MODEL]["digest"]
    assert models[copy.name]["reduced"].items() >= {"base": MODEL, "same_first_label": 995, "is_quickest": True}.items()
    assert f"first label as {MODEL} on 99.5 % of 1000 images, 2.0 times as fast" in home


def test_a_model_that_builds_on_first_use_is_accepted_before(tmp_path: Path, photos: dict[str, bytes]) -> None:
    settings = ServerSettings(home=tmp_path / "bare")
    store = Store(settings)
    store.migrate()
    client = create_app(settings, store).test_client()

    listed = {model["name"]: model for model in client.get("/models").json["models"]}
    response = client.post(URL, data=form(photos["rocket"]))

    assert listed["efficientnet_lite0"]["builds_on_first_use"]
    assert response.status_code == 202
    store.close()


def test_health_and_readiness_differ(settings: ServerSettings, client: flask.testing.FlaskClient, store: Store) -> None:
    ready = client.get("/readyz")
    store.close()
    not_ready = client.get("/readyz")

    assert (ready.status_code, ready.json["store"], ready.json["batchers"]) == (200, "writable", 0)
    assert "mlg batch" in ready.json["warning"]
    assert (not_ready.status_code, not_ready.json["code"]) == (503, "store_unavailable")
    assert not_ready.headers["Retry-After"]
    assert client.get("/healthz").status_code == 200


def test_the_index_lists_every_route_and_an_example(client: flask.testing.FlaskClient) -> None:
    index = client.get("/").json

    rules = {rule.rule for rule in client.application.url_map.iter_rules()} - {"/"}
    named = {re.sub(r"<(?:\w+:)?(\w+)>", lambda match: match[1].upper(), rule) for rule in rules}
    assert {line.split(" ")[1] for line in index["routes"]} == named
    assert all(index["routes"].values()), index["routes"]
    assert index["try"][0].startswith("curl -F image=@kitten.jpg http://localhost/requestPrediction/")


def test_json_is_compact_and_ends_with_a_newline(client: flask.testing.FlaskClient) -> None:
    text = client.get("/healthz").text

    assert text == json.dumps(json.loads(text), separators=(",", ":")) + "\n"


def test_every_error_of_the_tree_has_a_status() -> None:
    def walk(kind: type[errors.MlgError]) -> list[type[errors.MlgError]]:
        return [kind, *(below for child in kind.__subclasses__() for below in walk(child))]

    for kind in walk(errors.BadInput):
        assert 400 <= next(HTTP_STATUS[base] for base in kind.__mro__ if base in HTTP_STATUS) < 500
    assert set(HTTP_STATUS) <= set(walk(errors.MlgError))


def test_an_unexpected_error_is_logged_with_its_id_and_answered_without_details(
    client: flask.testing.FlaskClient, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    def burst(id: str) -> None:
        raise ZeroDivisionError("secret detail")

    store.requests.get = burst  # type: ignore[assignment,method-assign]

    with caplog.at_level(logging.ERROR):
        response = client.get("/readPrediction/x")

    assert (response.status_code, response.json["code"]) == (500, "internal_error")
    assert "secret" not in response.text
    error_id = response.json["reason"].rpartition("error ")[2].rstrip(").")
    assert error_id in caplog.text
    assert "ZeroDivisionError" in caplog.text
