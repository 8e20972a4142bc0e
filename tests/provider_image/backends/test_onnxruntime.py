"""The ONNX Runtime backend: batches, and devices. All but the card itself is tested on the processor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from provider_image.backends import Device, load_net
from provider_image.backends.onnxruntime import check_device
from provider_image.chunk import ChunkItem, write_chunk
from provider_image.compiler.custom import CustomModel
from provider_image.compiler.onnx_models import builder
from provider_image.errors import ConfigError
from provider_image.models.artefact import Artefact, find_artefact
from provider_image.runtime import NetCache, run_chunk
from tests.onnx_models import PETS, SIDE, network, write

CARD = "cuda:0"
#: No machine has so many.
ABSENT = "cuda:99"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`open`, a classifier that takes any number of images, and `fixed`, one that takes a single one."""
    folder = tmp_path_factory.mktemp("models")
    labels = folder.parent / "pets.txt"
    labels.write_text("\n".join(PETS))
    shape = onnx.numpy_helper.from_array(np.array([1, 3]), "one_by_three")
    one = [onnx.helper.make_node("Constant", [], ["one_by_three"], value=shape)]
    one.append(onnx.helper.make_node("Reshape", ["logits", "one_by_three"], ["end"]))
    for name, file in {"open": network(), "fixed": network(batch=1, before_end=one)}.items():
        saved = write(file, folder.parent / f"{name}.onnx")
        custom = CustomModel(
            name=name, kind="onnx", file=saved, labels=labels, preprocessing="torch", backend="onnxruntime"
        )
        builder.build(folder, custom)
    return folder


@pytest.fixture
def arrays() -> list[np.ndarray[Any, Any]]:
    random = np.random.default_rng(1)
    return [random.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8) for _ in range(7)]


@pytest.fixture
def artefact(models: Path) -> Artefact:
    return find_artefact(models, "open")


def test_model_that_is_asked_for_onnxruntime_is_installed_for_it(artefact: Artefact) -> None:
    assert artefact.backend == "onnxruntime"


def test_batch_has_the_answers_of_its_items(artefact: Artefact, arrays: list[np.ndarray[Any, Any]]) -> None:
    one, four = (load_net(artefact, Device(threads=1, batch_items=size)) for size in (1, 4))

    assert (one.batch_items, four.batch_items) == (1, 4)
    np.testing.assert_allclose(np.stack(four.infer(arrays)), np.stack(one.infer(arrays)), atol=1e-6)


def test_graph_for_one_image_runs_one_at_a_time(models: Path, arrays: list[np.ndarray[Any, Any]]) -> None:
    net = load_net(find_artefact(models, "fixed"), Device(threads=1, batch_items=4))

    assert net.batch_items == 1
    assert len(net.infer(arrays)) == len(arrays)


def test_chunk_has_the_same_answers_in_batches(tmp_path: Path, models: Path, photos: dict[str, bytes]) -> None:
    images = [*photos.values(), b"no image", *photos.values()]
    items = [ChunkItem(number=number, inputs={"image": image}) for number, image in enumerate(images)]
    write_chunk(tmp_path / "c.zip", "c", "classification", "open", None, items)

    one, four = (
        run_chunk(tmp_path / "c.zip", tmp_path / "r.zip", NetCache(models, Device(threads=3, batch_items=size))).items
        for size in (1, 4)
    )

    assert [item.error.code for item in four if item.error] == ["not_an_image"]
    for expected, found in zip(one, four, strict=True):
        if expected.error is None:
            assert found.seconds > 0
            np.testing.assert_allclose([row[2] for row in found.output], [row[2] for row in expected.output], atol=1e-5)


@pytest.mark.parametrize(("name", "message"), [("abacus", "no device 'abacus'"), ("cuda:x", "no device 'cuda:x'")])
def test_unknown_device_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_device(Device(name=name, threads=1))


def test_onnxruntime_without_gpus_is_told(artefact: Artefact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])

    for attempt in (check_device, lambda device: load_net(artefact, device)):
        with pytest.raises(ConfigError, match=r"the processor only.*mlg\[gpu\]"):
            attempt(Device(name=ABSENT, threads=1))


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_absent_card_is_told_and_the_processor_does_not_compute_in_its_place(
    artefact: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)

    for attempt in (check_device, lambda device: load_net(artefact, device)):
        with pytest.raises(ConfigError, match=f"{ABSENT} cannot be used"):
            attempt(Device(name=ABSENT, threads=1))


def test_model_for_the_processor_runs_on_it_beside_a_gpu(models_folder: Path) -> None:
    device = Device(name=ABSENT, threads=1, batch_items=8)

    net = load_net(find_artefact(models_folder, "efficientnet_lite0"), device)

    assert net.batch_items == 1
    assert net.infer([np.zeros((224, 224, 3), np.uint8)])[0].shape == (1000,)


@pytest.fixture
def card() -> Iterator[Device]:
    """The card of this machine."""
    device = Device(name=CARD, threads=2, batch_items=4)
    try:
        check_device(device)
    except ConfigError as error:
        pytest.skip(f"There is no GPU to test with. {error.reason}")
    yield device


def test_card_has_the_answers_of_the_processor(
    artefact: Artefact, arrays: list[np.ndarray[Any, Any]], card: Device
) -> None:
    expected = load_net(artefact, Device(threads=1)).infer(arrays)

    found = load_net(artefact, card).infer(arrays)

    np.testing.assert_allclose(np.stack(found), np.stack(expected), atol=1e-4)
