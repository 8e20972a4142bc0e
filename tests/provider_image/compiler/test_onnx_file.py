"""ONNX files that try to read other files, to run something else or to take much memory are refused before they run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from provider_image.compiler.onnx_models import file as onnx_file
from provider_image.compiler.onnx_models.file import MAX_OPSET, MIN_OPSET, OPERATORS, check_onnx_file, check_shapes
from provider_image.errors import CompilerMissing, ModelError, UnsafeModelFile, UnsuitableModel
from tests.onnx_models import move_weights_out, network, onnx, place, write

Edit = Callable[[Any], object]
TYPES = onnx.TensorProto


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        check_onnx_file(path)
    return caught.value.reason


def add_node(operator: str, *inputs: str, at: int = 0, domain: str = "", **attributes: Any) -> Edit:
    """Insert an operation whose value nobody uses."""
    node = onnx.helper.make_node(operator, inputs, ["unused"], domain=domain, **attributes)
    return lambda model: model.graph.node.insert(at, node)


def body() -> Any:
    """A subgraph."""
    value = onnx.helper.make_tensor_value_info("inner", TYPES.FLOAT, (1,))
    constant = onnx.helper.make_node("Constant", [], ["inner"], value_float=1.0)
    return onnx.helper.make_graph([constant], "body", [], [value])


def weights(**changes: Any) -> Edit:
    """Change the first weights."""

    def edit(model: Any) -> None:
        for name, value in changes.items():
            if name == "dims":
                del model.graph.initializer[0].dims[:]
                model.graph.initializer[0].dims.extend(value)
            else:
                setattr(model.graph.initializer[0], name, value)

    return edit


def elsewhere(**entries: str) -> Edit:
    """Say that the first weights, 864 bytes, are in another file."""

    def edit(model: Any) -> None:
        model.graph.initializer[0].ClearField("raw_data")
        place(model.graph.initializer[0], **entries)

    return edit


def cycle(model: Any) -> None:
    model.graph.node[0].input[0] = model.graph.node[1].output[0]


def in_both_places(model: Any) -> None:
    place(model.graph.initializer[0], location="weights.data")


def add_function(model: Any) -> None:
    model.functions.add(name="Mine", domain="mine")


def import_twice(model: Any) -> None:
    model.opset_import.add(domain="ai.onnx", version=17)


def define_again(model: Any) -> None:
    model.graph.node[1].output[0] = "image"


def sparse(model: Any) -> None:
    model.graph.sparse_initializer.add()


def many(model: Any) -> None:
    for _ in range(onnx_file.MAX_NODES):
        model.graph.node.add(op_type="Identity")


def claim_the_same_bytes_often(model: Any) -> None:
    for number in range(3):  # without a limit of all together, a small file would become a large network
        tensor = model.graph.initializer.add(name=f"more{number}", data_type=TYPES.FLOAT, dims=(216,))
        place(tensor, location="weights.data", length="864")


#: What is refused, and a word of the reason.
HOSTILE: dict[str, tuple[Edit, str]] = {
    "a path out of the folder": (elsewhere(location="../secret.data"), "beside the model only"),
    "an absolute path": (elsewhere(location="/etc/passwd"), "beside the model only"),
    "a path below the folder": (elsewhere(location="below/secret.data"), "beside the model only"),
    "a path with backslashes": (elsewhere(location="..\\secret.data"), "beside the model only"),
    "the folder": (elsewhere(location="."), "beside the model only"),
    "no place": (elsewhere(offset="0"), "beside the model only"),
    "a link that leads out": (elsewhere(location="link.data"), "is a link"),
    "a pipe": (elsewhere(location="pipe.data"), "is not a file"),
    "a file that is missing": (elsewhere(location="nowhere.data"), "cannot be read"),
    "an offset after the end": (elsewhere(location="weights.data", offset="100000"), "ends before"),
    "a negative offset": (elsewhere(location="weights.data", offset="-1"), "is no number"),
    "another length": (elsewhere(location="weights.data", length="5"), "864 bytes"),
    "weights in two places": (in_both_places, "in the file and outside"),
    "an operator with subgraphs": (add_node("If", "image", then_branch=body(), else_branch=body()), "'If'"),
    "a loop": (add_node("Loop", "", "", body=body()), "'Loop'"),
    "a scan": (add_node("Scan", "image", body=body(), num_scan_inputs=1), "'Scan'"),
    "a subgraph in a harmless operator": (add_node("Relu", "image", body=body()), "attribute 'body'"),
    "random numbers": (add_node("RandomNormal", shape=[3]), "'RandomNormal'"),
    "an operator that does not exist": (add_node("Evil", "image"), "'Evil'"),
    "an operator of another domain": (add_node("Relu", "image", domain="com.microsoft"), "com.microsoft::Relu"),
    "texts": (add_node("Constant", value_strings=["a"]), "attribute 'value_strings'"),
    "an image file to decode": (add_node("ImageDecoder", "image"), "'ImageDecoder'"),
    "a sparse constant": (sparse, "sparse"),
    "a function": (add_function, "function 'Mine'"),
    "a cycle": (cycle, "not computed before"),
    "a value from nowhere": (add_node("Relu", "nothing"), "not computed before"),
    "a value that is defined twice": (define_again, "twice"),
    "weights of a billion numbers": (weights(dims=(2**15, 2**15)), "At most 268435456"),
    "weights that overflow": (weights(dims=(2**62, 2**62, 16)), "At most 268435456"),
    "a negative shape": (weights(dims=(-1, 27)), "not supported"),
    "a shape of many dimensions": (weights(dims=[1] * 9), "not supported"),
    "weights that are cut short": (weights(raw_data=b"1234"), "their shape claims"),
    "weights of text": (weights(data_type=TYPES.STRING), "type STRING"),
    "weights of an unknown type": (weights(data_type=99), "number 99"),
    "too many operations": (many, "more than"),
    "an old opset": (lambda model: setattr(model.opset_import[0], "version", MIN_OPSET - 1), "opset"),
    "a future opset": (lambda model: setattr(model.opset_import[0], "version", MAX_OPSET + 1), "opset"),
    "two opsets": (import_twice, "opset"),
    "no opset": (lambda model: model.ClearField("opset_import"), "opset"),
    "the mask of a dropout": (
        lambda model: model.graph.node.add(op_type="Dropout", input=["logits"], output=["kept", "mask"]),
        "mask",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_not_allowed_is_refused(tmp_path: Path, case: str) -> None:
    edit, reason = HOSTILE[case]
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "weights.data").write_bytes(bytes(864))
    (folder / "below").mkdir()
    for secret in (tmp_path / "secret.data", folder / "below" / "secret.data"):
        secret.write_bytes(bytes(864))
    (folder / "link.data").symlink_to(tmp_path / "secret.data")
    os.mkfifo(folder / "pipe.data")  # opening it as usual would wait for ever

    assert reason in refusal(write(network(), folder / "evil.onnx", edit))


def test_a_file_that_is_no_network_is_refused(tmp_path: Path) -> None:
    whole = network().SerializeToString()
    for name, data in {"empty": b"", "noise": b"noise" * 100, "cut": whole[: len(whole) // 2]}.items():
        (tmp_path / name).write_bytes(data)

        assert "ONNX" in refusal(tmp_path / name)
    assert "cannot be read" in refusal(tmp_path / "nowhere.onnx")
    assert "is not a file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe.onnx")
    assert "is not a file" in refusal(tmp_path / "pipe.onnx")


def test_all_weights_together_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights.data").write_bytes(bytes(864))
    file = write(network(), tmp_path / "often.onnx", claim_the_same_bytes_often)
    size = sum(len(tensor.raw_data) for tensor in check_onnx_file(file).model.graph.initializer)

    monkeypatch.setattr(onnx_file, "MAX_BYTES", size - 1)

    assert f"{size - 1} bytes of all weights" in refusal(file)


def test_a_file_that_claims_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "large.onnx").open("wb") as file:
        file.truncate(onnx_file.MAX_BYTES + 1)

    assert "is larger than" in refusal(tmp_path / "large.onnx")


def test_weights_outside_are_the_same_network(tmp_path: Path) -> None:
    inside = check_onnx_file(write(network(), tmp_path / "inside.onnx"))
    outside = check_onnx_file(write(move_weights_out(network(), tmp_path), tmp_path / "outside.onnx"))
    before = outside.sha256
    (tmp_path / "weights.data").write_bytes(bytes(len((tmp_path / "weights.data").read_bytes())))

    assert outside.model == inside.model
    assert check_onnx_file(tmp_path / "outside.onnx").sha256 != before  # they are part of the digest


def test_weights_in_typed_fields_are_the_same_network(tmp_path: Path) -> None:
    def spread(model: Any) -> None:
        for tensor in model.graph.initializer:
            tensor.float_data.extend(np.frombuffer(tensor.raw_data, np.float32).tolist())
            tensor.ClearField("raw_data")

    typed = write(network(), tmp_path / "typed.onnx", spread)

    assert check_onnx_file(typed).model == check_onnx_file(write(network(), tmp_path / "raw.onnx")).model


def test_only_what_was_checked_is_in_the_copy(tmp_path: Path) -> None:
    def decorate(model: Any) -> None:
        model.doc_string = model.graph.doc_string = model.graph.node[0].doc_string = "SECRET"
        model.graph.node[0].name = "SECRET"
        model.metadata_props.add(key="SECRET", value="SECRET")
        model.training_info.add()
        model.opset_import.add(domain="SECRET", version=1)
        model.graph.node[0].attribute[0].doc_string = "SECRET"
        model.graph.node[0].attribute[0].g.name = "SECRET"  # beside the value of its own kind

    checked = check_onnx_file(write(network(), tmp_path / "decorated.onnx", decorate))

    assert b"SECRET" not in checked.model.SerializeToString()
    assert checked.model == check_onnx_file(write(network(), tmp_path / "plain.onnx")).model


def test_weights_that_are_inputs_as_in_old_files_are_no_inputs(tmp_path: Path) -> None:
    def list_weights(model: Any) -> None:
        model.ir_version = 3
        for tensor in model.graph.initializer:
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, TYPES.FLOAT, tensor.dims))

    checked = check_onnx_file(write(network(), tmp_path / "old.onnx", list_weights))

    assert len(checked.model.graph.input) == 1


def test_a_dropout_drops_nothing_whatever_it_is_told(tmp_path: Path) -> None:
    make = onnx.helper.make_node
    training = onnx.numpy_helper.from_array(np.array(True))
    dropout = [
        make("Constant", [], ["training"], value=training),
        make("Dropout", ["logits", "", "training"], ["end"]),
    ]

    checked = check_onnx_file(write(network(before_end=dropout), tmp_path / "training.onnx"))

    assert "Dropout" not in [node.op_type for node in checked.model.graph.node]


@pytest.mark.parametrize(
    ("operator", "inputs", "reason"),
    [
        ("Expand", ["logits", "sides"], "At most 268435456"),
        ("MatMul", ["logits", "logits"], "do not fit"),
    ],
)
def test_shapes_that_are_too_large_or_contradict_each_other_are_refused(
    tmp_path: Path, operator: str, inputs: list[str], reason: str
) -> None:
    sides = onnx.numpy_helper.from_array(np.array([2**30, 3]))
    before = [
        onnx.helper.make_node("Constant", [], ["sides"], value=sides),
        onnx.helper.make_node(operator, inputs, ["large"]),
        onnx.helper.make_node("ReduceMax", ["large"], ["end"], axes=[0]),
    ]
    checked = check_onnx_file(write(network(before_end=before, batch=1), tmp_path / "large.onnx"))

    with pytest.raises((UnsafeModelFile, UnsuitableModel), match=reason):
        check_shapes(checked.model)


def test_what_the_file_states_about_its_image_is_read(tmp_path: Path) -> None:
    def state(model: Any) -> None:
        model.metadata_props.add(key="Image.BitmapPixelFormat", value="Bgr8")
        model.metadata_props.add(key="Image.NominalPixelRange", value="Normalized_1_1")

    stated = check_onnx_file(write(network(), tmp_path / "stated.onnx", state))
    silent = check_onnx_file(write(network(), tmp_path / "silent.onnx"))

    assert (stated.channels, stated.preprocessing) == ("bgr", "tf")
    assert (silent.channels, silent.preprocessing) == (None, None)


def test_every_operator_of_the_list_exists_and_has_no_subgraph() -> None:
    schemas = {each.name: each for each in onnx.defs.get_all_schemas() if each.domain == ""}
    graphs = onnx.defs.OpSchema.AttrType.GRAPH

    assert schemas.keys() >= OPERATORS
    for name in OPERATORS:
        assert all(attribute.type != graphs for attribute in schemas[name].attributes.values()), name


def test_without_onnx_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)

    with pytest.raises(CompilerMissing, match=r"mlg\[onnx\]"):
        check_onnx_file(tmp_path / "any.onnx")
