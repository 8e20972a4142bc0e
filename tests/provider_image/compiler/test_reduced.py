"""Copies of a classifier in bf16 and int8: built with photos, judged, refused, chosen where they are quickest."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from provider_image.backends import Device, load_net
from provider_image.check import check_model
from provider_image.chunk import ChunkItem, read_results, write_chunk
from provider_image.compiler.embedding import build as build_embedding
from provider_image.compiler.reduced.builder import build, has_bf16
from provider_image.compiler.reduced.comparison import compare
from provider_image.compiler.reduced.photos import list_photos, split
from provider_image.errors import BrokenArtefact, ConfigError, UnsuitableModel
from provider_image.models.artefact import Artefact, find_artefact, read_artefact
from provider_image.models.intervals import wilson_interval
from provider_image.models.processor import processor_id
from provider_image.models.quickest import find_copies, find_quickest
from provider_image.runtime import NetCache, run_chunk
from tests.reduced_models import install_colours, photo, write_photos

PHOTOS = 60


@pytest.fixture(scope="module")
def photos_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "photos", PHOTOS)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, photos_folder: Path) -> Path:
    """A models folder with the classifier of colours and its copy in int8."""
    pytest.importorskip("nncf")
    models = tmp_path_factory.mktemp("models")
    install_colours(models)
    build(models, "colours", "int8", photos_folder)
    return models


@pytest.fixture
def models(tmp_path: Path, built: Path) -> Path:
    """A copy of that folder, which a test may change."""
    return Path(shutil.copytree(built, tmp_path / "models"))


def change(models: Path, edit: Callable[[dict[str, Any]], object], name: str = "colours_int8") -> Artefact:
    """Edit the judgement in the model.json of a copy; its digest does not cover it."""
    path = models / name / "model.json"
    document = json.loads(path.read_text())
    edit(document["reduced"])
    path.write_text(json.dumps(document))
    return read_artefact(path.parent)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_copy_in_int8_is_judged_with_other_photos_than_it_is_calibrated_with(
    built: Path, photos_folder: Path
) -> None:
    model, copy = (find_artefact(built, name) for name in ("colours", "colours_int8"))

    reduced = copy.reduced
    assert reduced is not None
    # 60 images and a text differ; a quarter of them calibrates.
    assert reduced.calibration_images + reduced.images == PHOTOS and reduced.calibration_images in (14, 15)
    assert reduced.same_first_label == reduced.images and 0 < reduced.largest_difference <= reduced.bound
    assert (reduced.agreement_low, reduced.agreement_high) == wilson_interval(reduced.images, reduced.images)
    assert reduced.layers == 4 and reduced.layers_in_f32 == 0
    assert (reduced.base_digest, reduced.processor_id) == (model.digest, processor_id())
    assert copy.digest != model.digest and copy.labels == model.labels and copy.precision == "int8"
    assert "from fewer than 1,000 images" in reduced.figures
    calibrating, judging = split(list_photos(photos_folder))
    assert {path.read_bytes() for path in calibrating}.isdisjoint(path.read_bytes() for path in judging)


def test_a_copy_passes_the_check_and_differs_from_its_model(built: Path) -> None:
    report = check_model(built / "colours_int8", Device(threads=1), seconds=0.01)

    assert (report.problem, report.tolerance, report.computed_in) == (None, 0.2, "int8")
    nets = [load_net(read_artefact(built / name), Device(threads=1)) for name in ("colours", "colours_int8")]
    found = compare(*nets, [np.full((32, 32, 3), (150, 120, 100), np.uint8)])
    assert found.images == 1 and found.largest_difference > 1e-5


def test_a_copy_is_judged_by_photos_that_did_not_calibrate_it_and_refused_with_its_figures(
    models: Path, photos_folder: Path, tmp_path: Path
) -> None:
    before = find_artefact(models, "colours_int8").digest
    photos = Path(shutil.copytree(photos_folder, tmp_path / "photos"))
    # Between red and green, where int8 changes the probabilities; all of them are among the photos that judge.
    random, last = np.random.default_rng(5), sha256(split(list_photos(photos))[1][20].read_bytes())
    unsure = [data for data in (photo((115, 115, 30), random) for _ in range(40)) if sha256(data) > last]
    for number, data in enumerate(unsure):
        (photos / f"unsure-{number}.png").write_bytes(data)
    assert unsure

    with pytest.raises(UnsuitableModel, match=r"not installed.* on \d+ of \d+ images .*differ by up to .*is 0\.001;"):
        build(models, "colours", "int8", photos, bound=0.001)

    assert read_artefact(models / "colours_int8").digest == before


def test_layers_that_int8_harms_stay_in_f32(tmp_path: Path, photos_folder: Path) -> None:
    pytest.importorskip("nncf")
    install_colours(tmp_path, outlier=1000)
    steps: list[str] = []

    copy = build(tmp_path, "colours", "int8", photos_folder, on_step=steps.append)

    assert copy.reduced is not None and 0 < copy.reduced.layers_in_f32 < copy.reduced.layers
    assert any("with 0 layers in f32" in step for step in steps)
    assert copy.reduced.same_first_label == copy.reduced.images


def test_bf16_is_built_only_where_the_processor_computes_in_it(models: Path, photos_folder: Path) -> None:
    if not has_bf16():
        with pytest.raises(ConfigError, match="does not compute in bf16"):
            build(models, "colours", "bf16", photos_folder)
        return

    copy = build(models, "colours", "bf16", photos_folder)

    model = find_artefact(models, "colours")
    assert copy.reduced is not None and copy.reduced.images == PHOTOS and copy.reduced.calibration_images == 0
    assert copy.files == model.files and copy.digest != model.digest
    assert [each.name for each in find_copies(models, model)] == ["colours_bf16", "colours_int8"]


def test_the_quickest_copy_is_chosen_only_for_its_model_and_processor(models: Path) -> None:
    model = find_artefact(models, "colours")

    def chosen(**facts: object) -> str:
        change(models, lambda reduced: reduced.update({"speedup": 1.5, "processor_id": processor_id(), **facts}))
        return find_quickest(models, find_artefact(models, "colours")).name

    assert chosen() == "colours_int8"
    assert chosen(speedup=0.9) == "colours"
    assert chosen(processor_id="another") == "colours"
    assert chosen(base_digest="0" * 64) == "colours"
    chosen()
    assert find_quickest(models, replace(model, labels=(("a", "a"),) * 3)).labels[0] == ("a", "a")
    shutil.rmtree(models / "colours_int8")
    assert chosen_without_copy(models) == "colours"


def chosen_without_copy(models: Path) -> str:
    return find_quickest(models, find_artefact(models, "colours")).name


def test_a_worker_that_is_set_to_fastest_says_what_it_computed_with(
    models: Path, tmp_path: Path, photos_folder: Path
) -> None:
    change(models, lambda reduced: reduced.update(speedup=1.5))
    model, copy = (find_artefact(models, name) for name in ("colours", "colours_int8"))
    items = [ChunkItem(number=0, inputs={"image": (photos_folder / "001.png").read_bytes()})]
    write_chunk(tmp_path / "c.zip", "c", "classification", "colours", model.digest, items)

    for precision, digest in (("fastest", copy.digest), ("f32", model.digest)):
        run_chunk(tmp_path / "c.zip", tmp_path / "r.zip", NetCache(models, Device(threads=1, precision=precision)))

        others = [copy.digest]
        found = read_results(tmp_path / "r.zip", "c", "colours", [0], model.digest, other_digests=others)
        assert (found.digest, found.precision) == (digest, "int8" if precision == "fastest" else "f32")
        assert found.items[0].output[0][0] == "green"


def test_a_damaged_copy_is_not_used(models: Path, tmp_path: Path, photos_folder: Path) -> None:
    change(models, lambda reduced: reduced.update(speedup=1.5))
    weights = models / "colours_int8" / "model.bin"
    weights.write_bytes(bytes(len(weights.read_bytes())))
    nets = NetCache(models, Device(threads=1, precision="fastest"))

    loaded, again = (nets.get("classification", "colours", None) for _ in range(2))

    assert (loaded.artefact.name, loaded.precision) == ("colours", "f32")
    assert again.seconds == 0


@pytest.mark.parametrize(
    "edit", [{"precision": "int4"}, {"bound": float("nan")}, {"images": 0}, {"processor": "a\x1b[2J"}]
)
def test_a_judgement_that_cannot_be_is_refused(models: Path, edit: dict[str, object]) -> None:
    with pytest.raises(BrokenArtefact):
        change(models, lambda reduced: reduced.update(edit))


def test_a_copy_has_no_copy_and_no_embedding(models: Path, photos_folder: Path) -> None:
    with pytest.raises(UnsuitableModel, match="no classifier for OpenVINO in f32"):
        build(models, "colours_int8", "int8", photos_folder)
    with pytest.raises(UnsuitableModel, match="a copy of colours"):
        build_embedding(models, "colours_int8")


def test_a_model_of_that_name_is_not_replaced(models: Path, photos_folder: Path) -> None:
    shutil.rmtree(models / "colours_int8")
    install_colours(models, "colours_int8")

    with pytest.raises(ConfigError, match="Another model has the name colours_int8"):
        build(models, "colours", "int8", photos_folder)


def test_too_few_photos_are_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        build(models, "colours", "int8", tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="too few photos"):
        build(models, "colours", "int8", tmp_path / "empty")


def test_a_kind_of_processor_is_its_name_and_its_instructions(tmp_path: Path) -> None:
    def cpuinfo(text: str) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        path.write_text(text)
        return path

    amx = cpuinfo("model name\t: X\nflags\t\t: fpu avx2 avx512_vnni amx_tile\n")
    reordered = cpuinfo("model name\t: X\nflags\t\t: amx_tile avx512_vnni avx2 newbug\n")
    plain = cpuinfo("model name\t: X\nflags\t\t: fpu avx2\n")

    assert processor_id(amx) == processor_id(reordered) != processor_id(plain)
