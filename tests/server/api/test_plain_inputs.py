"""Table rows and texts: what the server accepts, alone and in batches, and how the pages show them and the answers."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import flask.testing
import pytest

from provider_image.services.text import MAX_TEXT_BYTES
from server.app import create_app
from server.settings import ServerSettings
from store.requests import Answer, Claim
from store.store import Store
from tests.linear_models import LINEAR_PAIRS, RENT_ROW, install_linear_models

FORM, URLENCODED = "multipart/form-data", "application/x-www-form-urlencoded"
UNSUPPORTED = "unsupported_media_type"
PAGE = {"Accept": "text/html"}
TEXT = "A <b>wonderful</b> film"


@pytest.fixture(scope="module")
def linear_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_linear_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def settings(tmp_path: Path, linear_models: Path) -> ServerSettings:
    home = tmp_path / "home"
    home.mkdir()
    (home / "models").symlink_to(linear_models)
    return ServerSettings(home=home, server_threads=4)


@pytest.fixture
def client(settings: ServerSettings, store: Store) -> Iterator[flask.testing.FlaskClient]:
    with create_app(settings, store).test_client() as client:
        yield client


def claim(store: Store) -> list[Claim]:
    now = datetime.now(UTC)
    models = [model for _, model in LINEAR_PAIRS]
    ends_at = now + timedelta(seconds=60)
    return store.requests.claim(models=models, limit=100, now=now, lease_ends_at=ends_at, oldest_before=None)


def finish(store: Store, output: Any) -> None:
    answers = [
        Answer(claim=each, output=output, digest="d" * 64, chunk_id="c1", provider="local", seconds=0.1)
        for each in claim(store)
    ]
    store.requests.finish(answers, now=datetime.now(UTC))


@pytest.mark.parametrize(
    "body",
    [
        {"json": {"text": f" {TEXT}\n"}},
        {"data": TEXT, "content_type": "text/plain"},
        {"data": TEXT, "content_type": "text/plain; charset=utf-8"},
        {"data": TEXT, "content_type": "application/octet-stream"},
        {"data": {"text": TEXT}, "content_type": FORM},
        {"data": {"text": (io.BytesIO(TEXT.encode()), "a.txt")}, "content_type": FORM},
    ],
    ids=["json", "plain", "charset", "bytes", "form", "file of a form"],
)
def test_a_text_is_accepted_in_any_form_and_stored_in_one(
    client: flask.testing.FlaskClient, store: Store, body: dict[str, Any]
) -> None:
    response = client.post("/requestPrediction/mood", **body)

    assert response.status_code == 202, response.text
    (found,) = claim(store)
    assert store.images.read(found.image_sha256) == TEXT.encode()


@pytest.mark.parametrize(
    ("model", "body", "status", "code", "words"),
    [
        ("mood", {"json": {"text": 5}}, 400, "not_a_text", "must be a string"),
        ("mood", {"json": {"text": "\ud800"}}, 400, "not_a_text", "half of a character"),
        ("mood", {"json": {"text": " "}}, 400, "not_a_text", "empty"),
        ("mood", {"json": {"row": {}}}, 400, "malformed_request", "'row'"),
        ("mood", {"json": {"top": 1}}, 400, "malformed_request", 'no `text`. This model takes `text` (text). Send'),
        ("mood", {"json": {"text": "a", "top": 99}}, 400, "invalid_params", "top"),
        ("mood", {"data": b"\xff", "content_type": "text/plain"}, 400, "not_a_text", "not UTF-8"),
        ("mood", {"data": b"a\0", "content_type": "text/plain"}, 400, "not_a_text", "null"),
        ("mood", {"data": "text=a", "content_type": URLENCODED}, 415, UNSUPPORTED, '{"text": "some words"}'),
        ("mood", {"data": "x" * (MAX_TEXT_BYTES + 1), "content_type": "text/plain"}, 413, "too_large", "32768 bytes"),
        ("mood", {"json": {"text": "x" * (MAX_TEXT_BYTES + 1)}}, 413, "too_large", "32768 bytes"),
        ("mood", {"json": {"text": "x" * 10 * MAX_TEXT_BYTES}}, 413, "too_large", "too large"),
        ("rent", {"json": {"row": {"area": 5}}}, 400, "not_a_row", "Missing: city"),
        ("rent", {"data": "5", "content_type": "text/plain"}, 415, UNSUPPORTED, '{"row": {"column": 1.5}}'),
    ],
)  # fmt: skip
def test_what_is_no_text_or_row_is_refused_with_a_reason(
    client: flask.testing.FlaskClient, store: Store, model: str, body: Any, status: int, code: str, words: str
) -> None:
    response = client.post(f"/requestPrediction/{model}", **body)

    assert (response.status_code, response.json["code"]) == (status, code)
    assert words in response.json["reason"]
    assert claim(store) == []


def batch(client: flask.testing.FlaskClient, model: str, data: str | bytes, kind: str) -> Any:
    return client.post(f"/requestPredictions/{model}", data=data, content_type=kind)


def outcomes(response: Any) -> list[tuple[str, str | None]]:
    assert response.status_code == 202, response.text
    return [(item["client_id"], item["code"]) for item in response.json["items"]]


def test_a_batch_takes_texts_as_lines(client: flask.testing.FlaskClient, store: Store) -> None:
    lines = [{"text": "good"}, {"client_id": "b", "text": " "}, {"client_id": 7, "text": "\u00e9" * 10_000}]

    response = batch(client, "mood", "\n".join(map(json.dumps, lines)), "application/jsonl")

    assert outcomes(response) == [("0", None), ("b", "not_a_text"), ("7", None)]
    assert [len(store.images.read(each.image_sha256)) for each in claim(store)] == [4, 20_000]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_batch_takes_rows_as_csv(client: flask.testing.FlaskClient, store: Store, delimiter: str) -> None:
    lines = ["\ufeffclient_id,area, city ", 'a,50.5,"Bonn ""Süd"""', "b,", "", "c,,Köln"]

    response = batch(client, "rent", "\r\n".join(lines).replace(",", delimiter).encode(), "text/csv; charset=utf-8")

    assert outcomes(response) == [("a", None), ("b", "not_a_row"), ("c", None)]
    assert "2 fields, and there are 3 columns" in response.json["items"][1]["reason"]
    assert [json.loads(store.images.read(each.image_sha256)) for each in claim(store)] == [
        {"area": "50.5", "city": 'Bonn "Süd"'},
        {"area": "", "city": "Köln"},
    ]


