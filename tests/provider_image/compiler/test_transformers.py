"""Vision transformers are installed with right answers, and only from folders that describe them."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from provider_image.backends import Device
from provider_image.backends.openvino import load_net
from provider_image.compiler import embedding
from provider_image.compiler.custom import CustomModel
from provider_image.compiler.keras_graph import preprocess
from provider_image.compiler.labels import imagenet_labels
from provider_image.compiler.transformers.builder import build, build_custom
from provider_image.compiler.transformers.folder import read_description, read_preprocessing
from provider_image.compiler.transformers.network import numpy_probabilities
from provider_image.compiler.transformers.safetensors_file import Weights
from provider_image.errors import ConfigError, NotInstalled, UnsuitableModel, WeightsMismatch, WeightsMissing
from provider_image.images.decoding import decode
from provider_image.models.artefact import find_artefact
from provider_image.models.catalogue import CATALOGUE, Transformer
from tests.keras_hub_networks import INSTALL, keras_hub_network
from tests.transformer_folders import (
    SMALL,
    catalogue_config,
    config_of,
    read_tensors,
    safetensors_of,
    seeded_tensors,
    write_folder,
)

BIRDS = ["owl", "heron, grey", "wren", "kite", "rook"]
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
TWO_HEADS = ("cls_classifier", "distillation_classifier")
#: Name -> (model_type, last layers, preprocessor_config.json, preprocessing).
KINDS = {
    "vit": ("vit", ("classifier",), HALF, "tf"),
    "deit": ("deit", ("classifier",), IMAGENET, "torch"),
    "distilled": ("deit", TWO_HEADS, IMAGENET, "torch"),
    "beit": ("beit", ("classifier",), {"do_normalize": False}, "unit"),
}
ROW = replace(
    CATALOGUE["vit_base_patch16_224"],
    height=SMALL["image_size"],
    width=SMALL["image_size"],
    features=SMALL["hidden_size"],
    transformer=Transformer(repository="google/small", model_types=("vit",), hidden_size=32, layers=2),
)


def description_and_tensors(kind):
    model_type, heads, preprocessor, preprocessing = KINDS[kind]
    config = config_of(model_type, BIRDS)
    return config, seeded_tensors(config, heads), preprocessor, preprocessing


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A models folder with one model of each kind."""
    folder = tmp_path_factory.mktemp("transformers")
    for kind in KINDS:
        config, tensors, preprocessor, _ = description_and_tensors(kind)
        written = write_folder(folder / "given" / kind, config, tensors, preprocessor)
        build_custom(folder / "models", custom(written, f"my_{kind}"))
    return folder / "models"


def custom(folder, name="my_birds", **facts):
    return CustomModel(name=name, file=folder, kind="huggingface", labels=None, **facts)


def images(count=3):
    side = SMALL["image_size"]
    return list(np.random.default_rng(5).integers(0, 256, (count, side, side, 3), np.uint8))


