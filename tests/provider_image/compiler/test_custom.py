"""Custom models are installed with the same results as in Keras, and refused if they are not supported."""

from __future__ import annotations

import importlib

import pytest

from provider_image.backends import Device
from provider_image.chunk import ChunkItem, write_chunk
from provider_image.compiler import embedding
from provider_image.compiler.custom import CustomModel, build
from provider_image.compiler.keras_graph import import_keras, preprocess
from provider_image.compiler.labels import MAX_LABELS, read_labels
from provider_image.errors import ConfigError, UnsafeModelFile, UnsuitableModel, WeightsMissing
from provider_image.images.decoding import decode
from provider_image.precision import TOLERANCE
from provider_image.runtime import NetCache, run_chunk
from provider_image.service import Output
from provider_image.services.classification import Classification
from tests.custom_models import SIDE, classifier, labels_file, save

PETS = ("cat", "dog", "parrot")


@pytest.fixture(scope="module")
def keras():
    return import_keras()


@pytest.fixture
def install(tmp_path):
    """Save a network and install it; returns the artefact."""

    def install(network, labels=PETS, name="pets", **facts):
        file = save(network, tmp_path / f"{name}.keras")
        custom = CustomModel(name=name, file=file, labels=labels_file(tmp_path, *labels), **facts)
        return build(tmp_path / "models", custom)

    return install


def answers(artefact, photos, tmp_path):
    """Run photos through the runtime as a provider does, and return each one's probabilities by label."""
    chunk = tmp_path / "chunk.zip"
    items = [ChunkItem(number=number, inputs={"image": photo}) for number, photo in enumerate(photos)]
    write_chunk(chunk, "chunk-1", "classification", artefact.name, artefact.digest, items)
    results = run_chunk(chunk, tmp_path / "results.zip", NetCache(artefact.folder.parent, Device(threads=1)))
    for item in results.items:
        assert item.error is None
        Classification().check_output(artefact, {}, Output(data=item.output))
    return [{name: probability for _, name, probability in item.output} for item in results.items]


def keras_results(network, artefact, photos):
    """Return the results of Keras."""
    import numpy as np

    images = [decode(photo, artefact.height, artefact.width, artefact.crop) for photo in photos]
    inputs = [np.asarray(preprocess(each.astype(np.float32), artefact.preprocessing), np.float32) for each in images]
    return np.concatenate([np.asarray(network(each[None], training=False)) for each in inputs])


def close(found, labels, right):
    return found == pytest.approx(dict(zip(labels, right.tolist(), strict=True)), abs=1e-4)


def test_sequential_with_softmax_answers_as_keras_does(install, photos, tmp_path):
    network = classifier()

    artefact = install(network, title="My pets")

    right = keras_results(network, artefact, photos.values())
    assert (artefact.title, artefact.source, artefact.height) == ("My pets", "own", SIDE)
    assert {path.name for path in artefact.folder.iterdir()} == {
        "model.json",
        *artefact.files,
        *(sample.file for sample in artefact.samples),
    }
    assert right.max(axis=1).max() < 0.999
    for found, each in zip(answers(artefact, photos.values(), tmp_path), right, strict=True):
        assert close(found, PETS, each)


def test_functional_with_operations_between_layers_and_a_network_in_it_answers_as_keras_does(
    keras, install, photos, tmp_path
):
    layers = keras.layers
    image = keras.Input((SIDE, SIDE, 3))
    inner = keras.Sequential(
        [layers.Conv2D(6, 3), layers.LayerNormalization(), layers.Activation("gelu")], name="inner"
    )
    x = keras.applications.resnet.preprocess_input(image) / 128.0
    x = inner(layers.RandomRotation(0.2)(x))
    x = layers.Concatenate()([keras.ops.mean(x, axis=(1, 2)), layers.GlobalMaxPooling2D()(x)])
    network = keras.Model(image, layers.Softmax()(layers.Dense(3)(layers.Dropout(0.5)(x))))
    network.compile("adam", "categorical_crossentropy", metrics=["accuracy"])

    artefact = install(network)

    right = keras_results(network, artefact, photos.values())
    for found, each in zip(answers(artefact, photos.values(), tmp_path), right, strict=True):
        assert close(found, PETS, each)


