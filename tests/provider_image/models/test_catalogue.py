"""The model catalogue: the right rows, found by any spelling."""

import pytest

from provider_image.compiler import can_build_now
from provider_image.errors import UnknownModel
from provider_image.models import catalogue
from provider_image.models.catalogue import CATALOGUE, find_model, install_command


def test_catalogue_has_the_sixteen_keras_models_the_starter_newer_ones_transformers_and_methods():
    names = {name for name, row in CATALOGUE.items() if row.base is None}

    assert names == {
        *[
            "densenet121",
            "densenet169",
            "densenet201",
            "resnet50",
            "resnet101",
            "resnet152",
            "resnet50v2",
            "resnet101v2",
            "resnet152v2",
        ],
        *[
            "vgg16",
            "vgg19",
            "nasnet_large",
            "nasnet_mobile",
            "xception",
            "inception_v3",
            "inception_resnet_v2",
            "efficientnet_lite0",
        ],
        *["mobilenet_v2", "efficientnetv2_b0", "convnext_tiny"],
        *["vit_base_patch16_224", "vit_large_patch16_224", "deit_base", "deit_base_distilled", "beit_base"],
        *["denoise", "quality", "texture", "style_vgg19"],
        "crop",
        "face_crop",
        "face_detector",
        "face_pictures",
        "face_quality",
    }


def test_every_classifier_has_an_embedding_that_takes_what_it_takes():
    embeddings = {row.base: row for row in CATALOGUE.values() if row.base is not None}
    classifiers = [row.name for row in CATALOGUE.values() if row.features]

    assert list(embeddings) == classifiers
    for name, row in embeddings.items():
        model = CATALOGUE[name]
        assert (row.name, row.service, row.dimensions) == (f"{name}_embedding", "embedding", model.features)
        assert model.features >= 768 and model.dimensions == row.features == 0
        for fact in ("height", "width", "preprocessing", "crop", "source"):
            assert getattr(row, fact) == getattr(model, fact)


@pytest.mark.parametrize(
    ("name", "side", "preprocessing"),
    [  # keras.applications: default input shapes, and the mode that each module's preprocess_input passes on
        ("densenet201", 224, "torch"),
        ("resnet152", 224, "caffe"),
        ("vgg19", 224, "caffe"),
        ("resnet50v2", 224, "tf"),
        ("nasnet_large", 331, "tf"),
        ("nasnet_mobile", 224, "tf"),
        ("xception", 299, "tf"),
        ("inception_v3", 299, "tf"),
        ("inception_resnet_v2", 299, "tf"),
    ],
)
def test_row_has_the_size_and_preprocessing_of_keras(name, side, preprocessing):
    row = CATALOGUE[name]

    assert (row.height, row.width, row.preprocessing, row.crop, row.source) == (
        side,
        side,
        preprocessing,
        None,
        "keras",
    )


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("DenseNet121", "densenet121"),
        ("NASNet_large", "nasnet_large"),
        ("NASNetLarge", "nasnet_large"),
        ("XCeption", "xception"),
        ("ResNet50V2", "resnet50v2"),
        ("resnet-50-v2", "resnet50v2"),
        ("Inception v3", "inception_v3"),
        ("EfficientNet-Lite0", "efficientnet_lite0"),
        ("lite0", "efficientnet_lite0"),
        ("lite0_embedding", "efficientnet_lite0_embedding"),
        ("ResNet-50 embedding", "resnet50_embedding"),
    ],
)
def test_model_is_found_by_any_spelling(spelling, name):
    assert find_model(spelling).name == name


def test_no_two_models_share_a_spelling():
    spellings = [
        {catalogue.normalise_name(name) for name in (row.name, row.title, *row.aliases)} for row in CATALOGUE.values()
    ]

    assert sum(map(len, spellings)) == len(set().union(*spellings))


def test_unknown_model_names_the_nearest():
    with pytest.raises(UnknownModel, match=r"Did you mean densenet121\? .*mlg models"):
        find_model("densnet121")


def test_unknown_model_that_resembles_none_names_none():
    with pytest.raises(UnknownModel) as caught:
        find_model("../" * 1000)

    assert "Did you mean" not in caught.value.reason
    assert len(caught.value.reason) < 200


def test_install_command_names_the_model():
    assert install_command("vgg16") == "mlg models compile vgg16"
    assert install_command("vgg16_embedding") == "mlg models compile vgg16_embedding"
    assert install_command("my_pets_embedding") == "mlg models compile my_pets_embedding"
    for name in ("beit_base", "beit_base_embedding"):
        assert install_command(name) == f"mlg models compile {name} --weights FOLDER"


def test_every_row_has_what_builds_it():
    for row in CATALOGUE.values():
        if row.base is None:
            needed = {
                "keras": row.keras_class and row.weights,
                "folder": row.transformer,
                "wheel": row.name,
                "method": can_build_now(row),
            }
            assert needed[row.source], row.name
            assert (row.transformer is not None) == (row.source == "folder")
            if row.transformer is not None:
                assert row.features in (row.transformer.hidden_size, 2 * row.transformer.hidden_size)
                assert set(row.transformer.model_types) <= {"vit", "deit", "beit"}