def plain_probabilities(config, tensors, pixels):
    """The network token by token and head by head, from the papers. :param pixels: preprocessed (side, side, 3)."""
    tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    kind, size, heads = config["model_type"], config["hidden_size"], config["num_attention_heads"]
    patch, side = config["patch_size"], config["image_size"] // config["patch_size"]
    width = size // heads

    def linear(name, vector):
        return tensors[f"{name}.weight"] @ vector + tensors.get(f"{name}.bias", 0)

    def norm(name, vector):
        centred = vector - vector.mean()
        scaled = centred / math.sqrt((centred**2).mean() + config["layer_norm_eps"])
        return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def softmax(numbers):
        powers = [math.exp(number) for number in numbers]
        return [power / sum(powers) for power in powers]

    projection = f"{kind}.embeddings.patch_embeddings.projection"
    tokens = [tensors[f"{kind}.embeddings.cls_token"][0, 0]]
    if kind == "deit":
        tokens.append(tensors["deit.embeddings.distillation_token"][0, 0])
    places = [(row, column) for row in range(side) for column in range(side)]
    for row, column in places:
        square = pixels[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        value = np.einsum("yxc,ocyx->o", square, tensors[f"{projection}.weight"])
        tokens.append(value + tensors[f"{projection}.bias"])
    if kind != "beit":
        positions = tensors[f"{kind}.embeddings.position_embeddings"][0]
        tokens = [token + position for token, position in zip(tokens, positions, strict=True)]

    def bias_of(layer, head, query, key):
        if kind != "beit":
            return 0.0
        table = tensors[f"{layer}.attention.attention.relative_position_bias.relative_position_bias_table"]
        if query == 0 or key == 0:  # the last three rows: from the class token, to it, to itself
            return table[-1 if query == key else -3 if query == 0 else -2][head]
        (down, right), (other_down, other_right) = places[query - 1], places[key - 1]
        return table[(down - other_down + side - 1) * (2 * side - 1) + right - other_right + side - 1][head]

    for number in range(config["num_hidden_layers"]):
        layer = f"{kind}.encoder.layer.{number}"
        normed = [norm(f"{layer}.layernorm_before", token) for token in tokens]
        queries, keys, values = (
            [linear(f"{layer}.attention.attention.{part}", token) for token in normed]
            for part in ("query", "key", "value")
        )
        after = []
        for query in range(len(tokens)):
            joined = np.empty(size)
            for head in range(heads):
                part = slice(head * width, (head + 1) * width)
                scores = [
                    queries[query][part] @ keys[key][part] / math.sqrt(width) + bias_of(layer, head, query, key)
                    for key in range(len(tokens))
                ]
                joined[part] = sum(share * each[part] for share, each in zip(softmax(scores), values, strict=True))
            found = linear(f"{layer}.attention.output.dense", joined)
            token = tokens[query] + found * tensors.get(f"{layer}.lambda_1", 1)
            inner = linear(f"{layer}.intermediate.dense", norm(f"{layer}.layernorm_after", token))
            inner = np.array([x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in inner])
            after.append(token + linear(f"{layer}.output.dense", inner) * tensors.get(f"{layer}.lambda_2", 1))
        tokens = after
    if kind == "beit":
        return softmax(linear("classifier", norm("beit.pooler.layernorm", np.mean(tokens[1:], 0))))
    tokens = [norm(f"{kind}.layernorm", token) for token in tokens]
    if "classifier.weight" in tensors:
        return softmax(linear("classifier", tokens[0]))
    return softmax(np.mean([linear(head, token) for head, token in zip(TWO_HEADS, tokens, strict=False)], 0))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_a_plain_computation(models, kind):
    config, tensors, _, preprocessing = description_and_tensors(kind)
    artefact = find_artefact(models, f"my_{kind}")

    found = load_net(artefact, Device(threads=1)).infer(images())

    assert artefact.preprocessing == preprocessing
    for each, image in zip(found, images(), strict=True):
        expected = plain_probabilities(config, tensors, preprocess(image.astype(float), preprocessing))
        assert np.abs(each - expected).max() < 1e-5
        assert np.std(expected) > 0.01  # weights that would not matter would prove nothing


needs_keras_hub = pytest.mark.skipif(
    importlib.util.find_spec("keras_hub") is None, reason=f"needs keras-hub: {INSTALL}"
)


@needs_keras_hub
@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_answers_are_those_of_keras_hub(tmp_path, kind):
    config, tensors, _, preprocessing = description_and_tensors(kind)
    folder = write_folder(tmp_path, config, tensors)

    found = numpy_probabilities(
        Weights(folder / "model.safetensors"), read_description(folder / "config.json"), preprocessing, images()
    )

    expected = keras_hub_network(config, tensors)(preprocess(np.stack(images()).astype(np.float32), preprocessing))
    assert np.abs(np.stack(found) - np.asarray(expected)).max() < 1e-5


@needs_keras_hub
@pytest.mark.every_model
@pytest.mark.parametrize("name", ["vit_large_patch16_224"])
def test_a_large_graph_answers_as_keras_hub(tmp_path, name):
    row = CATALOGUE[name]
    config = catalogue_config(row)
    folder = write_folder(tmp_path / "given", config, seeded_tensors(config))
    pixels = list(np.random.default_rng(5).integers(0, 256, (3, row.height, row.width, 3), np.uint8))

    artefact = build(tmp_path / "models", row, folder, f16_within=0)
    found = load_net(artefact, Device()).infer(pixels)

    network = keras_hub_network(config, read_tensors(folder / "model.safetensors"))
    expected = np.asarray(network(preprocess(np.stack(pixels).astype(np.float32), row.preprocessing)))
    assert artefact.precision == "f32"
    assert np.abs(np.stack(found) - expected).max() < 1e-5
    assert expected.max() > 0.01  # equal probabilities would prove nothing


@pytest.mark.parametrize(("kind", "dimensions"), [("vit", 32), ("distilled", 64), ("beit", 32)])
def test_an_embedding_has_the_values_before_the_last_layer(models, kind, dimensions):
    artefact = embedding.build(models, f"my_{kind}")

    assert (artefact.name, artefact.dimensions) == (f"my_{kind}_embedding", dimensions)


def test_a_custom_model_has_the_names_of_its_folder_or_of_a_file(models, tmp_path):
    config, tensors, _, _ = description_and_tensors("vit")
    folder = write_folder(
        tmp_path / "given", config, tensors, HALF | {"do_center_crop": True, "size": 40} | {"crop_size": {"height": 32}}
    )
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\n")

    artefact = build_custom(tmp_path, replace(custom(folder), labels=tmp_path / "names.txt", title="My birds"))

    assert find_artefact(models, "my_vit").labels[1] == ("heron, grey", "heron, grey")
    assert find_artefact(models, "my_vit").crop is None
    assert (artefact.labels[1], artefact.title, artefact.crop, artefact.source) == (("b", "b"), "My birds", 0.8, "own")


def test_a_catalogue_row_is_built_once_and_again_on_request(tmp_path):
    config = config_of("vit")
    folder = write_folder(tmp_path / "given", config, seeded_tensors(config))
    steps = []

    first = build(tmp_path / "models", ROW, folder, on_step=steps.append)
    inode = first.folder.stat().st_ino
    kept = build(tmp_path / "models", ROW, folder)

    assert steps == ["reading weights", "converting", "comparing", "storing"]
    assert kept.folder.stat().st_ino == inode
    assert (first.labels, first.source, first.title) == (imagenet_labels(), "folder", ROW.title)
    assert build(tmp_path / "models", ROW, folder, again=True).digest == first.digest
    assert first.folder.stat().st_ino != inode


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, "3 layers"),
        ({"model_type": "deit"}, "describes a deit"),
        ({"id2label": {"0": "cat", "1": "dog"}}, r"2 classes, 0 of them as expected.*--huggingface FOLDER"),
        ({"id2label": {str(n): name for n, (_, name) in enumerate(reversed(imagenet_labels()))}}, "usual order"),
    ],
)
def test_another_network_than_the_row_s_is_refused(tmp_path, changes, words):
    config = config_of("vit") | changes
    folder = write_folder(tmp_path / "given", config, {})

    with pytest.raises(WeightsMismatch, match=words):
        build(tmp_path / "models", ROW, folder)

    assert not (tmp_path / "models").exists()


