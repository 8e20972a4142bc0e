"""The contract of backends, tested with every registered one and with one that exists only for tests.

A backend needs a row in ARTEFACTS; then it is tested without a change here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from provider_image.backends import REGISTRY, Device, load_net
from provider_image.compiler import ensure_installed
from provider_image.errors import BrokenArtefact, ConfigError, InferenceFailed
from provider_image.models.artefact import compute_digest, find_artefact, read_artefact
from tests.extensions import install_extension_models
from tests.linear_models import install_linear_models
from tests.onnx_models import install_unusual
from tests.style_models import install_quick_texture

#: Backend -> (model, shape of its input, type of its input).
ARTEFACTS: dict[str, tuple[str, tuple[int, ...], type[np.generic]]] = {
    "onnxruntime": ("unusual", (32, 32, 3), np.uint8),
    "openvino": ("efficientnet_lite0", (224, 224, 3), np.uint8),
    "opencv": ("quality", (48, 64, 3), np.uint8),
    "linear": ("iris_table", (4,), np.float64),
    "affine": ("iris_means", (4,), np.float32),
    "style": ("texture", (2, 32, 32, 3), np.uint8),
}
#: Two machines may differ by this much, and a batch from its items.
TOLERANCE = 1e-4


@pytest.fixture(scope="module", autouse=True)
def registered(registered_extensions: Path) -> None:
    """The backend of the tests, beside those of the project."""


@pytest.fixture(scope="module")
def models(models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = install_linear_models(install_extension_models(tmp_path_factory.mktemp("models")))
    (folder / "efficientnet_lite0").symlink_to(models_folder / "efficientnet_lite0")
    install_unusual(folder)
    ensure_installed(folder, "quality")
    install_quick_texture(folder)
    return folder


@pytest.fixture(params=sorted(ARTEFACTS))
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def folder(backend: str, models: Path, tmp_path: Path) -> Path:
    """An artefact that the test may damage."""
    model, _, _ = ARTEFACTS[backend]
    return shutil.copytree(models / model, tmp_path / model)


@pytest.fixture
def arrays(backend: str) -> list[np.ndarray]:
    _, shape, kind = ARTEFACTS[backend]
    random = np.random.default_rng(1)
    return [random.integers(0, 9, shape).astype(kind) for _ in range(5)]


def test_every_backend_is_tested() -> None:
    assert set(REGISTRY) == set(ARTEFACTS)


def test_net_answers_a_batch_as_it_answers_each_item(folder: Path, arrays: list[np.ndarray]) -> None:
    net = load_net(read_artefact(folder), Device(threads=1))
    batch = arrays[: net.batch_items]

    outputs = net.infer(batch)

    assert len(outputs) == len(batch)
    for array, output in zip(batch, outputs, strict=True):
        np.testing.assert_allclose(net.infer([array])[0], output, atol=TOLERANCE)


def test_net_belongs_to_its_artefact_and_states_the_size_of_its_batches(folder: Path) -> None:
    artefact = read_artefact(folder)

    net = load_net(artefact, Device(threads=1))

    assert net.artefact is artefact
    assert net.batch_items >= 1


def test_output_is_a_copy(folder: Path, arrays: list[np.ndarray]) -> None:
    net = load_net(read_artefact(folder), Device(threads=1))
    first = net.infer(arrays[:1])[0]
    kept = first.copy()

    net.infer(arrays[1:2])

    assert np.array_equal(first, kept, equal_nan=True)


def test_threads_get_their_own_answers(folder: Path, arrays: list[np.ndarray]) -> None:
    net = load_net(read_artefact(folder), Device(threads=3))
    expected = [net.infer([array])[0] for array in arrays]

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda array: net.infer([array])[0], arrays * 4))

    for output, right in zip(found, expected * 4, strict=True):
        np.testing.assert_allclose(output, right, atol=TOLERANCE)


def test_array_of_another_shape_fails(backend: str, folder: Path) -> None:
    net = load_net(read_artefact(folder), Device(threads=1))

    with pytest.raises(InferenceFailed, match=net.artefact.name):
        net.infer([np.zeros((7, 5), ARTEFACTS[backend][2])])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
    ],
    ids=["missing", "empty", "zeros"],
)
def test_changed_file_is_a_broken_artefact(folder: Path, damage: Callable[[Path], object]) -> None:
    artefact = read_artefact(folder)
    for file in artefact.files:
        copy = shutil.copytree(folder, folder.with_name(f"damaged {file}"))
        damage(copy / file)

        with pytest.raises(BrokenArtefact):
            load_net(read_artefact(copy), Device(threads=1))


def test_file_that_was_never_valid_is_a_broken_artefact(folder: Path) -> None:
    facts = json.loads((folder / "model.json").read_text())
    for file in facts["files"]:
        content = b"not what this backend can load"
        (folder / file).write_bytes(content)
        facts["files"][file] = [len(content), hashlib.sha256(content).hexdigest()]
    (folder / "model.json").write_text(json.dumps(facts))
    facts["digest"] = compute_digest(read_artefact(folder))
    (folder / "model.json").write_text(json.dumps(facts))

    with pytest.raises(BrokenArtefact, match="cannot"):
        load_net(read_artefact(folder), Device(threads=1))


@pytest.mark.parametrize("device", [Device(name="abacus"), Device(precision="f8")], ids=["device", "precision"])
def test_unknown_device_or_precision_is_refused(folder: Path, device: Device) -> None:
    with pytest.raises(ConfigError, match=r"abacus|f8"):
        load_net(read_artefact(folder), device)


def test_backend_that_is_not_installed_is_named(folder: Path) -> None:
    facts = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(facts | {"backend": "quantum"}))

    with pytest.raises(BrokenArtefact, match=r"'quantum', which is not installed.*openvino"):
        load_net(find_artefact(folder.parent, folder.name), Device())
