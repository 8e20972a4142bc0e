"""Files that try to run code or to read local files are refused before Keras loads them."""

from __future__ import annotations

import os
import sys
import zipfile

import pytest

from provider_image.compiler import keras_file
from provider_image.compiler.custom import CustomModel, build
from provider_image.errors import UnsafeModelFile
from tests.custom_models import classifier, edit_keras_file, edit_weights, labels_file, save


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A saved classifier that is accepted."""
    return save(classifier(), tmp_path_factory.mktemp("intact") / "intact.keras")


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Try to install a file; returns why it was refused, and asserts that Keras did not load it."""

    def never(keras, checked):
        raise AssertionError("it was given to Keras")

    monkeypatch.setattr("provider_image.compiler.custom.load_checked", never)

    def refused(file):
        custom = CustomModel(name="pets", file=file, labels=labels_file(tmp_path, "cat", "dog", "parrot"))
        with pytest.raises(UnsafeModelFile) as caught:
            build(tmp_path / "models", custom)
        assert {path.name for path in (tmp_path / "models").iterdir()} == {".pets.lock"}
        return caught.value.reason

    return refused


def put(layer, at=1):
    """Put a layer into a Sequential's config."""
    return lambda config: config["config"]["layers"].insert(at, layer)


def described(module, name, config=None, **more):
    return {"module": module, "class_name": name, "config": config or {}, "registered_name": None, **more}


def dense(**config):
    """Change the config of the last layer."""
    return lambda whole: whole["config"]["layers"][-1]["config"].update(config)