@pytest.mark.parametrize(("activation", "classes"), [("softmax", 3), (None, 3), ("sigmoid", 1)])
def test_embedding_of_a_custom_model_is_what_its_last_layer_takes(keras, install, activation, classes):
    import numpy as np

    network = classifier(activation, classes)
    custom = install(network, PETS if classes == 3 else ("no", "yes"), title="My pets")

    artefact = embedding.build(custom.folder.parent, "pets")

    assert (artefact.name, artefact.title, artefact.source) == ("pets_embedding", "My pets embedding", "own")
    assert artefact.dimensions == network.layers[-1].kernel.shape[0]
    inner = keras.Model(network.inputs[0], network.layers[-1].input)
    for sample in artefact.samples:
        right = keras_results(inner, artefact, [(artefact.folder / sample.file).read_bytes()])[0]
        recorded = np.fromfile(artefact.folder / sample.files["vector"][0], "<f4")
        assert np.linalg.norm(recorded - right / np.linalg.norm(right)) <= TOLERANCE


def test_model_that_does_not_end_in_a_matrix_product_has_no_embedding(keras, install):
    layers = keras.layers
    network = keras.Sequential(
        [keras.Input((SIDE, SIDE, 3)), layers.Conv2D(3, 3), layers.GlobalAveragePooling2D(), layers.Softmax()]
    )
    custom = install(network)

    with pytest.raises(UnsuitableModel, match="The last layer of pets is no matrix product"):
        embedding.build(custom.folder.parent, "pets")
    assert not (custom.folder.parent / "pets_embedding").exists()


def test_name_of_an_embedding_is_refused(tmp_path):
    custom = CustomModel(name="cats_embedding", file=tmp_path / "cats.keras", labels=labels_file(tmp_path, *PETS))

    with pytest.raises(ConfigError, match="that of an embedding"):
        build(tmp_path / "models", custom)


def test_logits_become_probabilities(install, photos, tmp_path):
    network = classifier(None)

    artefact = install(network)

    right = importlib.import_module("scipy.special").softmax(keras_results(network, artefact, photos.values()), axis=1)
    for found, each in zip(answers(artefact, photos.values(), tmp_path), right, strict=True):
        assert close(found, PETS, each)


def test_one_sigmoid_becomes_two_classes(install, photos, tmp_path):
    network = classifier("sigmoid", 1)

    artefact = install(network, ("0\tnot a cat", "1\tcat"))

    right = keras_results(network, artefact, photos.values())[:, 0]
    assert artefact.labels == (("0", "not a cat"), ("1", "cat"))
    for found, each in zip(answers(artefact, photos.values(), tmp_path), right, strict=True):
        assert found == pytest.approx({"cat": each, "not a cat": 1 - each}, abs=1e-4)


@pytest.mark.parametrize("preprocessing", ["unit", "tf", "torch", "caffe"])
def test_preprocessing_is_folded_into_the_graph(keras, install, photos, tmp_path, preprocessing):
    keras.utils.set_random_seed(5)
    layers = keras.layers
    network = keras.Sequential(
        [
            keras.Input((20, 30, 3)),
            layers.Conv2D(4, 3),
            layers.Flatten(),
            layers.Dense(3, kernel_initializer=keras.initializers.RandomNormal(stddev=1e-3)),
        ]
    )

    artefact = install(network, preprocessing=preprocessing)

    logits = keras_results(network, artefact, photos.values())
    right = importlib.import_module("scipy.special").softmax(logits, axis=1)
    assert (artefact.height, artefact.width) == (20, 30)
    for found, each in zip(answers(artefact, photos.values(), tmp_path), right, strict=True):
        assert close(found, PETS, each)


def test_mixed_precision_is_computed_in_f32(install, photos, tmp_path):
    artefact = install(classifier(dtype="mixed_float16"))

    right = keras_results(classifier(), artefact, photos.values())
    for found, each in zip(answers(artefact, photos.values(), tmp_path), right, strict=True):
        assert close(found, PETS, each)


def test_size_is_required_for_a_model_without_a_fixed_size(install):
    with pytest.raises(UnsuitableModel, match="--size HxW"):
        install(classifier(side=None))

    artefact = install(classifier(side=None), size=(24, 40))

    assert (artefact.height, artefact.width) == (24, 40)
    with pytest.raises(ConfigError, match="Omit --size"):
        install(classifier(), size=(24, 40))


def test_same_file_gives_the_same_digest_and_other_labels_another(install, tmp_path):
    first = install(classifier())
    file = tmp_path / "pets.keras"
    again = build(tmp_path / "models", CustomModel(name="pets", file=file, labels=labels_file(tmp_path, *PETS)))
    other = build(tmp_path / "models", CustomModel(name="pets", file=file, labels=labels_file(tmp_path, "a", "b", "c")))

    assert first.digest == again.digest != other.digest
    left = {path.name for path in (tmp_path / "models").iterdir()}
    assert left == {"pets", ".pets.lock"}
    assert "checked.keras" not in {path.name for path in other.folder.iterdir()}


