"""Answers of a model with a threshold: labels as before, and whether the first is sure enough."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import flask.testing
import pytest

from provider_image.compiler.installing import begin_artefact, build_folder, install
from provider_image.errors import BrokenArtefact
from provider_image.models.artefact import Artefact, read_artefact
from provider_image.models.catalogue import ModelFacts
from server.serializers import Thresholds, parse_read_params, serialize_request
from server.settings import ServerSettings
from server.thumbnails import Thumbnails
from store.requests import Answer
from store.store import Store

OUTPUT = [["cat", "cat", 0.62], ["dog", "dog", 0.38]]


def install_pets(models: Path, unknown_below: float) -> Artefact:
    """Install a classifier of two that nothing runs."""
    row = ModelFacts(name="pets", title="Pets", preprocessing="none", source="own")
    with build_folder(models, row.name) as folder:
        (folder / "model.bin").write_bytes(b"weights")
        draft = begin_artefact(
            row,
            labels=(("cat", "cat"), ("dog", "dog")),
            weights_sha256=hashlib.sha256(b"weights").hexdigest(),
            recipe="none",
            reference="none",
            unknown_below=unknown_below,
        )
        return install(draft, folder, models, ["model.bin"])


@pytest.fixture
def settings(tmp_path: Path) -> ServerSettings:
    """A home without the starter model."""
    (tmp_path / "home").mkdir()
    return ServerSettings(home=tmp_path / "home", server_threads=4)


@pytest.fixture
def ask(client: flask.testing.FlaskClient, store: Store, photos: dict[str, bytes]) -> Callable[[Artefact], Any]:
    """Send a photo, answer it as the artefact would, and return the request's JSON."""

    def send(artefact: Artefact) -> Any:
        accepted = client.post("/requestPrediction/pets", data=photos["coffee"], content_type="image/jpeg").json
        now = datetime.now(UTC)
        (claim,) = store.requests.claim(
            models=["pets"], limit=1, now=now, lease_ends_at=now + timedelta(seconds=30), oldest_before=None
        )
        answer = Answer(
            claim=claim, output=OUTPUT, digest=artefact.digest, chunk_id="c1", provider="local", seconds=0.01
        )
        store.requests.finish([answer], now=now)
        return client.get(f"/readPrediction/{accepted['req_id']}").json

    return send


def test_lists_and_files_of_a_batch_say_unknown(
    ask: Callable[[Artefact], Any],
    client: flask.testing.FlaskClient,
    settings: ServerSettings,
    photos: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    artefact = install_pets(settings.models, 0.63)
    ask(artefact)  # which also answers for the same photo in the batch
    form = {"image": (io.BytesIO(photos["coffee"]), "coffee.jpg")}
    batch = client.post("/requestPredictions/pets", data=form).json
    cells: list[Any] = []
    monkeypatch.setattr(Thumbnails, "sheet", lambda self, found, *, client: cells.extend(found) or b"sheet")

    (row,) = csv.DictReader(io.StringIO(client.get(f"/batches/{batch['batch_id']}/results.csv").text))
    client.get(f"/batches/{batch['batch_id']}/contact-sheet.png")
    pages = [client.get(path).text for path in ("/ui/requests", f"/ui/batches/{batch['batch_id']}")]

    assert (row["label"], row["probability"], row["unknown"]) == ("cat", "0.62", "True")
    assert cells[0][1][0] == "unknown"
    assert all('class="best">unknown' in page for page in pages)
    install_pets(settings.models, 0.5)  # whose answers those are not
    assert "unknown" not in client.get("/ui/requests").text


@pytest.mark.parametrize(("threshold", "is_unknown"), [(0.63, True), (0.62, False), (0.1, False)])
def test_an_answer_below_the_threshold_is_unknown(
    ask: Callable[[Artefact], Any],
    client: flask.testing.FlaskClient,
    settings: ServerSettings,
    threshold: float,
    is_unknown: bool,
) -> None:
    shown = ask(install_pets(settings.models, threshold))

    page = client.get(f"/ui/requests/{shown['req_id']}").text

    assert (shown["unknown"], shown["unknown_below"]) == (is_unknown, threshold)
    assert shown["preds"] == OUTPUT
    assert ("not sure enough" in page) is is_unknown


def test_a_model_without_a_threshold_says_nothing_of_it(
    ask: Callable[[Artefact], Any], settings: ServerSettings
) -> None:
    shown = ask(install_pets(settings.models, 0.0))

    assert shown["preds"] == OUTPUT
    assert not {"unknown", "unknown_below"} & shown.keys()


def test_answers_of_a_model_that_was_replaced_are_not_measured_by_the_new_threshold(
    ask: Callable[[Artefact], Any], client: flask.testing.FlaskClient, settings: ServerSettings, store: Store
) -> None:
    shown = ask(install_pets(settings.models, 0.7))
    request = store.requests.get(shown["req_id"])
    params = parse_read_params(request.service, {})

    before = serialize_request(request, params, None, thresholds=Thresholds(settings.models))
    install_pets(settings.models, 0.5)
    after = serialize_request(request, params, None, thresholds=Thresholds(settings.models))

    assert before["unknown"] is True
    assert "unknown" not in after


def test_a_model_is_looked_up_once_for_a_list(
    ask: Callable[[Artefact], Any], settings: ServerSettings, store: Store
) -> None:
    artefact = install_pets(settings.models, 0.7)
    request = store.requests.get(ask(artefact)["req_id"])
    of_the_list = Thresholds(settings.models)

    first = of_the_list.find(request)
    (artefact.folder / "model.json").unlink()

    assert (first, of_the_list.find(request), Thresholds(settings.models).find(request)) == (0.7, 0.7, 0.0)


@pytest.mark.parametrize("threshold", ["1", "-0.1", '"high"', "1e999"])
def test_a_threshold_that_is_no_probability_is_refused(settings: ServerSettings, threshold: str) -> None:
    artefact = install_pets(settings.models, 0.25)
    document = artefact.folder / "model.json"
    document.write_text(document.read_text().replace('"unknown_below": 0.25', f'"unknown_below": {threshold}'))

    with pytest.raises(BrokenArtefact, match="damaged"):
        read_artefact(artefact.folder)
