"""Classifiers from ONNX files answer as in onnxruntime, on OpenVINO or where that is not possible on onnxruntime."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from provider_image.backends import Device, load_net
from provider_image.backends.onnxruntime import OnnxruntimeNet
from provider_image.check import check_model
from provider_image.compiler import confined, embedding
from provider_image.compiler.custom import CustomModel
from provider_image.compiler.onnx_models import builder as onnx_model
from provider_image.compiler.onnx_models.file import MAX_OPSET, MIN_OPSET
from provider_image.errors import (
    BrokenArtefact,
    CompilationFailed,
    CompilerMissing,
    ConfigError,
    ModelError,
    UnsafeModelFile,
    UnsuitableModel,
)
from provider_image.images.decoding import decode
from provider_image.models.artefact import Artefact
from provider_image.models.registry import find_row
from provider_image.services.classification import Classification
from tests.cli.run_mlg import ROOT, mlg
from tests.onnx_models import (
    PETS,
    SIDE,
    hidden_determinant,
    install_unusual,
    move_weights_out,
    network,
    onnx,
    run,
    write,
)
from tests.timing import DEADLINE_SECONDS

TYPES = onnx.TensorProto
#: The formulas of the preprocessings, as docs/models.md gives them.
FORMULAS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda rgb: rgb,
    "unit": lambda rgb: rgb / 255,
    "tf": lambda rgb: rgb / 127.5 - 1,
    "torch": lambda rgb: (rgb / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225],
    "caffe": lambda rgb: rgb[..., ::-1] - [103.939, 116.779, 123.68],
}


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., Artefact]:
    """Save a network and install it; returns the artefact."""

    def install(
        model: Any,
        labels: Sequence[str] = PETS,
        name: str = "pets",
        edit: Callable[[Any], object] = lambda model: None,
        on_step: Callable[[str], None] = lambda step: None,
        **facts: Any,
    ) -> Artefact:
        file = write(model, tmp_path / f"{name}.onnx", edit)
        (tmp_path / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
        custom = CustomModel(name=name, kind="onnx", file=file, labels=tmp_path / "labels.txt", **facts)
        return onnx_model.build(tmp_path / "models", custom, on_step=on_step)

    return install


def answers(artefact: Artefact, photos: Mapping[str, bytes]) -> list[dict[str, float]]:
    """Answer photos as a worker does: label -> probability of each."""
    service, net = Classification(), load_net(artefact, Device(threads=1))
    items = [service.prepare(artefact, {"image": photo}, {}) for photo in photos.values()]
    outputs = service.run(net, items, [{}] * len(items))
    return [{name: probability for _, name, probability in output.data} for output in outputs]


def expected(
    file: Path, artefact: Artefact, photos: Mapping[str, bytes], formula: Callable[[np.ndarray], np.ndarray], **how: Any
) -> list[Any]:
    """Answer photos with onnxruntime and the saved file.

    :param how: layout (nchw or nhwc), channels and dtype.
    """
    found = []
    for photo in photos.values():
        pixels = formula(decode(photo, artefact.height, artefact.width, artefact.crop).astype(np.float64))
        pixels = pixels[..., ::-1] if how.get("channels") == "bgr" else pixels
        pixels = pixels if how.get("layout") == "nhwc" else pixels.transpose(2, 0, 1)
        found.append(run(file, pixels[None].astype(how.get("dtype", np.float32)))[0])
    return found


def assert_same(found: Sequence[Mapping[str, float]], right: Sequence[np.ndarray], *, tolerance: float = 1e-4) -> None:
    for one, other in zip(found, right, strict=True):
        assert one == pytest.approx(dict(zip(PETS, other.tolist(), strict=True)), abs=tolerance)
        assert max(one.values()) < 0.999  # or any network would do


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


@pytest.mark.parametrize(
    ("layout", "preprocessing", "channels"),
    [("nchw", "torch", None), ("nhwc", "tf", None), ("nchw", "unit", "bgr"), ("nhwc", "caffe", None)],
)
def test_a_network_answers_as_in_onnxruntime(
    install: Callable[..., Artefact],
    photos: dict[str, bytes],
    tmp_path: Path,
    layout: str,
    preprocessing: str,
    channels: str | None,
) -> None:
    model = network(layout=layout, is_raw=preprocessing == "caffe", sides=(24, 40))

    artefact = install(model, preprocessing=preprocessing, channels=channels, title="My pets")

    assert (artefact.backend, artefact.title, artefact.source) == ("openvino", "My pets", "own")
    assert (artefact.height, artefact.width) == (24, 40)
    right = expected(
        tmp_path / "pets.onnx", artefact, photos, FORMULAS[preprocessing], layout=layout, channels=channels
    )
    assert_same(answers(artefact, photos), right)


def test_a_network_of_whole_numbers_is_accepted(
    install: Callable[..., Artefact], photos: dict[str, bytes], tmp_path: Path
) -> None:
    artefact = install(network(kind=TYPES.UINT8, is_raw=True))

    right = expected(tmp_path / "pets.onnx", artefact, photos, FORMULAS["none"], dtype=np.uint8)
    assert_same(answers(artefact, photos), right)
    with pytest.raises(ConfigError, match="Omit --preprocessing"):
        install(network(kind=TYPES.UINT8), preprocessing="tf")


def test_half_precision_is_computed_in_f32(
    install: Callable[..., Artefact], photos: dict[str, bytes], tmp_path: Path
) -> None:
    artefact = install(network(kind=TYPES.FLOAT16), preprocessing="unit")

    assert artefact.backend == "openvino"
    right = expected(tmp_path / "pets.onnx", artefact, photos, FORMULAS["unit"], dtype=np.float16)
    assert_same(answers(artefact, photos), right, tolerance=2e-3)  # half precision has three digits


def test_logits_get_a_softmax_and_the_user_is_told(
    install: Callable[..., Artefact], photos: dict[str, bytes], tmp_path: Path
) -> None:
    steps: list[str] = []

    artefact = install(network(ending=None, layout="nhwc"), on_step=steps.append, preprocessing="unit")

    assert "the output is logits; a softmax is added" in steps
    assert f"running the network on {SIDE} x {SIDE}, channels last, RGB" in steps
    right = expected(tmp_path / "pets.onnx", artefact, photos, FORMULAS["unit"], layout="nhwc")
    assert_same(answers(artefact, photos), [softmax(each) for each in right])


def test_one_sigmoid_becomes_two_classes(
    install: Callable[..., Artefact], photos: dict[str, bytes], tmp_path: Path
) -> None:
    artefact = install(network(ending="Sigmoid", classes=1), ("other", "cat"), preprocessing="unit")

    right = expected(tmp_path / "pets.onnx", artefact, photos, FORMULAS["unit"])
    for found, (probability,) in zip(answers(artefact, photos), right, strict=True):
        assert found == pytest.approx({"cat": probability, "other": 1 - probability}, abs=1e-4)


def test_what_it_returns_can_be_said_instead_of_found_out(
    install: Callable[..., Artefact], photos: dict[str, bytes], tmp_path: Path
) -> None:
    artefact = install(network(), returns="logits", preprocessing="unit")

    right = expected(tmp_path / "pets.onnx", artefact, photos, FORMULAS["unit"])
    assert_same(answers(artefact, photos), [softmax(each) for each in right])
    with pytest.raises(UnsuitableModel, match="do not sum to 1"):
        install(network(ending=None), returns="probabilities")


def test_what_the_file_states_is_used_unless_an_option_says_otherwise(install: Callable[..., Artefact]) -> None:
    def state(model: Any) -> None:
        model.metadata_props.add(key="Image.BitmapPixelFormat", value="Bgr8")
        model.metadata_props.add(key="Image.NominalPixelRange", value="Normalized_0_1")

    stated = install(network(), edit=state)
    said = install(network(), edit=state, preprocessing="caffe")
    same = install(network(), preprocessing="unit", channels="bgr")

    assert (stated.preprocessing, said.preprocessing) == ("unit", "caffe")
    assert stated.files == same.files != said.files


@pytest.mark.parametrize("opset", [MIN_OPSET, 11, 13, 18, MAX_OPSET])
def test_every_opset_is_converted(install: Callable[..., Artefact], opset: int) -> None:
    assert install(network(opset=opset), preprocessing="unit").backend == "openvino"


def test_a_size_that_is_open_is_given_by_the_option(install: Callable[..., Artefact]) -> None:
    with pytest.raises(UnsuitableModel, match="--size HxW"):
        install(network(sides=("height", "width")))

    artefact = install(network(sides=("height", "width"), layout="nhwc"), size=(24, 40))

    assert (artefact.height, artefact.width) == (24, 40)
    with pytest.raises(ConfigError, match="Omit --size"):
        install(network(), size=(24, 40))


@pytest.mark.parametrize(
    ("facts", "labels", "reason"),
    [
        ({"ending": "Sigmoid"}, PETS, "several may be right at once"),
        ({"ending": "Relu"}, PETS, "ends in relu"),
        ({"classes": 4}, PETS, "4 classes and the file 3 labels"),
        ({"classes": 1, "ending": "Sigmoid"}, PETS, "Give two"),
        ({"batch": 8}, PETS, "one image for N"),
        ({"sides": (3, 3)}, PETS, None),
        ({"sides": (SIDE, 3)}, PETS, r"\(N, 3, height, width\)"),
        ({"sides": (5000, 5000)}, PETS, "too large"),
    ],
)
def test_what_is_no_classifier_of_one_image_is_refused(
    install: Callable[..., Artefact], tmp_path: Path, facts: dict[str, Any], labels: Sequence[str], reason: str | None
) -> None:
    with pytest.raises(UnsuitableModel, match=reason):
        install(network(**facts), labels)

    assert [path.name for path in (tmp_path / "models").iterdir()] == [".pets.lock"]


def test_the_same_network_gives_the_same_digest(install: Callable[..., Artefact], tmp_path: Path) -> None:
    first = install(network())
    again = install(network())
    without_openvino = [install(network(before_end=hidden_determinant())).digest for _ in range(2)]

    assert first.digest == again.digest != without_openvino[0] == without_openvino[1]
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"pets", ".pets.lock"}
    assert install(network(seed=4)).digest != first.digest


def test_there_is_an_embedding_of_it(install: Callable[..., Artefact]) -> None:
    artefact = install(network(), preprocessing="unit")

    vectors = embedding.build(artefact.folder.parent, "pets")

    assert vectors.dimensions == 8  # what the last layer of `network` takes
    assert check_model(vectors.folder, Device(threads=1), seconds=0.01).is_ok


# Where OpenVINO cannot be used


@pytest.fixture(scope="module")
def unusual(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    """An installed model with an operator that OpenVINO does not have. Must not be changed."""
    return install_unusual(tmp_path_factory.mktemp("unusual") / "models")


def test_an_operator_that_openvino_does_not_have_runs_on_onnxruntime(
    unusual: Artefact, photos: dict[str, bytes]
) -> None:
    file = unusual.folder.parents[1] / "unusual.onnx"

    found = answers(unusual, photos)

    assert (unusual.backend, list(unusual.files), unusual.storage) == ("onnxruntime", ["model.onnx"], None)
    assert_same(found, expected(file, unusual, photos, FORMULAS["torch"], channels="bgr"))
    files = {path.name for path in unusual.folder.iterdir()}
    assert files == {"model.json", "model.onnx", *(sample.file for sample in unusual.samples)}


def test_the_check_of_a_model_on_onnxruntime_passes_and_names_it(unusual: Artefact) -> None:
    report = check_model(unusual.folder, Device(threads=1), seconds=0.01)

    assert report.is_ok, report.problem
    assert "onnxruntime" in report.versions


def test_a_network_that_openvino_computes_otherwise_runs_on_onnxruntime(
    install: Callable[..., Artefact], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    convert, steps = onnx_model._convert, list[str]()

    def convert_wrongly(file: Path) -> Any:
        # As a fault in a converter would: the graph of other weights.
        model = onnx.load(file)
        for tensor in model.graph.initializer:
            if tensor.dims == [8, 3]:
                values = onnx.numpy_helper.to_array(tensor) * np.float32(1.01)
                tensor.raw_data = values.tobytes()
        return convert(write(model, tmp_path / "wrong.onnx"))

    monkeypatch.setattr(onnx_model, "_convert", convert_wrongly)

    artefact = install(network(), on_step=steps.append, preprocessing="unit")

    assert artefact.backend == "onnxruntime"
    assert any("gives other results than onnxruntime" in step for step in steps)


def test_nothing_is_installed_if_what_was_put_around_the_network_changes_it(
    install: Callable[..., Artefact], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begin = onnx_model.begin_complete

    def begin_wrongly(network: Any, draft: Artefact, taken: Any) -> Any:
        return begin(network, draft.__class__(**{**vars(draft), "preprocessing": "none"}), taken)

    monkeypatch.setattr(onnx_model, "begin_complete", begin_wrongly)

    with pytest.raises(CompilationFailed, match="other results"):
        install(network(before_end=hidden_determinant()), preprocessing="unit")

    assert [path.name for path in (tmp_path / "models").iterdir()] == [".pets.lock"]


def test_a_machine_without_onnxruntime_says_what_is_missing(
    unusual: Artefact, install: Callable[..., Artefact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)

    with pytest.raises(BrokenArtefact, match=r"unusual runs on onnxruntime.*mlg\[onnx\].*mlg image build unusual"):
        load_net(unusual, Device(threads=1))
    with pytest.raises(CompilerMissing, match=r"mlg\[onnx\]"):
        install(network())


def test_a_precision_that_onnxruntime_does_not_have_is_refused(unusual: Artefact) -> None:
    with pytest.raises(ConfigError, match="MLG_PRECISION to f32 or auto"):
        load_net(unusual, Device(threads=1, precision="bf16"))

    assert isinstance(load_net(unusual, Device(threads=1, precision="auto")), OnnxruntimeNet)


def test_onnxruntime_sends_nothing_and_leaves_nothing(unusual: Artefact, tmp_path: Path) -> None:
    # Its telemetry would store the id of the machine below one of these, and start threads that send.
    code = """
