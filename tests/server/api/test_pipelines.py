"""Pipelines over HTTP and on pages: sending to one, the answer as it grows, events, keys, what is refused."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import flask.testing
import jsonschema
import pytest

from server.app import create_app
from server.settings import ServerSettings
from store.clients.keys import KeyRecord, Scope, hash_key, make_key
from store.store import Store
from tests.pipelines import SPOTS, PipelineBench, pipeline_models, spot


@pytest.fixture(scope="module")
def models(models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("models")
    (folder / "efficientnet_lite0").symlink_to(models_folder / "efficientnet_lite0")
    with pipeline_models(folder):
        yield folder


@pytest.fixture
def settings(tmp_path: Path, models: Path) -> ServerSettings:
    home = tmp_path / "home"
    (home / "pipelines").mkdir(parents=True)
    (home / "pipelines" / "dots.toml").write_text(SPOTS)
    (home / "models").symlink_to(models)
    return ServerSettings(home=home, server_threads=4)


@pytest.fixture
def client(settings: ServerSettings, store: Store) -> Iterator[flask.testing.FlaskClient]:
    with create_app(settings, store).test_client() as client:
        yield client


@pytest.fixture
def bench(store: Store, settings: ServerSettings) -> PipelineBench:
    # All that these tests send is due by then.
    return PipelineBench(store, settings.models, now=datetime.now(UTC) + timedelta(hours=1))


@pytest.fixture
def send(client: flask.testing.FlaskClient, photos: dict[str, bytes]) -> Callable[..., Any]:
    def post(path: str = "/requestPrediction/dots", **headers: str) -> Any:
        image = (io.BytesIO(photos["coffee"]), "coffee.jpg")
        return client.post(path, data={"image": image}, headers=headers)

    return post


def test_an_answer_grows_step_by_step(
    client: flask.testing.FlaskClient, bench: PipelineBench, send: Callable[..., Any]
) -> None:
    sent = send()
    id = sent.json["req_id"]
    first = client.get(f"/readPrediction/{id}").json
    bench.go_on()
    bench.step("spot_finder", {"spots": [spot(), spot(score=0.1)]})
    second = client.get(f"/readPrediction/{id}").json
    bench.step("scissors", {"width": 1}, image=b"\x89PNG")
    bench.step("efficientnet_lite0_embedding", {"dimensions": 3})
    last = client.get(f"/readPrediction/{id}").json

    assert (sent.status_code, sent.json["model"]) == (202, "dots")
    assert first["preds"] is None
    assert first["steps"] == {"find": {"status": "waiting"}, "cut": [], "embed": []}
    assert "no batcher is running" in first["waiting_for"]
    assert second["steps"]["find"]["preds"] == {"spots": [spot(), spot(score=0.1)]}
    assert [one["status"] for one in second["steps"]["cut"]] == ["queued", "queued"]
    assert second["waiting_for"].startswith("Step cut: ")
    assert (last["status"], last["service"], last["preds"]) == ("done", "pipeline", {"done": 4, "skipped": 1})
    listed = {one["req_id"]: one for one in client.get("/requests").json["requests"]}
    assert "steps" not in listed[id]
    assert listed[id]["preds"] == {"done": 4, "skipped": 1}
    cut, embed = last["steps"]["cut"], last["steps"]["embed"]
    assert client.get(cut[0]["files"]["image"]["url"]).data.startswith(b"\x89PNG")
    assert [one["status"] for one in embed] == ["done", "skipped"]
    child = client.get(f"/readPrediction/{embed[0]['req_id']}").json
    assert (child["parent"], child["step"], child["position"]) == (id, "embed", 0)
    schema = client.get("/openapi.json").json
    for shown in (first, second, last, child):
        wanted = {**schema["components"]["schemas"]["Request"], "components": schema["components"]}
        jsonschema.Draft202012Validator(wanted).validate(shown)


def test_the_page_of_a_request_shows_the_answers_of_its_steps(
    client: flask.testing.FlaskClient, bench: PipelineBench, send: Callable[..., Any]
) -> None:
    id = send().json["req_id"]
    bench.go_on()
    bench.step("spot_finder", {"spots": [spot(), spot(score=0.1)]})
    waiting = client.get(f"/ui/requests/{id}").text
    first, second = bench.claim("scissors")
    bench.answer([first], {"width": 1}, image=b"x")
    bench.fail([second])
    bench.go_on()
    bench.step("efficientnet_lite0_embedding", {"dimensions": 3})
    done = client.get(f"/ui/requests/{id}").text
    listed = client.get("/ui/requests").text

    assert f'data-live="/events?ids={id}"' in waiting
    assert f"/requests/{first.id}/files/image" in done
    assert "It is broken." in done
    assert "The answers of the steps are below." in done
    assert "coffee.jpg" in listed
    child = client.get(f"/ui/requests/{first.id}").text
    assert f'<a href="/ui/requests/{id}">Its pipeline</a>' in child


def test_a_batch_of_images_goes_to_a_pipeline(
    client: flask.testing.FlaskClient, bench: PipelineBench, photos: dict[str, bytes]
) -> None:
    images = [(io.BytesIO(photos[name]), f"{name}.jpg") for name in ("coffee", "rocket")]
    batch = client.post("/requestPredictions/dots", data={"image": images}).json
    bench.go_on()

    bench.step("spot_finder", {"spots": []})

    found = client.get(f"/batches/{batch['batch_id']}").json
    assert (found["status"], found["counts"]["done"]) == ("ended", 2)
    lines = client.get(f"/batches/{batch['batch_id']}/results.csv").text.splitlines()
    assert len(lines) == 3


def test_cancelling_and_deleting_over_http(
    client: flask.testing.FlaskClient, bench: PipelineBench, store: Store, send: Callable[..., Any]
) -> None:
    id = send().json["req_id"]
    bench.go_on()

    cancelled = client.delete(f"/requests/{id}").json
    deleted = client.post(f"/requests/{id}/delete").json

    assert (cancelled["status"], cancelled["steps"]["find"]["status"]) == ("cancelled", "cancelled")
    assert deleted["status"] == "deleted"
    assert store.requests.list() == []


def test_a_pipeline_that_cannot_be_used_says_why(
    client: flask.testing.FlaskClient, settings: ServerSettings, send: Callable[..., Any]
) -> None:
    (settings.home / "pipelines" / "broken.toml").write_text("[steps.a]\nmodel = 'efficientnet_lite0'\nx = 1")
    (settings.home / "pipelines" / "absent.toml").write_text("[steps.a]\nmodel = 'resnet50'")

    broken, absent, unknown = (send(f"/requestPrediction/{name}") for name in ("broken", "absent", "nothing"))

    assert (broken.status_code, broken.json["code"]) == (503, "invalid_pipeline")
    assert "Step a: It has the unknown field 'x'" in broken.json["reason"]
    assert absent.status_code in (202, 503)  # tensorflow, if it is there, builds it on first use
    assert (unknown.status_code, unknown.json["code"]) == (404, "unknown_model")
    page = client.get("/ui/pipelines").text
    assert "unknown field" in page
    assert "/ui/pipelines/dots" in page


def test_a_pipeline_has_a_page_with_its_picture_and_a_form(
    client: flask.testing.FlaskClient, photos: dict[str, bytes], store: Store
) -> None:
    page = client.get("/ui/pipelines/dots").text
    sent = client.post("/ui/pipelines/dots", data={"image": (io.BytesIO(photos["coffee"]), "c.jpg")})
    listed = client.get("/pipelines").json["pipelines"]

    assert "<svg" in page and "for each of find.spots" in page
    (request,) = store.requests.list()
    assert sent.headers["Location"] == f"/ui/requests/{request.id}"
    dots = next(one for one in listed if one["name"] == "dots")
    assert dots["inputs"] == {"image": "image"}
    assert [step["name"] for step in dots["steps"]] == ["find", "cut", "embed"]
    assert client.get("/ui/pipelines/nothing").status_code == 404


def test_one_key_does_not_see_the_steps_of_another(
    client: flask.testing.FlaskClient, bench: PipelineBench, store: Store, send: Callable[..., Any]
) -> None:
    headers = []
    for name in ("one", "two"):
        id, key = make_key()
        scopes = frozenset({Scope.SUBMIT, Scope.READ})
        now = datetime.now(UTC)
        store.keys.add(KeyRecord(id=id, name=name, sha256=hash_key(key), scopes=scopes, created_at=now))
        headers.append({"Authorization": f"Bearer {key}"})
    id = send(**headers[0]).json["req_id"]
    bench.go_on()
    child = bench.children(id, "find")[0].id

    own, other = (client.get(f"/readPrediction/{child}", headers=each) for each in headers)

    assert (own.status_code, other.status_code) == (200, 404)
    assert client.get("/requests", headers=headers[1]).json["requests"] == []
