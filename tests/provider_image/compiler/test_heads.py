"""A backbone with a head as one artefact: it answers as numpy does with the same features."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from provider_image.backends import Device
from provider_image.backends.openvino import load_net
from provider_image.check import check_model
from provider_image.compiler.heads import Head, TrainedModel, build
from provider_image.compiler.self_test import self_test_images
from provider_image.errors import ConfigError, NotInstalled, UnsuitableModel
from provider_image.images.decoding import decode
from provider_image.models.artefact import Artefact, compute_digest, find_artefact, read_artefact
from provider_image.models.registry import find_row
from provider_image.service import check_params
from provider_image.services import load_service
from tests.trained_models import BACKBONE
from trainer.heads import fit_classifier, fit_regression


@pytest.fixture(scope="module")
def faces() -> list[bytes]:
    """Ten faces and ten images without one, from scikit-image's wheel."""
    import skimage.data

    found = []
    for pixels in skimage.data.lfw_subset()[[*range(10), *range(100, 110)]]:
        file = io.BytesIO()
        Image.fromarray(np.rint(pixels * 255).astype(np.uint8)).save(file, "PNG")
        found.append(file.getvalue())
    return found


@pytest.fixture(scope="module")
def backbone(embedding_models_folder: Path) -> Artefact:
    return find_artefact(embedding_models_folder, BACKBONE)


@pytest.fixture(scope="module")
def features(backbone: Artefact, faces: list[bytes]) -> np.ndarray:
    net = load_net(backbone, Device(threads=1))
    return np.stack(net.infer([decode(each, 224, 224, backbone.crop) for each in faces]))


@pytest.fixture(scope="module")
def models(embedding_models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / BACKBONE).symlink_to(embedding_models_folder / BACKBONE)
    return folder


LABELS = ["face"] * 10 + ["no face"] * 10
RATINGS = [1000.0 * number for number in range(20)]


def heads(features: np.ndarray) -> dict[str, Head]:
    """Every kind of head."""
    three = [*LABELS[:14], *["third"] * 6]
    return {
        "two_classes": fit_classifier(features, LABELS, range(20)),
        "three_neighbours": fit_classifier(features, three, range(20)),
        "ratings": fit_regression(features, RATINGS, range(20)),
    }


@pytest.fixture(scope="module")
def trained(features: np.ndarray, faces: list[bytes], backbone: Artefact) -> dict[str, TrainedModel]:
    return {
        name: TrainedModel(
            name=name,
            title="My model",
            backbone=BACKBONE,
            backbone_digest=backbone.digest,
            head=head,
            training_digest="1" * 64,
            unknown_below=0.6 if head.classes else 0.0,
        )
        for name, head in heads(features).items()
    }


@pytest.fixture(scope="module", params=["two_classes", "three_neighbours", "ratings"])
def built(
    request: pytest.FixtureRequest, models: Path, trained: dict[str, TrainedModel]
) -> tuple[TrainedModel, Artefact]:
    model = trained[request.param]
    return model, build(models, model)


def answers(artefact: Artefact, images: list[bytes]) -> list[Any]:
    service = load_service(artefact.service)
    net, params = service.load(artefact, Device(threads=1)), check_params(service.params, {})
    items = [service.prepare(artefact, {"image": each}, params) for each in images]
    outputs = [service.run(net, [item], [params])[0] for item in items]
    for output in outputs:
        service.check_output(artefact, params, output)
    return [output.data for output in outputs]


def test_the_graph_answers_as_numpy_with_the_same_features(
    built: tuple[TrainedModel, Artefact], features: np.ndarray, faces: list[bytes]
) -> None:
    model, artefact = built
    expected = model.head.apply(features)

    found = answers(artefact, faces)

    for data, right in zip(found, expected, strict=True):
        if model.head.kind == "regression":
            assert data["value"] == pytest.approx(right, rel=1e-5, abs=0.1)
        else:
            shares = {name: share for _, name, share in data}
            # The answer has six decimals.
            assert [shares[name] for name in model.head.classes] == pytest.approx(right.tolist(), abs=1.6e-6)
            assert all(id == name for id, name, _ in data)


