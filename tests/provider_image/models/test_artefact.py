"""Artefacts on disk: read, told apart, built once, never half."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from provider_image.backends import Device
from provider_image.backends.openvino import load_net
from provider_image.check import check_model
from provider_image.compiler import build, can_build_now, ensure_installed, installing, lite0
from provider_image.compiler.installing import begin_artefact, build_folder
from provider_image.errors import BrokenArtefact, NotInstalled, UnknownModel
from provider_image.models.artefact import compute_digest, find_artefact, installed_digest, read_artefact
from provider_image.models.catalogue import CATALOGUE
from tests.provider_image.conftest import ROOT
from tests.timing import DEADLINE_SECONDS, cpu_slowness, wait_until

#: The digest of efficientnet_lite0 in formats 2 and 3.
OLD_DIGEST = "ee9e000329261f0cdcdc475633a098d74bd31f7fc52835f0fe557a8566eb8c76"


@pytest.fixture
def models(tmp_path, models_folder):
    """A copy of the models folder that a test may damage."""
    return shutil.copytree(models_folder, tmp_path / "models")


def test_artefact_describes_the_model(models_folder):
    artefact = read_artefact(models_folder / "efficientnet_lite0")

    assert (artefact.height, artefact.width, artefact.crop, len(artefact.labels)) == (224, 224, 0.875, 1000)
    assert artefact.labels[282] == ("n02123159", "tiger_cat")
    assert artefact.weights_sha256 == lite0.WEIGHTS_SHA256


def with_format(folder, number):
    """Write an artefact's model.json as in format 2, of mlg 0.1.0, or 3, and return what must be read from it."""
    facts = json.loads((folder / "model.json").read_text())
    expected = replace(read_artefact(folder), format=number)
    expected = replace(expected, digest=compute_digest(expected))
    facts |= {"format": number, "digest": expected.digest}
    if number == 3:
        (folder / "model.json").write_text(json.dumps(facts))
        return expected
    storage = {"kept": facts.pop("precision"), **facts["storage"]}
    for name in ("backend", "columns", "preprocessing_version"):
        del facts[name]
    self_test = {name: facts.pop(name) for name in ("reference", "samples")}
    facts = {**facts, "storage": storage, "self_test": self_test}
    (folder / "model.json").write_text(json.dumps(facts))
    return expected


@pytest.mark.parametrize("number", [2, 3])
def test_artefact_of_an_older_format_keeps_its_digest(models, number):
    folder = models / "efficientnet_lite0"

    expected = with_format(folder, number)

    assert read_artefact(folder) == expected
    assert installed_digest(models, "efficientnet_lite0") == expected.digest == OLD_DIGEST
    assert check_model(folder, seconds=0.01).is_ok


def test_other_weights_with_new_samples_are_another_artefact(models):
    """Somebody who zeroes the weights and records what they answer cannot keep the digest."""
    folder = models / "efficientnet_lite0"
    weights = bytes((folder / "model.bin").stat().st_size)
    (folder / "model.bin").write_bytes(weights)
    facts = json.loads((folder / "model.json").read_text())
    facts["files"]["model.bin"][1] = hashlib.sha256(weights).hexdigest()
    (folder / "model.json").write_text(json.dumps(facts))

    with pytest.raises(BrokenArtefact, match="digest"):
        load_net(read_artefact(folder), Device(threads=1))
    assert "digest" in check_model(folder, seconds=0.01).problem


@pytest.mark.parametrize(
    "damage", [lambda folder: os.truncate(folder / "model.bin", 1000), lambda folder: (folder / "model.bin").unlink()]
)
def test_repaired_artefact_is_usable_without_a_restart(models, models_folder, caplog, damage):
    damage(models / "efficientnet_lite0")
    with pytest.raises(BrokenArtefact, match="copied"):
        find_artefact(models, "efficientnet_lite0")

    shutil.copy(models_folder / "efficientnet_lite0/model.bin", models / "efficientnet_lite0/model.bin")

    expected = installed_digest(models_folder, "efficientnet_lite0")
    wait_until(lambda: installed_digest(models, "efficientnet_lite0") == expected)


def test_damage_is_logged_once(models, caplog):
    os.truncate(models / "efficientnet_lite0" / "model.bin", 1000)

    started = time.monotonic()
    while time.monotonic() < started + 1.1:  # longer than an artefact that cannot be used stays unread
        assert installed_digest(models, "efficientnet_lite0") is None

    assert len(caplog.records) == 1