import os, sys
from pathlib import Path
from provider_image.backends import Device, load_net
from provider_image.models.artefact import read_artefact
net = load_net(read_artefact(Path(sys.argv[1])), Device(threads=1))
print(os.environ["ORT_DISABLE_TELEMETRY"])
"""
    places = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "TMPDIR"), str(tmp_path))

    done = subprocess.run(
        [sys.executable, "-c", code, str(unusual.folder)],
        cwd=ROOT,
        env={**os.environ, **places},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=True,
    )

    assert done.stdout.strip() == "1"
    assert list(tmp_path.iterdir()) == []


# As a user runs it


def test_a_model_is_installed_by_a_command_in_a_confined_process(tmp_path: Path) -> None:
    file = write(move_weights_out(network(ending=None), tmp_path), tmp_path / "pets.onnx")
    (tmp_path / "labels.txt").write_text("\n".join(PETS))
    options = ("--labels", str(tmp_path / "labels.txt"), "--preprocessing", "unit", "--title", "My pets")

    done = mlg("models", "compile", "my_pets", "--onnx", str(file), *options, home=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "my_pets is installed in" in done.stdout and "a softmax is added" in done.stderr
    own = find_row(tmp_path / "models", "My-Pets")
    assert (own.title, own.source, own.height) == ("My pets", "own", SIDE)


def test_a_small_file_that_takes_much_memory_ends_with_its_process(tmp_path: Path) -> None:
    make = onnx.helper.make_node
    # The size is computed from the image, so no shape tells it.
    before = [
        make("ReduceMax", ["logits"], ["largest"], keepdims=0),
        make("Constant", [], ["many"], value_ints=[2**40]),
        make("Abs", ["largest"], ["positive_one"]),
        make("Cast", ["positive_one"], ["whole"], to=TYPES.INT64),
        make("Add", ["whole", "many"], ["size"]),
        make("ConstantOfShape", ["size"], ["huge"]),
        make("ReduceSum", ["huge"], ["zero"], keepdims=0),
        make("Add", ["logits", "zero"], ["end"]),
    ]
    (tmp_path / "labels.txt").write_text("\n".join(PETS))
    file = write(network(before_end=before), tmp_path / "evil.onnx")
    custom = CustomModel(name="pets", kind="onnx", file=file, labels=tmp_path / "labels.txt")

    with pytest.raises(ModelError) as caught:
        confined.build(
            "provider_image.compiler.onnx_models.builder:build", tmp_path / "models", "pets", custom, max_bytes=2**31
        )

    assert not isinstance(caught.value, UnsafeModelFile)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".pets.lock"]