def test_a_batch_takes_texts_as_csv_with_line_ends_in_them(client: flask.testing.FlaskClient, store: Store) -> None:
    response = batch(client, "stars", 'text\n"good,\nreally"\nbad\n', "text/csv")

    assert outcomes(response) == [("0", None), ("1", None)]
    assert {store.images.read(each.image_sha256) for each in claim(store)} == {b"good,\nreally", b"bad"}


@pytest.mark.parametrize(
    ("model", "data", "status", "words"),
    [
        ("rent", "area,city\n", 400, "The batch has no row."),
        ("rent", "area,area\n1,2\n", 400, "each with its own name"),
        ("rent", "area,\n1,2\n", 400, "each with its own name"),
        ("rent", b"area,city\n1,\xff\n", 400, "must be UTF-8"),
        ("rent", 'area,city\n1,"Bonn\n', 400, "cannot be read"),
        ("rent", 'area,city\n"' + '\n","' * 40_000, 400, "longer than"),
        ("rent", "x" * 200_000, 400, "longer than"),
        ("rent", "client_id,area,city\na,1,Bonn\na,2,Bonn\n", 409, "given twice"),
        ("stars", "text,stars\ngood,5\n", 400, "must have the column 'text'"),
        ("stars", "words\ngood\n", 400, "must have the column 'text'"),
    ],
)
def test_csv_that_cannot_be_read_is_refused_as_a_whole(
    client: flask.testing.FlaskClient, store: Store, model: str, data: str | bytes, status: int, words: str
) -> None:
    response = batch(client, model, data, "text/csv")

    assert response.status_code == status
    assert words in response.json["reason"]
    assert claim(store) == []


