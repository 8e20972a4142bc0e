"""Detectors of faces and embeddings from ONNX files, which are not classifiers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from provider_image.backends import Device
from provider_image.check import check_model
from provider_image.compiler.custom import CustomModel
from provider_image.compiler.onnx_models import builder
from provider_image.errors import UnsuitableModel
from provider_image.models.artefact import Artefact, find_artefact
from provider_image.service import Output
from provider_image.services import load_service
from provider_image.services.embedding import read_vector
from tests.onnx_models import SIDE, network, onnx, run, write
from tests.provider_image.conftest import encode_image

HEIGHT, WIDTH = 64, 96
#: Where the eyes of a toy's face are, as shares of its cell.
EYES = (0.25, 0.3, 0.75, 0.3)
TYPES = onnx.TensorProto


def detector(*, kind: str = "yunet", width: int = WIDTH, columns: int = 4) -> Any:
    """A network that takes red squares of 16 pixels for faces, with the outputs of a detector.

    :param columns: of the boxes.
    """
    make = onnx.helper.make_node
    nodes = [
        make("Slice", ["image", "zero", "one", "axes"], ["channel"]),
        make("Div", ["channel", "white"], ["red"]),
    ]
    weights: dict[str, Any] = {
        "zero": np.array([0], np.int64),
        "one": np.array([1], np.int64),
        "axes": np.array([1], np.int64),
        "white": np.array(255, np.float32),
    }
    outputs = []

    def rows(name: str, scores: str, values: np.ndarray) -> None:
        """Add an output with these values in every row."""
        weights[f"{name}_zeros"] = np.zeros((1, 1, values.shape[-1]), np.float32)
        weights[f"{name}_values"] = values.astype(np.float32).reshape(1, -1, values.shape[-1])
        nodes.append(make("Mul", [scores, f"{name}_zeros"], [f"{name}_none"]))
        nodes.append(make("Add", [f"{name}_none", f"{name}_values"], [name]))
        outputs.append(name)

    for stride in (8, 16, 32) if kind == "yunet" else (16,):
        nodes.append(make("AveragePool", ["red"], [f"mean{stride}"], kernel_shape=[stride] * 2, strides=[stride] * 2))
        weights[f"shape{stride}"] = np.array([1, -1, 1], np.int64)
        nodes.append(make("Reshape", [f"mean{stride}", f"shape{stride}"], [f"score{stride}"]))
        if kind == "yunet":
            weights[f"factor{stride}"] = np.array(1.0 if stride == 16 else 0.01, np.float32)
            nodes += [
                make("Mul", [f"score{stride}", f"factor{stride}"], [f"{name}_{stride}"]) for name in ("cls", "obj")
            ]
            outputs += [f"cls_{stride}", f"obj_{stride}"]
            rows(f"bbox_{stride}", f"score{stride}", np.array([0.5, 0.5, 0, 0][:columns]))
            rows(f"kps_{stride}", f"score{stride}", np.array([*EYES, *[0.5] * 6]))
    if kind == "ssd":
        weights["unit"] = np.array(1.0, np.float32)
        nodes.append(make("Sub", ["unit", "score16"], ["background"]))
        nodes.append(make("Concat", ["background", "score16"], ["scores"], axis=2))
        outputs.append("scores")
        corners = [(x, y) for y in range(HEIGHT // 16) for x in range(width // 16)]
        sides = np.array([width, HEIGHT, width, HEIGHT]) / 16
        rows("boxes", "score16", np.array([[x, y, x + 1, y + 1] for x, y in corners]) / sides)
    graph = onnx.helper.make_graph(
        nodes,
        "made by a test",
        [onnx.helper.make_tensor_value_info("image", TYPES.FLOAT, (1, 3, HEIGHT, width))],
        [onnx.helper.make_tensor_value_info(name, TYPES.FLOAT, None) for name in outputs],
        [onnx.numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    return onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)])


def install(model: Any, folder: Path, service: str, **facts: Any) -> Artefact:
    """Save a network and install it as `own`."""
    file = write(model, folder / "own.onnx")
    custom = CustomModel(name="own", kind="onnx", file=file, labels=None, service=service, **facts)
    return builder.build(folder / "models", custom)


def answer(artefact: Artefact, image: bytes) -> Output:
    """Answer an image as a worker does."""
    service = load_service(artefact.service)
    item = service.prepare(artefact, {"image": image}, {})
    (output,) = service.run(service.load(artefact, Device(threads=1)), [item], [{}])
    service.check_output(artefact, {}, output)
    return output


#: Twice as large as what the detector takes, with a red square.
PHOTO = Image.new("RGB", (2 * WIDTH, 2 * HEIGHT))
PHOTO.paste((255, 0, 0), (64, 32, 96, 64))


@pytest.fixture(scope="module", params=["yunet", "ssd"])
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return install(detector(kind=request.param), tmp_path_factory.mktemp(request.param), "face_detection")


def test_a_detector_finds_a_face_in_the_pixels_of_the_original(installed: Artefact) -> None:
    (face,) = answer(installed, encode_image(PHOTO, format="PNG")).data["faces"]

    assert face["box"] == {"left": 64, "top": 32, "width": 32, "height": 32}
    assert face["score"] > 0.9  # a little less than 1, because scaling blurs
    has_eyes = "yunet" in str(installed.folder)
    assert face["eyes"] == ([{"x": 72, "y": 41.6}, {"x": 88, "y": 41.6}] if has_eyes else [])


def test_a_photo_of_another_shape_is_not_distorted(installed: Artefact) -> None:
    photo = Image.new("RGB", (WIDTH // 2, 2 * HEIGHT))
    photo.paste((255, 0, 0), (0, 96, 32, 128))

    (face,) = answer(installed, encode_image(photo, format="PNG")).data["faces"]

    assert face["box"] == {"left": 0, "top": 96, "width": 32, "height": 32}


def test_a_detector_passes_its_check_and_takes_faces(installed: Artefact) -> None:
    report = check_model(installed.folder, Device(threads=1), seconds=0.05)

    assert (report.problem, installed.takes_faces, installed.height) == (None, True, 0)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (detector(columns=3), r"\(1, 96, 3\).*YuNet with 12 outputs.*SSD"),
        (detector(width=80), "multiples of 32"),
        (network(), "Two kinds of detectors"),
    ],
    ids=["boxes of three numbers", "not a multiple of 32", "a classifier"],
)
def test_a_network_with_other_outputs_is_no_detector(model: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UnsuitableModel, match=words):
        install(model, tmp_path, "face_detection")


def test_an_embedding_gives_the_networks_vector_with_unit_length(tmp_path: Path, photos: Mapping[str, bytes]) -> None:
    artefact = install(network(ending=None, classes=24), tmp_path, "embedding", preprocessing="unit", takes_faces=True)

    found = read_vector(answer(artefact, photos["rocket"]).files["vector"])

    pixels = load_service("embedding").prepare(artefact, {"image": photos["rocket"]}, {}) / 255
    right = run(tmp_path / "own.onnx", pixels.transpose(2, 0, 1)[None].astype(np.float32))[0]
    assert (artefact.dimensions, artefact.service, artefact.takes_faces) == (24, "embedding", True)
    assert found == pytest.approx(right / np.linalg.norm(right), abs=1e-4)
    assert math.hypot(*found) == pytest.approx(1, abs=1e-5)
    assert check_model(artefact.folder, Device(threads=1), seconds=0.05).problem is None


def test_a_single_number_is_no_vector(tmp_path: Path) -> None:
    with pytest.raises(UnsuitableModel, match="one vector"):
        install(network(ending=None, classes=1), tmp_path, "embedding")


def test_a_classifier_keeps_what_it_was_installed_for(tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("young\nold\nolder\n")
    file = write(network(), tmp_path / "age.onnx")

    artefact = builder.build(
        tmp_path / "models", CustomModel(name="age", kind="onnx", file=file, labels=labels, takes_faces=True)
    )

    assert find_artefact(tmp_path / "models", "age").takes_faces and artefact.height == SIDE
