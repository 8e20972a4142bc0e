"""`mlg models compile` as a user runs it: sources of weights, progress, and error messages."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from provider_image.models.artefact import read_artefact
from provider_image.models.catalogue import CATALOGUE
from tests.cli.run_mlg import mlg
from tests.seeded_weights import seeded_network, write_weights

ROW = CATALOGUE["mobilenet_v2"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with seeded weights of a small model, under the file name that Keras uses."""
    folder = tmp_path_factory.mktemp("weights")
    write_weights(seeded_network(ROW), folder / ROW.weights.file)
    return folder


def test_efficientnet_lite0_needs_no_weights(tmp_path: Path) -> None:
    done = mlg("models", "compile", "EfficientNet-Lite0", home=tmp_path)

    assert done.returncode == 0, done.stderr
    artefact = read_artefact(tmp_path / "models" / "efficientnet_lite0")
    assert f"digest {artefact.digest[:12]}, 18.7 MB as f32; 9.4 MB as f16" in done.stdout


def test_a_keras_model_is_installed_from_a_folder_with_progress(tmp_path: Path, weights: Path) -> None:
    by_option = mlg("models", "compile", "MobileNetV2", "--weights", str(weights), home=tmp_path / "one")
    by_variable = mlg(
        "models", "compile", "MobileNetV2", "--out", str(tmp_path / "out"), home=tmp_path, MLG_WEIGHTS_DIR=str(weights)
    )

    assert (by_option.returncode, by_variable.returncode) == (0, 0), by_option.stderr + by_variable.stderr
    one = read_artefact(tmp_path / "one" / "models" / "mobilenet_v2")
    other = read_artefact(tmp_path / "out" / "mobilenet_v2")
    assert (one.digest, one.files["model.bin"]) == (other.digest, other.files["model.bin"])
    assert one.weights_sha256 == hashlib.sha256((weights / ROW.weights.file).read_bytes()).hexdigest()
    steps = ("looking for weights", "reading weights", "converting", "comparing", "storing")
    assert [step for line in by_option.stderr.splitlines() for step in steps if step in line] == list(steps)
    assert "not the file that Keras publishes" in by_option.stderr
    assert re.search(r"mobilenet_v2 .* f32, own", mlg("models", home=tmp_path / "one").stdout)
    assert not (tmp_path / "models").exists()


def test_an_embedding_is_built_from_the_installed_model_or_after_it(tmp_path: Path, weights: Path) -> None:
    both = mlg("models", "compile", "MobileNetV2_embedding", "--weights", str(weights), home=tmp_path)
    models = tmp_path / "models"
    digest = read_artefact(models / f"{ROW.name}_embedding").digest
    shutil.rmtree(models / f"{ROW.name}_embedding")

    alone = mlg("models", "compile", f"{ROW.name}_embedding", home=tmp_path, MLG_WEIGHTS_DIR="/nowhere")

    assert (both.returncode, alone.returncode) == (0, 0), both.stderr + alone.stderr
    assert [line.split()[0] for line in both.stdout.splitlines()] == [ROW.name, f"{ROW.name}_embedding"]
    assert "reading weights" in both.stderr and "cutting" in both.stderr
    assert "reading weights" not in alone.stderr and "a vector of 1280 values" in alone.stdout
    assert read_artefact(models / f"{ROW.name}_embedding").digest == digest
    lines = mlg("models", home=tmp_path).stdout.splitlines()
    (number,) = (number for number, line in enumerate(lines) if line.startswith(ROW.name))
    assert re.match(rf"  _embedding .* yes +{digest[:12]} .* f32, own", lines[number + 1])


def test_other_models_are_installed_after_one_that_fails(tmp_path: Path, weights: Path) -> None:
    done = mlg("models", "compile", "vgg16", "lite0", "--weights", str(weights), home=tmp_path)

    assert done.returncode == 1
    assert "mlg: vgg16: " in done.stderr and "Put vgg16_weights_tf_dim_ordering_tf_kernels.h5" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("mlg: 1 of 2 models were not installed")
    assert "efficientnet_lite0 is installed" in done.stdout


def test_missing_tensorflow_is_one_error_line(tmp_path: Path, weights: Path) -> None:
    (tmp_path / "tensorflow.py").write_text("raise ImportError('No module named tensorflow')")

    done = mlg("models", "compile", "all", "--weights", str(weights), home=tmp_path, PYTHONPATH=str(tmp_path))

    assert done.returncode == 1
    assert 'pip install "mlg[compile]"' in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["densenet12"], 1, "densenet121"),
        (["vgg16", "vgg19", "--weights", "{weights}"], 2, "for several give a folder"),
        (["vgg16_embedding", "--weights", "/nowhere"], 1, "There is no weights file /nowhere"),
        (["efficientnetv2_b0", "--weights", "{weights}"], 1, "does not contain the weights of EfficientNetV2B0"),
        (["vgg16", "--f16-within", "2"], 2, "--f16-within"),
        ([], 2, "MODEL|all"),
    ],
)
def test_mistakes_are_one_error_line(
    tmp_path: Path, weights: Path, arguments: list[str], status: int, words: str
) -> None:
    file = str(weights / ROW.weights.file)

    done = mlg("models", "compile", *(each.replace("{weights}", file) for each in arguments), home=tmp_path)

    assert (done.returncode, words in done.stderr.splitlines()[-1]) == (status, True), done.stderr
    assert "Traceback" not in done.stderr


def test_weights_are_stored_as_f16_within_the_given_tolerance(tmp_path: Path, weights: Path) -> None:
    done = mlg("models", "compile", ROW.name, "--weights", str(weights), "--f16-within", "1", home=tmp_path)

    facts = json.loads((tmp_path / "models" / ROW.name / "model.json").read_text())
    assert facts["precision"] == "f16" and " as f16; " in done.stdout
