"""Loading and running graphs: what damaged files do, how much memory weights take, and threads that come first."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from provider_image.backends import Device
from provider_image.backends.openvino import OpenvinoNet, compile_graph, import_openvino, load_net
from provider_image.errors import BrokenArtefact
from provider_image.models.artefact import compute_digest, read_artefact
from tests.provider_image.conftest import ROOT
from tests.timing import DEADLINE_SECONDS

MEGABYTE = 1024 * 1024


@pytest.fixture
def folder(tmp_path, models_folder):
    """A copy of an artefact that a test may damage."""
    return shutil.copytree(models_folder / "efficientnet_lite0", tmp_path / "efficientnet_lite0")


def damage_shape(data: bytes) -> bytes:
    """Overwrite every eight bytes that look like a small whole number, as shapes and axes do."""
    words = np.frombuffer(data[: len(data) // 8 * 8], np.int64).copy()
    words[np.abs(words) < 10_000] = 77_777_777
    return words.tobytes() + data[len(words) * 8 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: bytes(len(data)),
        lambda data: b"\xff" * len(data),
        lambda data: random.Random(3).randbytes(len(data)),
        damage_shape,
    ],
    ids=["zeros", "ones", "noise", "shapes"],
)
def test_damaged_weights_are_named_as_such_whatever_openvino_makes_of_them(folder, damage):
    weights = folder / "model.bin"
    weights.write_bytes(damage(weights.read_bytes()))

    with pytest.raises(BrokenArtefact, match=r"model\.bin has changed"):
        load_net(read_artefact(folder), Device(threads=2))


def test_damaged_graph_is_named_as_such_although_openvino_cannot_read_it(folder):
    graph = folder / "model.xml"
    graph.write_bytes(b" " * graph.stat().st_size)

    with pytest.raises(BrokenArtefact, match=r"model\.xml has changed"):
        load_net(read_artefact(folder), Device(threads=1))


@pytest.mark.parametrize(("file", "content"), [("model.xml", b"<net/>"), ("model.bin", b""), ("model.bin", b"1234")])
def test_graph_that_openvino_cannot_load_is_a_broken_artefact(folder, file, content):
    (folder / file).write_bytes(content)
    facts = json.loads((folder / "model.json").read_text())
    facts["files"][file] = [len(content), hashlib.sha256(content).hexdigest()]
    (folder / "model.json").write_text(json.dumps(facts))
    facts["digest"] = compute_digest(read_artefact(folder))
    (folder / "model.json").write_text(json.dumps(facts))

    with pytest.raises(BrokenArtefact, match="OpenVINO cannot load"):
        load_net(read_artefact(folder), Device(threads=1))


def make_large_graph(folder) -> tuple[np.ndarray, int]:
    """Write a graph of six matrix products with large weights. :return: what it answers to ones, and their bytes."""
    openvino = import_openvino()
    rows = np.random.default_rng(5).normal(0, 1 / 64, (6, 3072, 3072)).astype(np.float32)
    image = openvino.opset8.parameter([1, 32, 32, 3], np.uint8)
    value = openvino.opset8.reshape(openvino.opset8.convert(image, "f32"), np.array([1, 3072]), False)
    expected = np.ones((1, 3072), np.float32)
    for matrix in rows:
        value = openvino.opset8.matmul(value, matrix, False, True)
        expected = expected @ matrix.T
    openvino.save_model(openvino.Model([value], [image]), str(folder / "model.xml"), compress_to_fp16=False)
    return expected[0], rows.nbytes


def test_weights_are_not_in_memory_twice_while_a_graph_is_compiled(tmp_path):
    _, size = make_large_graph(tmp_path)
    code = (
        "import sys; from pathlib import Path; "
        "from provider_image.backends.openvino import compile_graph, initialise_binding; "
        "from provider_image.runtime import peak_memory_bytes; initialise_binding(); before = peak_memory_bytes(); "
        "graph = compile_graph(Path(sys.argv[1]), 1, 'f32'); print(peak_memory_bytes() - before)"
    )

    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model.xml"], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert int(result.stdout) < 1.6 * size


def test_weights_that_were_given_back_still_answer(tmp_path):
    expected, _ = make_large_graph(tmp_path)

    net = OpenvinoNet(SimpleNamespace(name="large"), compile_graph(tmp_path / "model.xml", 1, "f32"), 1)
    (answer,) = net.infer([np.ones((32, 32, 3), np.uint8)])

    np.testing.assert_allclose(answer, expected, rtol=1e-3, atol=1e-4)


def test_two_threads_may_come_first_after_loading(models_folder):
    code = (
        "import sys, threading; from pathlib import Path; import numpy; "
        "from provider_image.backends import Device, load_net; "
        "from provider_image.models.artefact import read_artefact; "
        "net = load_net(read_artefact(Path(sys.argv[1])), Device(threads=2)); "
        "image = numpy.zeros((224, 224, 3), 'uint8'); "
        "together = threading.Barrier(2); work = lambda: (together.wait(), net.infer([image])); "
        "threads = [threading.Thread(target=work) for _ in range(2)]; "
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]"
    )

    for _ in range(3):
        subprocess.run(
            [sys.executable, "-c", code, models_folder / "efficientnet_lite0"],
            cwd=ROOT,
            check=True,
            timeout=DEADLINE_SECONDS,
        )