def test_model_that_is_replaced_is_never_absent(models, monkeypatch):
    installed = models / "efficientnet_lite0"

    def rename(path, target, plain=Path.rename):
        plain(path, target)
        assert (installed / "model.json").exists()

    monkeypatch.setattr(Path, "rename", rename)
    before = (installed / "model.json").stat().st_ino

    build(models, CATALOGUE["efficientnet_lite0"], again=True)

    assert (installed / "model.json").stat().st_ino != before
    assert sorted(path.name for path in models.iterdir()) == [".efficientnet_lite0.lock", "efficientnet_lite0"]


def test_model_is_replaced_where_folders_cannot_be_exchanged(models, models_folder, monkeypatch):
    (models / "efficientnet_lite0").rename(models / "elsewhere")
    (models / "efficientnet_lite0").symlink_to(models / "elsewhere")
    monkeypatch.setattr(installing, "_exchange", lambda one, other: False)

    artefact = build(models, CATALOGUE["efficientnet_lite0"], again=True)

    assert artefact == replace(read_artefact(models_folder / "efficientnet_lite0"), folder=artefact.folder)
    assert not (models / "efficientnet_lite0").is_symlink()
    assert not list(models.glob(".*.tmp"))


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "f16"},
        {"files": {"model.bin": (1, "2" * 64)}},
        {"backend": "affine"},
        {"preprocessing_version": 2},
        {"labels": (("n1", "cat"),)},
        {"weights_sha256": "0" * 64},
        {"recipe": "lite0-2"},
        {"preprocessing": "tf"},
        {"columns": ("a", "b")},
        {"crop": None},
        {"name": "another"},
        {"service": "another"},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("number", [3, 4])
def test_digest_covers_what_can_change_an_answer(number, change):
    if number == 3 and "files" in change:
        pytest.skip("the files are part of it since format 4")
    facts = {"labels": (("n1", "dog"),), "weights_sha256": "1" * 64, "recipe": "lite0-1", "reference": "openvino"}
    facts |= {"files": {"model.bin": (1, "1" * 64)}, "format": number}
    artefact = begin_artefact(CATALOGUE["efficientnet_lite0"], **facts)

    assert compute_digest(artefact) != compute_digest(replace(artefact, **change))


def test_file_of_an_artefact_cannot_be_outside_its_folder(models):
    path = models / "efficientnet_lite0" / "model.json"
    facts = json.loads(path.read_text())
    facts["files"]["../secret.bin"] = facts["files"].pop("model.bin")
    path.write_text(json.dumps(facts))

    with pytest.raises(BrokenArtefact, match="plain file name"):
        read_artefact(path.parent)


@pytest.mark.parametrize("change", [{"title": "\x1b]0;owned\x07"}, {"labels": [["n1", "\x1b[2Jdog"]]}])
def test_artefact_has_no_text_that_a_terminal_obeys(models, change):
    path = models / "efficientnet_lite0" / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    with pytest.raises(BrokenArtefact, match="control characters"):
        read_artefact(path.parent)


def test_missing_model_names_the_command_that_installs_it(tmp_path):
    with pytest.raises(NotInstalled, match="mlg models compile vgg16"):
        find_artefact(tmp_path, "vgg16")

    assert installed_digest(tmp_path, "vgg16") is None


@pytest.mark.parametrize("name", ["../efficientnet_lite0", "/etc", "", "A" * 65, "a\n"])
def test_name_that_is_no_name_never_becomes_a_path(tmp_path, name):
    with pytest.raises(UnknownModel):
        find_artefact(tmp_path, name)


def test_unchanged_artefact_is_read_once(models_folder):
    assert find_artefact(models_folder, "efficientnet_lite0") is find_artefact(models_folder, "efficientnet_lite0")


def test_asking_for_the_digest_costs_microseconds(models_folder):
    installed_digest(models_folder, "efficientnet_lite0")

    started = time.thread_time()
    for _ in range(1000):
        installed_digest(models_folder, "efficientnet_lite0")

    assert (time.thread_time() - started) / 1000 < 200e-6 * cpu_slowness()


