"""Two services and a backend of another package through the whole system: HTTP, store, batcher, worker, HTTP."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlg_client import Client, Refused
from tests.extensions import COLUMNS, FOLDER, ROWS, install_extension_models
from tests.linear_models import install_linear_models
from tests.system import ROOT, System
from tests.timing import DEADLINE_SECONDS


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    home = tmp_path_factory.mktemp("system") / "home"
    install_linear_models(install_extension_models(home / "models"))
    system = System(home, PYTHONPATH=str(FOLDER), MLG_SHRINK="on")
    yield system
    system.stop()


@pytest.fixture
def client(system: System) -> Iterator[Client]:
    with Client(system.base) as client:
        yield client


def pixels(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_an_image_comes_back_with_as_many_colours_as_the_parameter_says(
    system: System, client: Client, photos: dict[str, bytes]
) -> None:
    two, five = (client.submit(photos["coffee"], "sepia", params={"levels": levels}) for levels in (2, 5))

    answers = [client.wait(request, 60) for request in (two, five)]
    posters = [pixels(client.file(answer, "poster.png")) for answer in answers]
    again = client.submit(photos["coffee"], "sepia", params={"levels": 5})

    assert [answer.preds["levels"] for answer in answers] == [2, 5]
    assert [answer.files for answer in answers] == [{"poster.png": "image/png"}] * 2
    assert [poster.shape for poster in posters] == [(64, 96, 3)] * 2
    assert set(np.unique(posters[0])) <= {0, 255}
    assert set(np.unique(posters[1])) <= {0, 64, 128, 191, 255}
    assert again.is_cached
    assert client.file(again, "poster.png") == client.file(five, "poster.png")


def test_the_files_of_an_answer_are_written_by_a_command(
    system: System, client: Client, photos: dict[str, bytes], tmp_path: Path
) -> None:
    answer = client.wait(client.submit(photos["rocket"], "sepia"), 60)

    command = [sys.executable, "-m", "mlg", "requests", "show", answer.id, "--home", str(system.home)]
    subprocess.run([*command, "--files", str(tmp_path / "answer")], cwd=ROOT, check=True, capture_output=True)

    assert (tmp_path / "answer" / "poster.png").read_bytes() == client.file(answer, "poster.png")


@pytest.mark.parametrize("species", ROWS)
def test_a_row_goes_in_and_the_right_species_comes_out(client: Client, species: str) -> None:
    row = dict(zip(COLUMNS, ROWS[species], strict=True))

    answer = client.wait(client.submit({"row": row}, "iris_means"), 60)

    assert answer.preds["species"] == species
    assert answer.preds["probability"] > 0.5
    assert answer.files == {}


def test_a_row_goes_in_and_a_number_comes_out(client: Client) -> None:
    fits, does_not_fit = (
        client.submit({"row": {"area": area, "city": "Köln"}}, "rent") for area in (None, "very large")
    )

    assert client.wait(fits, 60).preds == {"value": 550.0}
    failed = client.wait(does_not_fit, 60)
    assert (failed.status, failed.code) == ("failed", "not_a_row")
    assert failed.reason == "The column 'area' takes a number or null, not 'very large'."


def test_a_text_goes_in_and_labels_with_words_come_out(client: Client) -> None:
    answer = client.wait(client.submit({"text": b"Not good, but wonderful"}, "mood"), 60)

    assert answer.best is not None and answer.best[0] == "good"
    assert [word for word, _ in answer.preds["words"]] == ["wonderful", "not good", "good"]


def test_an_optional_input_reaches_the_service_and_comes_back(client: Client) -> None:
    row = dict(zip(COLUMNS, ROWS["setosa"], strict=True))

    answer = client.wait(client.submit({"row": row, "note": "from the garden, \u00fcber".encode()}, "iris_means"), 60)

    assert client.file(answer, "note.txt").decode() == "from the garden, \u00fcber"


def test_what_a_provider_must_not_return_fails_its_item_only(client: Client) -> None:
    rows = [dict(zip(COLUMNS, values, strict=True)) for values in ROWS.values()]

    # The service returns the note as text/plain, which the batcher checks.
    bad, *good = (
        client.submit({"row": row, "note": b"\xff\xfe" if number == 0 else b"fine"}, "iris_means")
        for number, row in enumerate(rows)
    )

    assert {client.wait(request, 60).status for request in good} == {"done"}
    assert client.wait(bad, 120).reason == "The file note.txt is not text/plain."


def test_values_that_are_no_measures_fail_with_the_reason_of_the_service(client: Client) -> None:
    row = dict(zip(COLUMNS, (1.0, "wide", None, True), strict=True))

    answer = client.wait(client.submit({"row": row}, "iris_means"), 60)

    assert (answer.status, answer.code, answer.reason) == ("failed", "not_a_row", "The measures must be numbers.")


def test_an_unknown_parameter_is_refused(client: Client, photos: dict[str, bytes]) -> None:
    with pytest.raises(Refused, match="levels takes a whole number from 2 to 32"):
        client.submit(photos["coffee"], "sepia", params={"levels": 1})


def test_a_check_of_the_model_passes(system: System) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "provider_image", "check", "iris_means", "--models", str(system.home / "models")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(FOLDER)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 rows give the recorded results" in done.stdout