def test_the_distilled_row_needs_both_last_layers(tmp_path):
    row = replace(ROW, features=64, transformer=replace(ROW.transformer, model_types=("deit",)))
    config = config_of("deit")
    folder = write_folder(tmp_path / "given", config, seeded_tensors(config))

    with pytest.raises(WeightsMismatch, match="has one last layer, unlike ViT-B/16"):
        build(tmp_path / "models", row, folder)


def test_a_missing_tensor_is_named(tmp_path):
    config = config_of("vit", BIRDS)
    tensors = seeded_tensors(config)
    del tensors["vit.encoder.layer.1.attention.attention.key.bias"]
    folder = write_folder(tmp_path / "given", config, tensors, HALF)

    with pytest.raises(WeightsMismatch, match=r"layer\.1\.attention\.attention\.key\.bias of shape \(32,\)"):
        build_custom(tmp_path / "models", custom(folder))

    with pytest.raises(NotInstalled):
        find_artefact(tmp_path / "models", "my_birds")


def test_missing_files_are_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")

    with pytest.raises(WeightsMissing, match=r"There is no .*model\.safetensors.*save_pretrained"):
        build(tmp_path / "models", ROW, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "swin"}, "type 'swin'. Supported are vit, deit, beit"),
        ({"hidden_act": "gelu_new"}, "gelu_new for hidden_act"),
        ({"qkv_bias": False}, "False for qkv_bias"),
        ({"model_type": "beit", "use_mean_pooling": False}, "use_mean_pooling"),
        ({"hidden_size": 33}, "multiple of num_attention_heads"),
        ({"hidden_size": 10**9}, "from 1 to 8192"),
        ({"num_hidden_layers": "12"}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"image_size": 2048, "patch_size": 1}, "4096 patches"),
        ({"image_size": 4, "patch_size": 8}, "1 to 4096 patches"),
        ({"layer_norm_eps": math.nan}, "layer_norm_eps"),
        ({"problem_type": "multi_label_classification"}, "Only one class per image"),
        ({"id2label": {"0": "cat"}}, "1 classes"),
        ({"id2label": {"0": "cat", "2": "dog"}}, "KeyError"),
        ({"id2label": ["cat", "dog"]}, "TypeError"),
    ],
)
def test_descriptions_that_are_not_supported_are_refused(tmp_path, changes, words):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_of("vit", BIRDS) | changes))

    with pytest.raises(UnsuitableModel, match=words):
        read_description(path)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"id2label": 1}', "\xff"])
def test_what_is_no_description_is_refused(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)

    with pytest.raises(UnsuitableModel, match="not what Hugging Face's library writes"):
        read_description(path)


