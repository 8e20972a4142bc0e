"""Services that take and return more than images and JSON: what the server accepts, refuses, stores and shows."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import flask.testing
import pytest
from PIL import Image

from server.app import create_app
from server.settings import ServerSettings
from store.clients.keys import KeyRecord, Scope, hash_key, make_key
from store.files import NewFile
from store.requests import Answer, Claim
from store.store import Store
from tests.extensions import COLUMNS, ROWS, install_extension_models, json_row

ROW = dict(zip(COLUMNS, ROWS["virginica"], strict=True))
FORM = "multipart/form-data"


def png(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (96, 64), color).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module", autouse=True)
def registered(registered_extensions: Path) -> None:
    """The services of the tests, in this process."""


@pytest.fixture
def settings(tmp_path: Path, models_folder: Path) -> ServerSettings:
    home = tmp_path / "home"
    install_extension_models(home / "models")
    (home / "models" / "efficientnet_lite0").symlink_to(models_folder / "efficientnet_lite0")
    return ServerSettings(home=home, server_threads=4)


@pytest.fixture
def client(settings: ServerSettings, store: Store) -> Iterator[flask.testing.FlaskClient]:
    with create_app(settings, store).test_client() as client:
        yield client


def claim(store: Store) -> list[Claim]:
    now = datetime.now(UTC)
    return store.requests.claim(
        models=["sepia", "iris_means"],
        limit=100,
        now=now,
        lease_ends_at=now + timedelta(seconds=60),
        oldest_before=None,
    )


def finish(store: Store, claims: list[Claim], color: str = "red", digest: str | None = None) -> int:
    """Answer as the service posterise does."""
    files = {"poster.png": NewFile(data=png(color), media_type="image/png")}
    data = {"width": 96, "height": 64, "levels": 4}
    answers = [
        Answer(
            claim=claim,
            output=data,
            files=files,
            digest=digest or "d" * 64,
            chunk_id="c1",
            provider="local",
            seconds=0.1,
        )
        for claim in claims
    ]
    return store.requests.finish(answers, now=datetime.now(UTC))


def stored(settings: ServerSettings) -> set[str]:
    return {path.name for path in settings.images.rglob("*") if path.is_file()}


def post(client: flask.testing.FlaskClient, model: str, **more: Any) -> dict[str, Any]:
    response = client.post(f"/requestPrediction/{model}", **more)
    assert response.status_code == 202, response.text
    found: dict[str, Any] = response.json
    return found


def reason(client: flask.testing.FlaskClient, model: str, **more: Any) -> tuple[int, str, str]:
    response = client.post(f"/requestPrediction/{model}", **more)
    return response.status_code, response.json["code"], response.json["reason"]


# Inputs


@pytest.mark.parametrize(
    "body",
    [
        {"json": {"row": ROW}},
        {"json": {"row": dict(reversed(ROW.items()))}},
        {"data": {"row": json.dumps(ROW, indent=2)}, "content_type": FORM},
        {"data": {"row": (io.BytesIO(json_row(ROWS["virginica"])), "row.json")}},
    ],
    ids=["json", "json in another order", "form", "file of a form"],
)
def test_a_row_is_accepted_in_any_form_and_stored_in_one(
    client: flask.testing.FlaskClient, store: Store, body: dict[str, Any]
) -> None:
    id = post(client, "iris_means", **body)["req_id"]

    (found,) = claim(store)
    assert found.id == id
    assert json.loads(store.images.read(found.image_sha256)) == ROW
    assert store.images.read(found.image_sha256) == json.dumps(ROW, sort_keys=True, separators=(",", ":")).encode()
    assert found.inputs == {}


@pytest.mark.parametrize(
    ("body", "status", "code", "words"),
    [
        ({"data": png("red"), "content_type": "image/png"}, 415, "unsupported_media_type", '{"row": {"column": 1.5}}'),
        ({"data": {"image": (io.BytesIO(png("red")), "a.png")}}, 400, "malformed_request", "no field `row`"),
        ({"json": {"url": "https://example.org/a.png"}}, 400, "malformed_request", "no `row`"),
        ({"json": {"row": [1, 2]}}, 400, "not_a_row", "JSON object"),
        ({"json": {"row": {"sepal_length": 1}}}, 400, "not_a_row", "Missing: petal_length"),
        ({"json": {"row": {**ROW, "color": "red"}}}, 400, "not_a_row", "Unknown: color"),
        ({"json": {"row": {**ROW, "sepal_length": {"cm": 1}}}}, 400, "not_a_row", "sepal_length"),
        ({"data": {"row": '{"sepal_length": NaN}'}, "content_type": FORM}, 400, "not_a_row", "not a JSON number"),
        ({"data": {"row": '{"a": 1, "a": 2}'}, "content_type": FORM}, 400, "not_a_row", "twice"),
        ({"data": {"row": '{"a": "\\ud800"}'}, "content_type": FORM}, 400, "not_a_row", "surrogates not allowed"),
        ({"json": {"row": {"a": "\ud800"}}}, 400, "not_a_row", "surrogates not allowed"),
        ({"data": {"row": ""}, "content_type": FORM}, 400, "malformed_request", "`row` is empty"),
        (
            {"data": {"row": json.dumps({**ROW, "note": "x" * 1000})}, "content_type": FORM},
            413,
            "too_large",
            "1000 bytes",
        ),
    ],
)
def test_what_is_not_a_row_of_the_model_is_refused_with_a_reason(
    client: flask.testing.FlaskClient, settings: ServerSettings, body: Any, status: int, code: str, words: str
) -> None:
    found = reason(client, "iris_means", **body)

    assert found[:2] == (status, code)
    assert words in found[2]
    assert not stored(settings)


def test_a_row_is_refused_by_a_model_that_takes_an_image(client: flask.testing.FlaskClient) -> None:
    _, code, sentence = reason(client, "sepia", data={"row": json.dumps(ROW)}, content_type=FORM)

    assert code == "malformed_request"
    assert "no field `image`" in sentence


def test_the_form_of_the_page_sends_images_only(client: flask.testing.FlaskClient) -> None:
    refused = client.post("/ui/send", data={"model": "iris_means", "image": (io.BytesIO(png("red")), "a.png")})
    accepted = client.post("/ui/send", data={"model": "sepia", "image": (io.BytesIO(png("red")), "a.png")})

    assert refused.status_code == 400 and "`row`" in refused.text
    assert accepted.status_code == 302 or accepted.status_code == 303


def test_an_optional_input_is_stored_beside_the_first_and_belongs_to_the_equality(
    client: flask.testing.FlaskClient, store: Store, settings: ServerSettings
) -> None:
    def with_note(note: bytes | None) -> Any:
        more = {} if note is None else {"note": (io.BytesIO(note), "note.txt")}
        return {"data": {"row": json.dumps(ROW), **more}, "content_type": FORM}

    for note in (b"first", None, b"second", b"first"):
        post(client, "iris_means", **with_note(note))

    first, without, second, again = claim(store)
    assert store.images.read(first.inputs["note"].sha256) == b"first"
    assert first.input_bytes == first.image_bytes + 5
    assert first.inputs == again.inputs != second.inputs
    assert without.inputs == {}
    assert len(stored(settings)) == 3


def test_the_description_names_every_input(client: flask.testing.FlaskClient) -> None:
    # Built from the registry when the views were declared, so the registry's schemas are asked for.
    from server.endpoint import input_schemas

    assert input_schemas().keys() == {"image", "row", "note", "style", "text"}
    assert input_schemas()["row"]["type"] == "object"


def test_a_batch_takes_rows_as_lines(client: flask.testing.FlaskClient, store: Store) -> None:
    lines = [
        {"client_id": "a", "row": ROW},
        {"client_id": "b", "row": {**ROW, "color": 1}},
        {"client_id": "c", "row": {**ROW, "sepal_length": 9}},
    ]

    response = client.post(
        "/requestPredictions/iris_means",
        data="\n".join(map(json.dumps, lines)),
        content_type="application/jsonl",
    )

    assert response.status_code == 202, response.text
    assert [(item["client_id"], item["code"]) for item in response.json["items"]] == [
        ("a", None),
        ("b", "not_a_row"),
        ("c", None),
    ]
    assert [json.loads(store.images.read(each.image_sha256))["sepal_length"] for each in claim(store)] == [6.3, 9]


# Outputs


def test_a_file_of_an_answer_is_listed_and_read(client: flask.testing.FlaskClient, store: Store) -> None:
    id = post(client, "sepia", data=png("blue"), content_type="image/png")["req_id"]
    assert finish(store, claim(store)) == 1

    shown = client.get(f"/readPrediction/{id}").json
    response = client.get(shown["files"]["poster.png"]["url"])

    assert shown["preds"] == {"width": 96, "height": 64, "levels": 4}
    assert shown["files"]["poster.png"] == {
        "url": f"/requests/{id}/files/poster.png",
        "media_type": "image/png",
        "bytes": len(png("red")),
    }
    assert (response.status_code, response.data) == (200, png("red"))
    assert response.headers["Content-Type"] == "image/png"
    assert response.headers["Content-Disposition"].startswith("inline")
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Content-Security-Policy"] == "default-src 'none'; sandbox"
    cached = client.get(shown["files"]["poster.png"]["url"], headers={"If-None-Match": response.headers["ETag"]})
    assert (cached.status_code, cached.data) == (304, b"")


def test_a_file_that_a_browser_could_run_is_only_saved(client: flask.testing.FlaskClient, store: Store) -> None:
    id = post(client, "iris_means", json={"row": ROW})["req_id"]
    (found,) = claim(store)
    answer = Answer(
        claim=found,
        output={"species": "virginica", "probability": 0.9},
        files={"note.txt": NewFile(data=b"<script>", media_type="text/plain")},
        digest="d" * 64,
        chunk_id="c1",
        provider="local",
        seconds=0.1,
    )
    store.requests.finish([answer], now=datetime.now(UTC))

    response = client.get(f"/requests/{id}/files/note.txt")

    assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert response.headers["Content-Disposition"] == "attachment; filename=note.txt"
    assert client.get(f"/requests/{id}/picture").headers["Content-Disposition"].startswith("attachment")


@pytest.mark.parametrize("path", ["other.png", "..%2Fmlg.db", "poster.png/..", ""])
def test_a_file_that_the_answer_does_not_have_is_unknown(
    client: flask.testing.FlaskClient, store: Store, path: str
) -> None:
    id = post(client, "sepia", data=png("blue"), content_type="image/png")["req_id"]
    finish(store, claim(store))

    assert client.get(f"/requests/{id}/files/{path}").status_code == 404


def test_a_file_is_read_only_with_the_key_of_its_request(client: flask.testing.FlaskClient, store: Store) -> None:
    scopes, now = frozenset({Scope.SUBMIT, Scope.READ}), datetime.now(UTC)
    (owner_id, owner), (other_id, other) = make_key(), make_key()
    for id, key in ((owner_id, owner), (other_id, other)):
        store.keys.add(KeyRecord(id=id, name=id, sha256=hash_key(key), scopes=scopes, created_at=now))

    def authorized(key: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {key}"}

    headers = authorized(owner)
    id = post(client, "sepia", data=png("blue"), content_type="image/png", headers=headers)["req_id"]
    finish(store, claim(store))
    path = f"/requests/{id}/files/poster.png"

    assert client.get(path, headers=headers).status_code == 200
    assert client.get(path, headers=authorized(other)).status_code == 404
    assert client.get(path).status_code == 401


def test_equal_requests_share_an_answer_and_its_files_only_if_the_params_are_equal(
    client: flask.testing.FlaskClient, store: Store, settings: ServerSettings
) -> None:
    from provider_image.models.artefact import find_artefact

    digest = find_artefact(settings.models, "sepia").digest
    image = {"data": png("blue"), "content_type": "image/png"}
    first = post(client, "sepia", **image)
    finish(store, claim(store), digest=digest)

    same = post(client, "sepia?levels=4", **image)
    other = post(client, "sepia?levels=5", **image)

    assert (first["cached"], same["cached"], other["cached"]) == (False, True, False)
    assert client.get(f"/requests/{same['req_id']}/files/poster.png").data == png("red")
    assert claim(store)[0].params == {"levels": 5}
    # The first may go: the other still has its file.
    assert client.post(f"/requests/{first['req_id']}/delete").status_code == 200
    assert client.get(f"/requests/{same['req_id']}/files/poster.png").data == png("red")
    assert client.post(f"/requests/{same['req_id']}/delete").status_code == 200
    assert len(stored(settings)) == 1  # the image of the one that waits


def test_pages_show_requests_of_other_services(client: flask.testing.FlaskClient, store: Store) -> None:
    row = post(client, "iris_means", json={"row": ROW})["req_id"]
    image = post(client, "sepia", data=png("blue"), content_type="image/png")["req_id"]
    finish(store, [each for each in claim(store) if each.model == "sepia"])
    headers = {"Accept": "text/html"}

    assert '<th scope="row">petal_length</th><td>6.0</td>' in client.get(f"/ui/requests/{row}", headers=headers).text
    assert f"/requests/{image}/files/poster.png" in client.get(f"/ui/requests/{image}", headers=headers).text
    gallery = client.get("/ui/requests", headers=headers).text
    assert f"/requests/{image}/picture" in gallery and f"/requests/{row}/picture" not in gallery


def test_answers_of_a_service_that_was_removed_can_still_be_read(
    client: flask.testing.FlaskClient, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = post(client, "sepia", data=png("blue"), content_type="image/png")["req_id"]
    finish(store, claim(store))
    monkeypatch.setattr("server.serializers.REGISTRY", {})

    assert client.get(f"/readPrediction/{id}").json["preds"]["levels"] == 4
    assert client.get(f"/requests/{id}/files/poster.png").status_code == 200
    assert client.get("/ui/requests", headers={"Accept": "text/html"}).status_code == 200


def test_the_list_of_models_says_what_each_takes(client: flask.testing.FlaskClient) -> None:
    inputs = {model["name"]: model["inputs"] for model in client.get("/models").json["models"]}

    assert [(name, one["kind"]) for name, one in inputs["blend_even"].items()] == [
        ("image", "image"),
        ("style", "image"),
    ]
    assert [(name, one["is_optional"]) for name, one in inputs["iris_means"].items()] == [
        ("row", False),
        ("note", True),
    ]
