"""The files of the backend `linear`, which may come from strangers."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from provider_image.backends import Device
from provider_image.backends.linear import WEIGHTS_FILE, load_net
from provider_image.errors import BrokenArtefact
from provider_image.models.artefact import Artefact, compute_digest, read_artefact
from tests.linear_models import install_linear_models


@pytest.fixture(scope="module")
def rent(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return read_artefact(install_linear_models(tmp_path_factory.mktemp("models")) / "rent")


def with_weights(artefact: Artefact, folder: Path, data: bytes) -> Artefact:
    """Copy an artefact with other weights, of which its digest is right."""
    shutil.copytree(artefact.folder, folder)
    (folder / WEIGHTS_FILE).write_bytes(data)
    changed = replace(
        artefact,
        folder=folder,
        files={**artefact.files, WEIGHTS_FILE: (len(data), hashlib.sha256(data).hexdigest())},
    )
    return replace(changed, digest=compute_digest(changed))


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(48)


def test_weights_are_those_of_the_file(rent: Artefact, tmp_path: Path) -> None:
    weights = np.arange(6.0).reshape(6, 1)

    net = load_net(with_weights(rent, tmp_path / "rent", npy(weights)), Device(threads=1))

    assert net.weights.tolist() == weights.tolist()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04 no zip",
        npy(np.zeros((6, 2))),
        npy(np.zeros(6)),
        npy(np.zeros((6, 1), np.float32)),
        npy(np.zeros((6, 1)))[:-1],
        npy(np.zeros((6, 1))) + b"x",
        npy(np.full((6, 1), np.nan)),
        npy(np.array([[{}]] * 6)),
        header("(" * 500),
        header("{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999999999, 9), }"),
    ],
    ids=[
        *("empty", "zip", "more-outputs", "a-list", "f32", "cut", "longer", "nan", "pickle"),
        *("deep-header", "huge-shape"),
    ],
)
def test_weights_that_do_not_fit_are_refused(rent: Artefact, tmp_path: Path, data: bytes) -> None:
    with pytest.raises(BrokenArtefact, match="cannot be"):
        load_net(with_weights(rent, tmp_path / "rent", data), Device(threads=1))


@pytest.mark.parametrize(
    ("service", "command"),
    [
        ("table", "mlg train rent CSV --target COLUMN"),
        ("text", "mlg train rent CSV --text COLUMN --target COLUMN"),
        ("classification", "mlg train rent FOLDER"),
    ],
)
def test_a_trained_model_is_trained_again(rent: Artefact, service: str, command: str) -> None:
    trained = replace(rent, service=service)

    assert trained.install_command == command
    assert "mlg models compile rent" in replace(trained, provenance=None).install_command


def test_texts_of_a_model_have_no_control_characters(rent: Artefact, tmp_path: Path) -> None:
    folder = shutil.copytree(rent.folder, tmp_path / "rent")
    facts = json.loads((folder / "model.json").read_text())
    for changes in ({"columns": ["area", "\x1b]0;city"]}, {"provenance": {**facts["provenance"], "method": "\x1b[2J"}}):
        (folder / "model.json").write_text(json.dumps({**facts, **changes}))

        with pytest.raises(BrokenArtefact, match="control characters"):
            read_artefact(folder)