@pytest.mark.parametrize(
    ("make", "labels", "reason"),
    [
        (lambda keras: classifier("sigmoid"), PETS, "several may be right at once"),
        (lambda keras: classifier("relu"), PETS, "ends in relu"),
        (lambda keras: classifier("softmax", 4), PETS, "4 classes and the file 3 labels"),
        (lambda keras: classifier(None, 1), ("no", "yes"), "Only a sigmoid"),
        (lambda keras: classifier("sigmoid", 1), PETS, "Give two"),
        (lambda keras: keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten()]), PETS, "RGB"),
        (
            lambda keras: keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(3, 1)]),
            PETS,
            r"\(None, classes\)",
        ),
        (lambda keras: _two_inputs(keras), PETS, "2 inputs"),
        (lambda keras: _two_outputs(keras), PETS, "2 outputs"),
    ],
)
def test_model_that_is_not_a_classifier_of_one_image_is_refused(keras, install, tmp_path, make, labels, reason):
    with pytest.raises(UnsuitableModel, match=reason):
        install(make(keras), labels)

    assert not (tmp_path / "models" / "pets").exists()


def _two_inputs(keras):
    one, other = keras.Input((8, 8, 3)), keras.Input((8, 8, 3))
    return keras.Model([one, other], keras.layers.Dense(3)(keras.layers.Flatten()(one + other)))


def _two_outputs(keras):
    one = keras.Input((8, 8, 3))
    flat = keras.layers.Flatten()(one)
    return keras.Model(one, [keras.layers.Dense(3)(flat), keras.layers.Dense(3)(flat)])


@pytest.mark.parametrize("name", ["Pets", "my-pets", "../pets", "", "x" * 65, "resnet50", "res_net_50", "lite0"])
def test_invalid_or_taken_name_is_refused(tmp_path, name):
    with pytest.raises(ConfigError):
        build(tmp_path, CustomModel(name=name, file=tmp_path / "x.keras", labels=tmp_path / "x.txt"))


def test_name_of_another_custom_model_in_another_spelling_is_refused(install):
    install(classifier(), name="my_pets")

    with pytest.raises(ConfigError, match="my_pets"):
        install(classifier(), name="mypets")


def test_older_formats_are_refused_with_a_remedy(keras, tmp_path):
    (tmp_path / "saved_model").mkdir()
    (tmp_path / "old.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    (tmp_path / "noise.keras").write_bytes(b"noise")

    for file in ("saved_model", "old.h5", "noise.keras"):
        with pytest.raises(UnsafeModelFile, match=r'model.save\("model.keras"\)'):
            build(tmp_path, CustomModel(name="pets", file=tmp_path / file, labels=labels_file(tmp_path, *PETS)))
    with pytest.raises(WeightsMissing, match=r"nowhere\.keras"):
        build(tmp_path, CustomModel(name="pets", file=tmp_path / "nowhere.keras", labels=labels_file(tmp_path, *PETS)))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("cat\ndog\ncat\n", "Line 3 .* repeats"),
        ("1\tcat\n1\tdog\n", "Line 2 .* repeats"),
        ("cat\n\ndog\n", "Line 2"),
        ("cat\nd\x07og\n", "Line 2"),
        ("cat\n\u202edog\n", "Line 2"),
        ("cat \ndog\n", "Line 1"),
        ("1\tcat\tpet\n", "Line 1"),
        ("x" * 101, "Line 1"),
        ("", "has 0 lines"),
        ("\n".join(map(str, range(MAX_LABELS + 1))), "20001 lines"),
    ],
)
def test_ambiguous_or_unprintable_labels_are_refused(tmp_path, text, reason):
    (tmp_path / "labels").write_text(text)

    with pytest.raises(UnsuitableModel, match=reason):
        read_labels(tmp_path / "labels")


def test_labels_are_names_or_ids_with_names(tmp_path):
    (tmp_path / "labels").write_bytes("\ufeffn1\tcrane\r\nn2\tcrane\r\nMöwe".encode())

    assert read_labels(tmp_path / "labels") == (("n1", "crane"), ("n2", "crane"), ("Möwe", "Möwe"))
    (tmp_path / "labels").write_bytes(b"caf\xe9\n")
    with pytest.raises(UnsuitableModel, match="UTF-8"):
        read_labels(tmp_path / "labels")