LAMBDA = {"class_name": "__lambda__", "config": {"value": ["4wAAAA==", None, None]}}
#: What is refused, and a word of the reason.
CONFIGS = {
    "a Lambda layer": (put(described("keras.layers", "Lambda", {"function": LAMBDA})), "Lambda"),
    "a lambda as an activation": (dense(activation=LAMBDA), "Lambda"),
    "a lambda deep in a list": (dense(name=[[{"x": LAMBDA}]]), "Lambda"),
    "a module of this machine": (put(described("evil_module", "Layer")), "evil_module.Layer"),
    "a module as a function": (dense(activation=described("os", "function", "system")), "os"),
    "get_file as an activation": (
        dense(activation={**described("keras.utils", "function", "get_file"), "registered_name": "get_file"}),
        "get_file",
    ),
    "get_file as a class": (
        put(described("keras.utils", "get_file", {"fname": "x", "origin": "file:///"})),
        "get_file",
    ),
    "safe mode off": (
        put(described("keras.config", "enable_unsafe_deserialization")),
        "enable_unsafe_deserialization",
    ),
    "a builtin": (dense(activation=described("builtins", "function", "eval")), "eval"),
    "a vocabulary from a file": (
        put(described("keras.layers", "StringLookup", {"vocabulary": "/etc/passwd"})),
        "Lookup",
    ),
    "a vocabulary from an address": (
        put(described("keras.layers", "TextVectorization", {"vocabulary": "http://localhost/"})),
        "TextVectorization",
    ),
    "a SavedModel": (put(described("keras.layers", "TFSMLayer", {"filepath": "/tmp/evil"})), "TFSMLayer"),
    "a torch module": (put(described("keras.layers", "TorchModuleWrapper", {"module": "x"})), "TorchModuleWrapper"),
    "a jax function": (put(described("keras.layers", "JaxLayer")), "JaxLayer"),
    "a class by its private module": (
        put(described("keras.src.layers.core.lambda_layer", "Lambda", {"function": LAMBDA})),
        "Lambda",
    ),
    "an operation that calls": (put(described("keras.src.ops.core", "Map", {"function": LAMBDA})), "Map"),
    "a class registered by the user": (
        put({**described("keras.layers", "Dense", {"units": 1}), "registered_name": "evil>Dense"}),
        "evil>Dense",
    ),
    "a layer without a module, read by the old way": (
        put({"class_name": "Lambda", "config": {"function": LAMBDA}}),
        "Lambda",
    ),
    "a layer that is none": (put({"config": {}}), "does not list its layers"),
    "a type of tensorflow": (
        dense(dtype={"class_name": "__typespec__", "spec_name": "x", "module": "os", "config": []}),
        "__typespec__",
    ),
    "an array of objects": (
        dense(kernel_initializer={"class_name": "__numpy__", "config": {"value": [1], "dtype": "O"}}),
        "not numbers",
    ),
    "a quantised policy": (
        dense(dtype=described("keras.dtype_policies", "QuantizedDTypePolicy")),
        "QuantizedDTypePolicy",
    ),
    "an unknown dtype": (dense(dtype="/etc/passwd"), "unknown dtype"),
    "code in the build config": (
        lambda whole: whole["config"]["layers"][-1].update(build_config={"input_shape": LAMBDA}),
        "Lambda",
    ),
    "a module without a class": (dense(name={"module": "os", "config": {}}), "an incomplete serialized object"),
    "an object where a config belongs": (
        dense(**described("keras.layers", "Lambda")),
        "an incomplete serialized object",
    ),
    "wiring of Keras 2": (
        lambda whole: whole["config"]["layers"][-1].update(inbound_nodes=[["input", 0, 0, LAMBDA]]),
        "Keras 2",
    ),
    "an own model class": (lambda whole: {**whole, "class_name": "Evil", "module": "evil_module"}, "Functional"),
    "a subclass of Model": (lambda whole: {**whole, "class_name": "Model", "module": "keras"}, "a custom model class"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_with_anything_but_layers_is_refused(intact, refused, tmp_path, monkeypatch, case):
    edit, reason = CONFIGS[case]
    # Whatever imports this module leaves a trace.
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Layer: pass\n")
    monkeypatch.syspath_prepend(tmp_path)

    reply = refused(edit_keras_file(intact, tmp_path / "evil.keras", edit))

    assert reason in reply and reply.startswith("evil.keras is refused.")
    assert not (tmp_path / "ran").exists() and "evil_module" not in sys.modules


def test_training_settings_are_dropped_unread(intact, tmp_path):
    loss = described("evil_module", "Loss")
    file = edit_keras_file(
        intact, tmp_path / "trained.keras", lambda whole: whole.update(compile_config={"loss": loss})
    )
    (tmp_path / "private").mkdir()

    checked = keras_file.check_keras_file(file, tmp_path / "private")

    with zipfile.ZipFile(checked.copy) as archive:
        assert b"evil_module" not in archive.read("config.json")
        assert sorted(archive.namelist()) == ["config.json", "metadata.json", "model.weights.h5"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (b"[" * 5000 + b"]" * 5000, "cannot be read"),
        (b'{"class_name": "Sequential"', "cannot be read"),
        (b"[]", "does not describe"),
    ],
)
def test_invalid_config_is_refused(intact, refused, tmp_path, config, reason):
    file = edit_keras_file(intact, tmp_path / "evil.keras", lambda whole: None, config__json=config)

    assert reason in refused(file)


def test_config_that_is_too_deep_is_refused(intact, refused, tmp_path):
    nested: list = []
    for _ in range(100):
        nested = [nested]

    assert "too deep" in refused(edit_keras_file(intact, tmp_path / "evil.keras", dense(name=nested)))


def test_archive_with_other_members_is_refused(intact, refused, tmp_path):
    for number, name in enumerate(("assets/vocabulary.txt", "../evil.py", "model.weights.npz")):
        file = edit_keras_file(intact, tmp_path / f"evil-{number}.keras", lambda whole: None, **{name: b"x"})

        assert name in refused(file)


def test_archive_with_a_member_twice_or_missing_is_refused(intact, refused, tmp_path):
    twice, missing = tmp_path / "twice.keras", tmp_path / "missing.keras"
    with zipfile.ZipFile(intact) as archive, zipfile.ZipFile(missing, "w") as other:
        other.writestr("config.json", archive.read("config.json"))
    twice.write_bytes(intact.read_bytes())
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(twice, "a") as archive:
        archive.writestr("config.json", b"{}")

    assert "each once" in refused(twice)
    assert "each once" in refused(missing)


def test_archive_that_unpacks_to_much_more_is_refused(intact, refused, tmp_path):
    bomb = tmp_path / "bomb.keras"
    with zipfile.ZipFile(intact) as archive, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as other:
        for name in archive.namelist():
            other.writestr(name, bytes(8_000_000) if name == "config.json" else archive.read(name))

    assert "would unpack to 8000000 bytes" in refused(bomb)


def test_archive_that_is_cut_short_is_refused(intact, refused, tmp_path):
    cut = tmp_path / "cut.keras"
    cut.write_bytes(intact.read_bytes()[:-3000])

    assert "not a valid .keras file" in refused(cut)


def _external_link(file):
    import h5py

    del file["layers/dense/vars/0"]
    file["layers/dense/vars/0"] = h5py.ExternalLink(file.attrs["secret"], "/kernel")


def _soft_link(file):
    import h5py

    file["layers/dense/vars/7"] = h5py.SoftLink("/layers")


def _external_storage(file):
    del file["layers/dense/vars/0"]
    file.create_dataset("layers/dense/vars/0", (8, 3), "f4", external=[(file.attrs["secret"], 0, 96)])


def _virtual(file):
    import h5py

    layout = h5py.VirtualLayout((8, 3), "f4")
    layout[:] = h5py.VirtualSource(file.attrs["secret"], "kernel", (8, 3))
    del file["layers/dense/vars/0"]
    file.create_virtual_dataset("layers/dense/vars/0", layout)


def _cycle(file):
    file["layers/dense/again"] = file["layers"]


def _bomb(file):
    file.create_dataset("layers/bomb", (1 << 30,), "f4", chunks=(1 << 20,), compression="gzip", fillvalue=1.0)


def _text(file):
    file["layers/text"] = "text"


def _type(file):
    import numpy as np

    file["layers/type"] = np.dtype("f8")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (_external_link, "another file"),
        (_soft_link, "another file or place"),
        (_external_storage, "from another file"),
        (_virtual, "from another file"),
        (_cycle, "twice"),
        (_bomb, "would unpack"),
        (_text, "something other than numbers"),
        (_type, "something other than numbers"),
    ],
)
def test_weights_that_refer_elsewhere_are_refused_and_nothing_is_read(intact, refused, tmp_path, edit, reason):
    import h5py
    import numpy as np

    # A pipe that nobody writes to: opening it would wait for ever.
    secret = tmp_path / "secret.h5"
    if edit is _external_link:
        os.mkfifo(secret)
    else:
        with h5py.File(secret, "w") as file:
            file["kernel"] = np.ones((8, 3), "f4")

    def manipulate(file):
        file.attrs["secret"] = str(secret)
        edit(file)

    assert reason in refused(edit_weights(intact, tmp_path / "evil.keras", manipulate))


def test_damaged_weights_are_refused(intact, refused, tmp_path):
    file = edit_keras_file(intact, tmp_path / "evil.keras", lambda whole: None, model__weights__h5=b"noise")

    assert "is damaged" in refused(file)


def test_weights_of_another_shape_are_reported_with_the_message_of_keras(intact, tmp_path):
    from provider_image.errors import UnsuitableModel

    file = edit_keras_file(intact, tmp_path / "odd.keras", dense(units=5))
    custom = CustomModel(name="pets", file=file, labels=labels_file(tmp_path, *"abcde"))

    with pytest.raises(UnsuitableModel, match=r"Keras .* cannot load odd\.keras"):
        build(tmp_path / "models", custom)