def test_changed_artefact_is_read_again(models):
    before = installed_digest(models, "efficientnet_lite0")
    path = models / "efficientnet_lite0" / "model.json"

    changed = replace(read_artefact(path.parent), recipe="lite0-2")
    digest = compute_digest(changed)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"recipe": "lite0-2", "digest": digest}))

    assert before != installed_digest(models, "efficientnet_lite0") == digest


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.json").write_text("{"),
        lambda folder: (folder / "model.json").write_text('{"format": 99}'),
        lambda folder: (folder / "model.json").write_text("[]"),
        lambda folder: (folder / "model.json").write_text("[" * 100_000),
        lambda folder: (folder / "model.bin").unlink(),
        lambda folder: os.truncate(folder / "model.bin", 1000),
    ],
)
def test_damaged_artefact_is_broken(models, damage):
    damage(models / "efficientnet_lite0")

    with pytest.raises(BrokenArtefact):
        find_artefact(models, "efficientnet_lite0")
    assert installed_digest(models, "efficientnet_lite0") is None


def test_flipped_bit_in_the_weights_is_found_when_loading(models):
    path = models / "efficientnet_lite0" / "model.bin"
    data = bytearray(path.read_bytes())
    data[5_000_000] ^= 1
    path.write_bytes(data)

    with pytest.raises(BrokenArtefact, match="has changed"):
        load_net(find_artefact(models, "efficientnet_lite0"), Device(threads=1))


def test_damaged_artefact_is_built_again(models, models_folder):
    before = installed_digest(models_folder, "efficientnet_lite0")
    os.truncate(models / "efficientnet_lite0" / "model.bin", 1000)

    artefact = ensure_installed(models, "efficientnet_lite0")

    assert artefact.digest == before
    load_net(artefact, Device(threads=1))


def test_only_what_needs_no_download_can_be_built_now():
    assert can_build_now(CATALOGUE["efficientnet_lite0"])
    assert not can_build_now(CATALOGUE["vgg16"])


def test_model_that_needs_a_download_is_not_installed_by_itself(tmp_path):
    with pytest.raises(NotInstalled, match="mlg models compile densenet121"):
        ensure_installed(tmp_path, "densenet121")


def test_models_folder_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(NotInstalled, match="could not be written"):
        ensure_installed(tmp_path / "file" / "models", "efficientnet_lite0")


def test_several_processes_building_at_once_all_succeed(tmp_path):
    code = (
        "import sys; from pathlib import Path; from provider_image.compiler import ensure_installed; "
        "print(ensure_installed(Path(sys.argv[1]), 'efficientnet_lite0').digest)"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]

    digests = {process.communicate(timeout=DEADLINE_SECONDS)[0].strip() for process in started}

    assert digests == {installed_digest(tmp_path, "efficientnet_lite0")}
    assert {path.name for path in tmp_path.iterdir()} == {"efficientnet_lite0", ".efficientnet_lite0.lock"}


def test_what_a_killed_builder_left_is_removed_by_the_next(tmp_path):
    leftover = tmp_path / ".vgg16.abc.tmp"
    leftover.mkdir()

    with build_folder(tmp_path, "vgg16") as folder:
        assert folder.is_dir()
        assert not leftover.exists()

    assert not folder.exists()


def test_embedding_artefact_keeps_its_dimensions_and_vectors(embedding_models_folder):
    folder = embedding_models_folder / "efficientnet_lite0_embedding"
    artefact = read_artefact(folder)

    facts = json.loads((folder / "model.json").read_text())
    assert (artefact.dimensions, facts["dimensions"], artefact.labels) == (1280, 1280, ())
    assert compute_digest(replace(artefact, dimensions=64)) != artefact.digest == compute_digest(artefact)
    for sample in artefact.samples:
        file, sha256 = sample.files["vector"]
        data = (folder / file).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (4 * 1280, sha256)
    assert {path.name for path in folder.iterdir()} == {"model.json", *artefact.file_names}


def test_artefact_without_dimensions_is_read_and_keeps_its_digest(models):
    folder = models / "efficientnet_lite0"
    facts = json.loads((folder / "model.json").read_text())
    del facts["dimensions"]
    for sample in facts["samples"]:
        del sample["files"]
    expected = read_artefact(folder)

    (folder / "model.json").write_text(json.dumps(facts))

    assert read_artefact(folder) == expected
    assert compute_digest(read_artefact(folder)) == facts["digest"]


@pytest.mark.parametrize("file", ["../x.bin", "/etc/passwd", "", 7, None])
def test_vector_file_of_a_sample_must_be_in_the_folder(tmp_path, embedding_models_folder, file):
    folder = shutil.copytree(embedding_models_folder / "efficientnet_lite0_embedding", tmp_path / "copy")
    facts = json.loads((folder / "model.json").read_text())
    facts["samples"][0]["files"]["vector"][0] = file
    (folder / "model.json").write_text(json.dumps(facts))

    with pytest.raises(BrokenArtefact, match="not a plain file name"):
        read_artefact(folder)
