"""The registry finds the models of the catalogue and installed custom models by any spelling, and fast."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest

from provider_image.errors import BrokenArtefact, UnknownModel
from provider_image.models import registry
from provider_image.models.catalogue import CATALOGUE, install_command
from provider_image.models.registry import find_row, list_rows
from tests.timing import cpu_slowness


@pytest.fixture
def models(tmp_path, models_folder):
    """A models folder with the starter model, and a copy of it as a custom model."""
    put(models_folder, tmp_path, "efficientnet_lite0")
    put(models_folder, tmp_path, "my_pets", title="My pets")
    return tmp_path


def put(source, models, folder, **facts):
    """Install a model under another name."""
    shutil.copytree(source / "efficientnet_lite0", models / folder)
    path = models / folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"name": folder} | facts))


def age(models):
    """Make the folder look as if it had not changed for a while."""
    os.utime(models, ns=(0, time.time_ns() - 60_000_000_000))


def test_custom_models_follow_the_catalogue(models):
    found = list_rows(models)

    assert [row.name for row in found] == [*CATALOGUE, "my_pets"]
    assert (found[-1].title, found[-1].source, found[-1].height) == ("My pets", "own", 224)
    assert install_command(found[-1].name).startswith("mlg models compile my_pets --keras|--onnx FILE --labels FILE,")


@pytest.mark.parametrize("spelling", ["my_pets", "My-Pets", "MYPETS", "my pets"])
def test_custom_model_is_found_in_any_spelling(models, spelling):
    assert find_row(models, spelling).name == "my_pets"


def test_catalogue_is_found_without_any_folder(tmp_path):
    assert find_row(tmp_path / "nowhere", "ResNet-50").name == "resnet50"
    assert list_rows(tmp_path / "nowhere") == tuple(CATALOGUE.values())


def test_unknown_name_is_told_the_nearest_own_one(models):
    with pytest.raises(UnknownModel, match=r"Did you mean my_pets\?"):
        find_row(models, "my_petz")
    with pytest.raises(UnknownModel, match=r"Did you mean resnet50\?"):
        find_row(models, "resnet5")


def test_embedding_of_a_custom_model_is_found_and_listed_only_if_it_is_installed(models, models_folder):
    found = find_row(models, "My-Pets-Embedding")

    assert (found.name, found.service, found.base, found.source) == ("my_pets_embedding", "embedding", "my_pets", "own")
    assert install_command(found.name) == "mlg models compile my_pets_embedding"
    assert [row.name for row in list_rows(models)] == [*CATALOGUE, "my_pets"]
    put(models_folder, models, "my_pets_embedding", service="embedding", title="Mine")
    assert find_row(models, "mypetsembedding").title == "Mine"
    assert [row.name for row in list_rows(models)] == [*CATALOGUE, "my_pets", "my_pets_embedding"]
    with pytest.raises(UnknownModel):
        find_row(models, "my_pets_embedding_embedding")
    with pytest.raises(UnknownModel):
        find_row(models, "nobody_embedding")


def test_model_comes_and_goes_with_its_folder(models, models_folder):
    age(models)
    assert find_row(models, "mypets").name == "my_pets"

    put(models_folder, models, "second")
    assert find_row(models, "second").name == "second"
    shutil.rmtree(models / "my_pets")

    with pytest.raises(UnknownModel):
        find_row(models, "my_pets")
    assert [row.name for row in list_rows(models)] == [*CATALOGUE, "second"]


def test_change_within_the_same_tick_of_the_clock_is_not_missed(models, models_folder):
    list_rows(models)
    changed_at = models.stat().st_mtime_ns
    put(models_folder, models, "second")
    os.utime(models, ns=(changed_at, changed_at))

    assert find_row(models, "second").name == "second"


def test_damaged_custom_model_does_not_break_the_list(models, models_folder):
    put(models_folder, models, "whole")
    (models / "my_pets" / "model.json").write_text("{")
    put(models_folder, models, "liar", name="resnet50")
    put(models_folder, models, "alien", service="telepathy")
    (models / "empty").mkdir()
    (models / "file").write_text("")

    assert [row.name for row in list_rows(models)] == [*CATALOGUE, "whole"]
    for name in ("my_pets", "liar", "alien"):
        with pytest.raises(BrokenArtefact, match=name):
            find_row(models, name)
    for name in ("empty", "file"):
        with pytest.raises(UnknownModel):
            find_row(models, name)


def test_folder_with_a_spelling_of_the_catalogue_is_not_an_custom_model(models, models_folder):
    put(models_folder, models, "res_net_50")

    assert find_row(models, "res_net_50").name == "resnet50"
    assert [row.name for row in list_rows(models)] == [*CATALOGUE, "my_pets"]


def test_finding_an_custom_model_costs_microseconds(models):
    age(models)
    find_row(models, "My-Pets")
    assert str(models) in registry._listing_cache
    started = time.thread_time()

    for _ in range(1000):
        find_row(models, "My-Pets")

    assert (time.thread_time() - started) / 1000 < 200e-6 * cpu_slowness()
