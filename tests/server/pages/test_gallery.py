"""The gallery as HTML: which models it has, its form without scripts, what it and the page of a request show."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import flask.testing
import pytest

from server.app import create_app
from server.settings import ServerSettings
from store.store import Store
from tests.blend import MODEL, claim, finish, image, report

HTML = {"Accept": "text/html"}


@pytest.fixture
def settings(extension_settings: ServerSettings) -> ServerSettings:
    return extension_settings


@pytest.fixture
def client(settings: ServerSettings, store: Store) -> Iterator[flask.testing.FlaskClient]:
    with create_app(settings, store).test_client() as client:
        yield client


def send(client: flask.testing.FlaskClient, path: str = f"/ui/gallery/{MODEL}", **fields: str) -> str:
    """Send the form. :return: the path of the request's page."""
    data = {"image": (io.BytesIO(image("red")), "cat.png"), "style": (io.BytesIO(image("blue")), "s.png"), **fields}
    response = client.post(path, data=data, headers=HTML)
    assert response.status_code == 303, response.text
    location: str = response.headers["Location"]
    return location


def test_the_gallery_has_the_models_that_answer_with_an_image_and_the_home_page_the_others(
    client: flask.testing.FlaskClient,
) -> None:
    gallery, home = (client.get(path, headers=HTML).text for path in ("/ui/gallery", "/"))

    assert f"/ui/gallery?model={MODEL}" in gallery
    assert "efficientnet_lite0" not in gallery
    assert 'value="efficientnet_lite0"' in home
    assert f'value="{MODEL}"' not in home


def test_the_page_says_what_a_model_does_and_where_it_works(client: flask.testing.FlaskClient) -> None:
    blend = client.get(f"/ui/gallery?model={MODEL}", headers=HTML).text
    texture = client.get("/ui/gallery?model=texture", headers=HTML).text

    assert "Mixes an image with another one." in blend and "It does not paint" not in blend
    assert "It does not paint" in texture


def test_the_form_has_each_input_and_parameter_of_the_model(client: flask.testing.FlaskClient) -> None:
    page = client.get(f"/ui/gallery?model={MODEL}", headers=HTML).text

    assert 'name="image"' in page and 'name="style"' in page
    assert '<input type="number" id="param-share" name="share" value="0.5" min="0" max="1" step="any"' in page
    assert 'name="steps" value="1" min="1" max="500" step="1"' in page
    assert "<option selected>png</option>" in page
    for name in ("share", "steps", "format"):
        assert f'aria-describedby="about-{name}"' in page and f'for="param-{name}"' in page


@pytest.mark.parametrize("name", ["efficientnet_lite0", "nothing", "<script>"])
def test_a_model_without_image_answers_has_no_page(client: flask.testing.FlaskClient, name: str) -> None:
    response = client.get("/ui/gallery", query_string={"model": name}, headers=HTML)

    assert response.status_code == 404
    assert "answers with an image" in response.text
    assert "<script>" not in response.text.partition("<main")[2]


def test_without_a_model_the_gallery_says_so(tmp_path: Path, store: Store) -> None:
    client = create_app(ServerSettings(home=tmp_path / "empty", server_threads=4), store).test_client()

    response = client.get("/ui/gallery", headers=HTML)

    assert response.status_code == 200
    assert ('id="make"' in response.text) != ("No model that answers with an image is installed" in response.text)


def test_without_scripts_the_form_leads_to_the_new_image(client: flask.testing.FlaskClient, store: Store) -> None:
    path = send(client, share="0.75", steps="3")
    waiting = client.get(path, headers=HTML).text
    claims = claim(store)
    report(store, claims, 0.25, image("olive", "JPEG"))
    under_way = client.get(path, headers=HTML).text
    finish(store, claims)

    done = client.get(path, headers=HTML).text
    gallery = client.get("/ui/gallery", headers=HTML).text

    id = path.rpartition("/")[2]
    assert (claims[0].params["share"], claims[0].params["steps"]) == (0.75, 3)
    assert "<progress" not in waiting
    assert '<progress max="1" value="0.25"' in under_way and "25.0 % done" in under_way
    assert f"/requests/{id}/preview?number=1" in under_way
    assert f"/requests/{id}/inputs/style?size=160" in done
    assert f'src="/requests/{id}/image"' in done and f'src="/requests/{id}/picture?size=640"' in done
    assert f"/requests/{id}/image?size=160" in gallery and "cat.png" in gallery


def test_a_form_that_cannot_be_used_is_a_page_with_the_reason(client: flask.testing.FlaskClient) -> None:
    data = {"image": (io.BytesIO(image("red")), "cat.png"), "style": (io.BytesIO(b"text"), "s.txt")}

    response = client.post(f"/ui/gallery/{MODEL}", data=data, headers=HTML)

    assert response.status_code == 400
    assert response.content_type.startswith("text/html")