def test_the_artefact_is_like_any_other(built: tuple[TrainedModel, Artefact], models: Path) -> None:
    model, artefact = built

    report = check_model(artefact.folder, Device(threads=1), seconds=0.01)

    assert report.is_ok, report.problem
    assert len(report.pictures) == 6
    row = find_row(models, model.name.upper())
    assert (row.service, row.source, row.title) == (model.head.kind, "own", "My model")
    assert (row.height, row.width, row.crop) == (224, 224, 0.875)
    assert artefact.precision == "f32"
    assert artefact.labels == tuple((name, name) for name in model.head.classes)
    assert read_artefact(artefact.folder) == artefact


def test_where_it_comes_from_is_recorded_and_part_of_the_digest(
    built: tuple[TrainedModel, Artefact], backbone: Artefact
) -> None:
    model, artefact = built
    assert artefact.provenance is not None

    retrained = replace(artefact, provenance=replace(artefact.provenance, training_digest="2" * 64))
    stricter = replace(artefact, unknown_below=0.7)

    assert (artefact.provenance.backbone, artefact.provenance.backbone_digest) == (BACKBONE, backbone.digest)
    assert artefact.provenance.training_digest == "1" * 64
    assert artefact.provenance.method == model.head.method
    assert artefact.unknown_below == model.unknown_below
    assert compute_digest(artefact) == artefact.digest
    assert len({artefact.digest, compute_digest(retrained), compute_digest(stricter)}) == 3


def test_a_number_that_large_terms_leave_is_compared_with_the_largest_answer(
    models: Path, trained: dict[str, TrainedModel], backbone: Artefact, faces: list[bytes]
) -> None:
    # Terms of a million; the bias makes the answer for the first image 0, which 32-bit floats miss by a tenth or so.
    small = decode(self_test_images()["selftest-0.jpg"], 224, 224, backbone.crop)
    first = np.stack(load_net(backbone, Device(threads=1)).infer([small])).astype(np.float64)
    weights = 1e6 * np.random.default_rng(0).normal(size=(1280, 1)).astype(np.float32)
    bias = -(first @ weights.astype(np.float64))[0].astype(np.float32)
    head = Head(kind="regression", method="chosen", weights=weights, bias=bias)

    artefact = build(models, replace(trained["ratings"], name="profit", head=head))

    assert artefact.samples[0].output["value"] == pytest.approx(0, abs=1000)
    assert check_model(artefact.folder, Device(threads=1), seconds=0.01).is_ok


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"name": "Not A Name"}, ConfigError, "not a valid name"),
        ({"name": "resnet50"}, ConfigError, "taken by the model resnet50"),
        ({"title": "a\x1bb"}, ConfigError, "A title has"),
        ({"unknown_below": 1.0}, ConfigError, "threshold"),
        ({"backbone": "no_such_embedding"}, NotInstalled, "no_such_embedding"),
        ({"backbone_digest": "0" * 64}, UnsuitableModel, "was replaced since"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(
    models: Path, trained: dict[str, TrainedModel], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = sorted(models.iterdir())

    with pytest.raises(error, match=message):
        build(models, replace(trained["two_classes"], **{"name": "refused", **changes}))

    assert [path for path in sorted(models.iterdir()) if not path.name.startswith(".")] == [
        path for path in before if not path.name.startswith(".")
    ]


def test_a_head_for_other_features_or_no_embedding_is_refused(
    models: Path, models_folder: Path, trained: dict[str, TrainedModel]
) -> None:
    model = replace(trained["two_classes"], name="refused")
    short = replace(model.head, weights=model.head.weights[:100])
    (models / "efficientnet_lite0").symlink_to(models_folder / "efficientnet_lite0")
    classifier = read_artefact(models / "efficientnet_lite0")

    with pytest.raises(UnsuitableModel, match="returns 1280 values; the head was fitted on 100"):
        build(models, replace(model, head=short))
    with pytest.raises(UnsuitableModel, match="is no embedding"):
        build(models, replace(model, backbone=classifier.name, backbone_digest=classifier.digest))
