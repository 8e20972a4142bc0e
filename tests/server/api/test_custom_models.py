"""Custom models at the server: installed by a command, found in any spelling, listed, and reported when removed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click
import flask.testing
import pytest

from cli.compile import compile_models
from provider_image.compiler.custom import CHANNELS, PREPROCESSINGS, RETURNED_RANGES, RETURNS, SERVICES
from provider_image.models.artefact import installed_digest
from server.app import create_app
from server.settings import ServerSettings
from store.store import Store
from tests.cli.run_mlg import mlg
from tests.custom_models import classifier, labels_file, save


@pytest.fixture
def settings(tmp_path: Path, custom_models_folder: Path) -> ServerSettings:
    """A home in which the starter and an own model are installed."""
    home = tmp_path / "home"
    shutil.copytree(custom_models_folder, home / "models")
    return ServerSettings(home=home, server_threads=4)


@pytest.fixture
def client(settings: ServerSettings, store: Store) -> flask.testing.FlaskClient:
    return create_app(settings, store).test_client()


def post(client: flask.testing.FlaskClient, model: str, photo: bytes) -> Any:
    return client.post(f"/requestPrediction/{model}", data=photo, content_type="image/jpeg")


def test_a_custom_model_is_installed_by_a_command_and_listed(tmp_path: Path) -> None:
    file = save(classifier("sigmoid", 1), tmp_path / "cats.keras")
    labels = labels_file(tmp_path, "other", "cat")

    done = mlg(
        *("models", "compile", "cats", "--keras", str(file), "--labels", str(labels), "--title", "Cats"), home=tmp_path
    )
    listed = [json.loads(line) for line in mlg("models", "list", "--json", home=tmp_path).stdout.splitlines()]

    assert done.returncode == 0, done.stderr
    assert "cats is installed in" in done.stdout and "cats: reading weights" in done.stderr
    (own,) = (model for model in listed if model["name"] == "cats")
    assert (own["title"], own["source"], own["installed"], own["height"]) == ("Cats", "own", True, 32)
    assert own["install"] == "mlg models compile cats --keras|--onnx FILE --labels FILE, or --huggingface FOLDER"


def test_a_refused_file_is_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "old.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    labels = labels_file(tmp_path, "other", "cat")

    done = mlg(
        *("models", "compile", "cats", "--keras", str(tmp_path / "old.h5"), "--labels", str(labels)), home=tmp_path
    )

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("mlg: old.h5 is a legacy HDF5 file")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["pets", "--keras", "x.keras"], "needs --labels"),
        (["pets", "--onnx", "x.onnx"], "--onnx FILE needs --labels"),
        (["pets", "--onnx", "x.onnx", "--keras", "x.keras", "--labels", "x.txt"], "exclude each other"),
        (["pets", "--keras", "x.keras", "--labels", "x.txt", "--channels", "bgr"], "--channels is for --onnx"),
        (["vgg16", "vgg19", "--labels", "x.txt"], "--labels FILE is for one model"),
        (["vgg16", "--returns", "logits"], "--returns is for"),
        (["pets", "--title", "Pets"], "--title is for"),
        (["vgg16", "--preprocessing", "caffe"], "--preprocessing is for"),
        (["vgg16", "--size", "32x32"], "--size is for"),
        (["pets", "--keras", "x.keras", "--labels", "x.txt", "--weights", "y"], "--weights is for"),
        (["pets", "dogs", "--keras", "x.keras", "--labels", "x.txt"], "one model"),
        (["all", "--keras", "x.keras", "--labels", "x.txt"], "one model"),
        (["pets", "--keras", "x.keras", "--labels", "x.txt", "--size", "32"], "for example 224x224"),
        (["pets", "--keras", "x.keras", "--labels", "x.txt", "--preprocessing", "magic"], "magic"),
        (["net", "--onnx", "x.onnx", "--service", "image_to_image", "--labels", "x.txt"], "labels FILE is for class"),
        (["net", "--huggingface", "x", "--service", "image_to_image"], "huggingface FOLDER is for classifiers"),
        (["net", "--service", "image_to_image"], "service is for custom models"),
    ],
)
def test_conflicting_options_are_reported(tmp_path: Path, arguments: list[str], reason: str) -> None:
    with pytest.raises(click.UsageError, match=reason):
        compile_models.main([*arguments, "--home", str(tmp_path)], standalone_mode=False, obj=None)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("preprocessing", PREPROCESSINGS),
        ("returns", (*RETURNS, *RETURNED_RANGES)),
        ("channels", CHANNELS),
        ("service", SERVICES),
    ],
)
def test_the_command_offers_what_the_builder_accepts(name: str, choices: tuple[str, ...]) -> None:
    (option,) = (option for option in compile_models.params if option.name == name)

    assert isinstance(option.type, click.Choice) and tuple(option.type.choices) == choices


@pytest.mark.parametrize("spelling", ["my_pets", "My-Pets", "MYPETS"])
def test_a_custom_model_is_found_in_any_spelling(
    settings: ServerSettings, client: flask.testing.FlaskClient, photos: dict[str, bytes], spelling: str
) -> None:
    accepted = post(client, spelling, photos["coffee"])

    assert (accepted.status_code, accepted.json["model"]) == (202, "my_pets")
    read = client.get(accepted.json["status_url"]).json
    assert read["status"] == "queued"


def test_custom_models_are_listed_after_the_catalogue(
    settings: ServerSettings, client: flask.testing.FlaskClient
) -> None:
    last = client.get("/models").json["models"][-1]

    assert (last["name"], last["title"], last["installed"], last["source"]) == ("my_pets", "My pets", True, "own")
    assert last["digest"] == installed_digest(settings.models, "my_pets")


def test_an_unknown_model_error_names_the_nearest_custom_one(
    client: flask.testing.FlaskClient, photos: dict[str, bytes]
) -> None:
    refused = post(client, "my_pet", photos["coffee"])

    assert (refused.status_code, refused.json["code"]) == (404, "unknown_model")
    assert "Did you mean my_pets?" in refused.json["reason"]


def test_requests_for_a_removed_model_tell_why_they_wait(
    settings: ServerSettings, client: flask.testing.FlaskClient, photos: dict[str, bytes]
) -> None:
    status_url = post(client, "my_pets", photos["coffee"]).json["status_url"]
    shutil.rmtree(settings.models / "my_pets")

    waiting = client.get(status_url).json
    refused = post(client, "my_pets", photos["coffee"])

    assert "my_pets is not installed any more" in waiting["waiting_for"]
    assert "mlg models compile my_pets --keras|--onnx FILE --labels FILE" in waiting["waiting_for"]
    assert refused.status_code == 404


def test_a_damaged_custom_model_is_refused_and_breaks_nothing_else(
    settings: ServerSettings, client: flask.testing.FlaskClient, photos: dict[str, bytes]
) -> None:
    (settings.models / "my_pets" / "model.json").write_text("{")

    refused = post(client, "my-pets", photos["coffee"])
    others = client.get("/models").json["models"]

    assert (refused.status_code, refused.json["code"]) == (503, "broken_artefact")
    assert post(client, "lite0", photos["coffee"]).status_code == 202
    assert "my_pets" not in {model["name"] for model in others}


def test_requests_are_listed_by_a_custom_model(
    settings: ServerSettings, client: flask.testing.FlaskClient, photos: dict[str, bytes]
) -> None:
    post(client, "lite0", photos["coffee"])
    wanted = post(client, "my_pets", photos["coffee"]).json["req_id"]

    done = mlg("requests", "list", "--model", "My-Pets", "--json", home=settings.home)

    assert [json.loads(line)["req_id"] for line in done.stdout.splitlines()] == [wanted], done.stderr
