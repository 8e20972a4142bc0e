"""The pages that take photos of faces: they ask for consent, or say that faces are off."""

from __future__ import annotations

import dataclasses

import flask.testing
import pytest

from server.app import create_app
from server.settings import ServerSettings
from store.store import Store
from tests.server.pages.test_pages import get_page

PAGES = ("/ui/faces", "/ui/pipelines/faces", "/ui/pipelines/face_search")


@pytest.fixture
def faces_client(settings: ServerSettings, store: Store) -> flask.testing.FlaskClient:
    """The application with faces turned on and kept for two hours."""
    return create_app(dataclasses.replace(settings, faces=True, faces_seconds=7200.0), store).test_client()


@pytest.mark.parametrize("address", PAGES)
def test_a_page_asks_for_consent_and_says_how_long_a_face_is_kept(
    address: str, faces_client: flask.testing.FlaskClient
) -> None:
    page = get_page(faces_client, address)

    assert '<input type="checkbox" id="consent" required>' in page
    assert "deleted after 2 h" in page


@pytest.mark.parametrize("address", PAGES)
def test_a_page_says_that_faces_are_off_and_has_no_form_for_them(
    address: str, client: flask.testing.FlaskClient
) -> None:
    page = get_page(client, address)

    assert "MLG_FACES=on" in page
    assert 'type="file"' not in page


def test_the_page_says_that_it_compares_pictures_without_a_model_that_knows_people(
    faces_client: flask.testing.FlaskClient,
) -> None:
    assert "no model that knows people" in get_page(faces_client, "/ui/faces")


def test_only_the_pages_of_faces_offer_them(
    client: flask.testing.FlaskClient, faces_client: flask.testing.FlaskClient
) -> None:
    assert "face" not in get_page(client, "/").lower()
    home = get_page(faces_client, "/")
    assert "/ui/faces" in home and "face_detector" not in home and 'value="faces"' not in home
