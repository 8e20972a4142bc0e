"""Embeddings over HTTP: vectors beside the labels of the same image, their files, pages and errors."""

from __future__ import annotations

import io
import shutil
import struct
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import flask.testing
import pytest

from provider_image.models.artefact import find_artefact
from server.settings import ServerSettings
from store.clients.keys import KeyRecord, Scope, hash_key, make_key
from store.files import NewFile
from store.store import Store

MODEL = "efficientnet_lite0"
EMBEDDING = "efficientnet_lite0_embedding"
VECTOR = struct.pack("<1280f", 0.6, -0.8, *[0.0] * 1278)


@pytest.fixture
def settings(tmp_path: Path, embedding_models_folder: Path) -> ServerSettings:
    home = tmp_path / "home"
    home.mkdir()
    (home / "models").symlink_to(embedding_models_folder)
    return ServerSettings(home=home, server_threads=4)


@pytest.fixture
def embed(store: Store, settings: ServerSettings) -> Callable[[], None]:
    """Answer everything that waits for a vector, as a batcher would."""

    def answer_all() -> None:
        from store.requests import Answer

        now = datetime.now(UTC)
        claims = store.requests.claim(
            models=[EMBEDDING], limit=100, now=now, lease_ends_at=now + timedelta(seconds=30), oldest_before=None
        )
        files = {"vector": NewFile(data=VECTOR, media_type="application/octet-stream")}
        answers = [
            Answer(
                claim=claim,
                output={"dimensions": 1280},
                files=files,
                digest=find_artefact(settings.models, EMBEDDING).digest,
                chunk_id="c1",
                provider="local",
                seconds=0.01,
            )
            for claim in claims
        ]
        assert store.requests.finish(answers, now=now) == len(claims)

    return answer_all


def post(client: flask.testing.FlaskClient, model: str, photo: bytes, **headers: str) -> tuple[str, bool]:
    data = {"image": (io.BytesIO(photo), "cat.jpg")}
    response = client.post(f"/requestPrediction/{model}", data=data, headers=headers)
    assert response.status_code == 202, response.text
    return response.json["req_id"], response.json["cached"]


def test_vector_is_kept_beside_the_labels_of_the_same_image_and_is_computed_once(
    client: flask.testing.FlaskClient,
    settings: ServerSettings,
    answer: Callable[..., list[str]],
    embed: Callable[[], None],
    photos: dict[str, bytes],
) -> None:
    labelled, _ = post(client, MODEL, photos["chelsea"])
    answer()
    answered = client.get(f"/readPrediction/{labelled}").json
    embedded, is_cached = post(client, EMBEDDING, photos["chelsea"])
    embed()

    again, is_cached_again = post(client, "Lite0-Embedding", photos["chelsea"])

    assert (is_cached, is_cached_again) == (False, True)
    assert client.get(f"/readPrediction/{labelled}").json["preds"] == answered["preds"]
    for id in (embedded, again):
        found = client.get(f"/readPrediction/{id}").json
        assert (found["service"], found["preds"]) == ("embedding", {"dimensions": 1280})
        url = f"/requests/{id}/files/vector"
        assert found["files"] == {"vector": {"url": url, "media_type": "application/octet-stream", "bytes": 5120}}
        response = client.get(url)
        assert (response.status_code, response.mimetype, response.data) == (200, "application/octet-stream", VECTOR)
    # The image is stored once for both models, and the vector once for both requests.
    assert len([path for path in settings.images.rglob("*") if path.is_file()]) == 2


def test_page_of_a_request_shows_the_first_values_and_a_link_to_the_vector(
    client: flask.testing.FlaskClient, embed: Callable[[], None], photos: dict[str, bytes]
) -> None:
    id, _ = post(client, EMBEDDING, photos["coffee"])
    waiting = client.get(f"/ui/requests/{id}", headers={"Accept": "text/html"}).text
    embed()

    page = client.get(f"/ui/requests/{id}", headers={"Accept": "text/html"}).text
    listed = client.get("/ui/requests", headers={"Accept": "text/html"}).text

    assert "0.6000, -0.8000, 0.0000" in page and "0.6000" not in waiting
    assert "&#34;dimensions&#34;: 1280" in page and f'href="/requests/{id}/files/vector" download' in page
    assert f'<optgroup label="Embeddings">\n<option>{EMBEDDING}</option>\n</optgroup>' in listed
    assert "vgg16_embedding" not in listed and "<option>vgg16</option>" in listed


def test_vector_of_another_key_is_not_found(
    client: flask.testing.FlaskClient, store: Store, embed: Callable[[], None], photos: dict[str, bytes]
) -> None:
    secrets = {}
    for name in ("alice", "bob"):
        id, secret = make_key()
        secrets[name] = {"Authorization": f"Bearer {secret}"}
        scopes = frozenset({Scope.SUBMIT, Scope.READ})
        record = KeyRecord(id=id, name=name, sha256=hash_key(secret), scopes=scopes, created_at=datetime.now(UTC))
        store.keys.add(record)
    id, _ = post(client, EMBEDDING, photos["rocket"], **secrets["alice"])
    embed()

    mine, theirs = (client.get(f"/requests/{id}/files/vector", headers=secrets[name]) for name in ("alice", "bob"))
    _, is_cached = post(client, EMBEDDING, photos["rocket"], **secrets["bob"])

    assert (mine.status_code, theirs.status_code, is_cached) == (200, 404, False)


def test_models_say_which_vector_they_return(client: flask.testing.FlaskClient) -> None:
    models = {model["name"]: model for model in client.get("/models").json["models"]}

    facts = ("service", "base", "dimensions", "installed")
    assert [models[EMBEDDING][fact] for fact in facts] == ["embedding", MODEL, 1280, True]
    assert [models[MODEL][fact] for fact in facts] == ["classification", None, None, True]
    assert [models["vgg16_embedding"][fact] for fact in facts] == ["embedding", "vgg16", 4096, False]


@pytest.mark.parametrize("model", ["resnet50_embedding", "my_pets_embedding"])
def test_embedding_that_is_not_installed_names_the_command(
    client: flask.testing.FlaskClient,
    settings: ServerSettings,
    embedding_models_folder: Path,
    photos: dict[str, bytes],
    model: str,
) -> None:
    settings.models.unlink()
    folder = shutil.copytree(embedding_models_folder / MODEL, settings.models / "my_pets")
    (folder / "model.json").write_text((folder / "model.json").read_text().replace(f'"{MODEL}"', '"my_pets"', 1))

    response = client.post(f"/requestPrediction/{model}", data={"image": (io.BytesIO(photos["rocket"]), "a.jpg")})

    assert (response.status_code, response.json["code"]) == (503, "not_installed")
    assert f"mlg models compile {model}" in response.json["reason"]
    assert "--keras" not in response.json["reason"]


def test_top_is_refused_for_a_vector(client: flask.testing.FlaskClient, photos: dict[str, bytes]) -> None:
    response = client.post(
        f"/requestPrediction/{EMBEDDING}?top=3", data={"image": (io.BytesIO(photos["rocket"]), "a.jpg")}
    )

    assert (response.status_code, response.json["code"]) == (400, "invalid_params")