def test_batch_of_another_type_is_told_what_to_send(client: flask.testing.FlaskClient) -> None:
    response = batch(client, "rent", "{}", "application/json")

    assert response.status_code == 415
    assert '{"row": {"column": 1.5}}' in response.json["reason"] and "text/csv" in response.json["reason"]


def test_list_of_models_says_what_each_takes(client: flask.testing.FlaskClient) -> None:
    models = {model["name"]: model for model in client.get("/models").json["models"]}

    assert (models["rent"]["input"], models["rent"]["columns"]) == ("row", ["area", "city"])
    assert (models["mood"]["input"], models["mood"]["columns"]) == ("text", [])
    assert models["resnet50"]["input"] == "image"


def test_home_page_offers_only_models_that_take_images(client: flask.testing.FlaskClient) -> None:
    page = client.get("/", headers=PAGE).text

    assert 'value="resnet50"' in page
    assert 'value="mood"' not in page and 'value="rent"' not in page


def test_pages_show_a_text_its_labels_and_the_words_that_decided(
    client: flask.testing.FlaskClient, store: Store
) -> None:
    id = client.post("/requestPrediction/mood", json={"text": TEXT}).json["req_id"]
    finish(store, {"labels": [["good", 0.9], ["bad", 0.1]], "words": [["wonderful", 2.0], ["film", -0.5]]})

    shown = client.get(f"/ui/requests/{id}", headers=PAGE).text
    gallery = client.get("/ui/requests", headers=PAGE).text

    assert "A &lt;b&gt;wonderful&lt;/b&gt; film" in shown and "A &lt;b&gt;wonderful" in gallery
    assert "90.0 %" in shown and "90.0 %" in gallery
    assert ">wonderful <" in shown and "+2" in shown and 'class="against">film <' in shown
    assert "/picture" not in gallery
    assert client.get(f"/readPrediction/{id}?top=1").json["preds"]["labels"] == [["good", 0.9]]


def test_pages_show_a_row_and_its_number(client: flask.testing.FlaskClient, store: Store) -> None:
    id = client.post("/requestPrediction/rent", json={"row": {**RENT_ROW, "city": None}}).json["req_id"]
    finish(store, {"value": 650.25})

    shown = client.get(f"/ui/requests/{id}", headers=PAGE).text
    gallery = client.get("/ui/requests", headers=PAGE).text

    assert '<th scope="row">area</th><td>50.0</td>' in shown and '<th scope="row">city</th><td>–</td>' in shown
    assert "650.25" in shown
    assert "area: 50.0 · city: –" in gallery and "650.25" in gallery


def test_input_that_was_deleted_is_not_shown(client: flask.testing.FlaskClient, store: Store) -> None:
    id = client.post("/requestPrediction/mood", json={"text": TEXT}).json["req_id"]
    store.images.delete(store.requests.get(id).image_sha256)

    assert client.get(f"/ui/requests/{id}", headers=PAGE).status_code == 200
    assert "wonderful" not in client.get("/ui/requests", headers=PAGE).text


def test_results_of_a_batch_are_labels_and_numbers(client: flask.testing.FlaskClient, store: Store) -> None:
    rows = batch(client, "rent", "area,city\n1,Bonn\n", "text/csv").json["batch_id"]
    finish(store, {"value": 2.5})
    texts = batch(client, "mood", "text\ngood\n", "text/csv").json["batch_id"]
    finish(store, {"labels": [["good", 0.9], ["bad", 0.1]], "words": []})

    numbers, labels = (client.get(f"/batches/{id}/results.csv").text.splitlines() for id in (rows, texts))

    assert numbers[0].endswith(",value,unknown") and numbers[1].endswith(",2.5,")
    assert ",good,0.9," in labels[1]
    assert client.get(f"/batches/{texts}/contact-sheet.png").status_code == 200
    assert "good" in client.get(f"/ui/batches/{texts}", headers=PAGE).text