@pytest.mark.parametrize(
    ("names", "words"),
    [(["a", "a"], "Class 1 in .* repeats the label 'a'"), (["a", "b\n"], "Class 1 in .* --labels FILE")],
)
def test_names_that_are_no_labels_are_refused(tmp_path, names, words):
    folder = write_folder(tmp_path / "given", config_of("vit", names), {}, HALF)

    with pytest.raises(UnsuitableModel, match=words):
        build_custom(tmp_path / "models", custom(folder))


def test_a_labels_file_has_a_line_for_each_class(tmp_path):
    folder = write_folder(tmp_path / "given", config_of("vit", BIRDS), {}, HALF)
    (tmp_path / "names.txt").write_text("a\nb\n")

    with pytest.raises(UnsuitableModel, match=r"5 classes and .*names\.txt 2 lines"):
        build_custom(tmp_path / "models", replace(custom(folder), labels=tmp_path / "names.txt"))


def test_the_name_of_a_catalogue_model_is_taken(tmp_path):
    with pytest.raises(ConfigError, match="beit_base is taken"):
        build_custom(tmp_path / "models", custom(tmp_path, "beit_base"))


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (HALF, ("tf", None)),
        (
            IMAGENET | {"size": {"height": 256, "width": 256}, "crop_size": 224, "do_center_crop": True},
            ("torch", 0.875),
        ),
        (IMAGENET | {"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": False}, ("torch", None)),
        ({"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "rescale_factor": 0.00392156862745098}, ("unit", None)),
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}, (None, None)),
    ],
)
def test_preprocessing_is_found_by_its_numbers(tmp_path, facts, expected):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(facts))

    assert read_preprocessing(path) == expected


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (None, "preprocessor_config.json cannot be read.*Add --preprocessing"),
        ({"image_mean": [0.1] * 3, "image_std": [1] * 3}, "no preprocessing that exists here"),
        (HALF | {"do_rescale": False}, "does not scale pixel values"),
        (HALF | {"do_center_crop": True, "size": 224, "crop_size": 256}, "cuts out more"),
        (HALF | {"do_center_crop": True, "size": 0, "crop_size": 256}, "ZeroDivisionError"),
        ({"image_mean": 0.5, "image_std": 0.5}, "TypeError"),
    ],
)
def test_preprocessing_that_is_unknown_is_refused(tmp_path, facts, words):
    folder = write_folder(tmp_path / "given", config_of("vit", BIRDS), {}, facts)

    with pytest.raises(UnsuitableModel, match=words):
        build_custom(tmp_path / "models", custom(folder))


def test_given_preprocessing_overrules_the_folder_s(tmp_path):
    config, tensors, _, _ = description_and_tensors("vit")
    folder = write_folder(tmp_path / "given", config, tensors)

    artefact = build_custom(tmp_path / "models", custom(folder, preprocessing="unit"))

    pixels = decode((artefact.folder / "selftest-0.jpg").read_bytes(), artefact.height, artefact.width, artefact.crop)
    expected = plain_probabilities(config, tensors, pixels / 255.0)
    assert max(share for _, _, share in artefact.samples[0].output) == pytest.approx(max(expected), abs=1e-5)


# The weights file


def test_half_precision_is_read_as_f32(tmp_path):
    values = {name: np.array([[1.5, -2.25], [0.125, 3.0]], np.float32) for name in ("F16", "BF16", "F32", "F64")}
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_of(values | {"I64": np.array([1])}, {name: name for name in ("I64", *values)}))

    weights = Weights(path)

    for name, value in values.items():
        found = weights.get(name, 2, 2)
        assert found.dtype == np.float32 and np.array_equal(found, value)
    assert "I64" not in weights


ONE = {"a": np.ones((2, 2), np.float32)}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        (10**12).to_bytes(8, "little") + b"{}",
        safetensors_of(ONE)[:-1],
        safetensors_of(ONE)[:40],
        (2).to_bytes(8, "little") + b"[]",
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        safetensors_of(ONE, b={"dtype": "F32", "shape": [2], "data_offsets": [12, 20]}),
        safetensors_of(ONE, b={"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}),
        safetensors_of(ONE, b={"dtype": "F32", "shape": [10**18, 10**18], "data_offsets": [0, 16]}),
        safetensors_of(ONE, b={"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}),
        safetensors_of(ONE, b={"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}),
        safetensors_of(ONE, b={"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}),
        safetensors_of(ONE, b=3),
        safetensors_of(ONE, **{"b" * 300: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
    ],
)
def test_damaged_weights_files_are_refused(tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)

    with pytest.raises(WeightsMismatch, match="not a valid safetensors file"):
        Weights(path)


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_of(ONE))

    with pytest.raises(WeightsMismatch, match=r"a of shape \(4,\); it has one of shape \(2, 2\)"):
        Weights(path).get("a", 4)
