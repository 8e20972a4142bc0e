"""A check passes an intact model, and reports for any other what is wrong and what to do."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from provider_image.backends import Device
from provider_image.check import CheckReport, check_in_process, check_model, describe, record_speed
from provider_image.cores import available_cores
from provider_image.errors import ConfigError, NotInstalled, UnknownModel
from provider_image.models.artefact import compute_digest, read_artefact
from provider_image.models.registry import find_folder, installed_folders
from provider_image.models.speed import Speed, read_speed, write_speed
from provider_image.precision import TOLERANCE, TOLERANCE_BF16
from provider_image.service import Difference
from provider_image.services.classification import Classification
from tests.provider_image.conftest import ROOT
from tests.timing import DEADLINE_SECONDS

MODEL = "efficientnet_lite0"
#: Long enough for some images.
SECONDS = 0.05


@pytest.fixture
def models(tmp_path: Path, models_folder: Path) -> Path:
    """A models folder that the test may change."""
    shutil.copytree(models_folder / MODEL, tmp_path / "models" / MODEL)
    return tmp_path / "models"


@pytest.fixture
def artefact(models: Path) -> Path:
    """An artefact that the test may change."""
    return models / MODEL


def change(artefact: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit an artefact's model.json."""
    document = json.loads((artefact / "model.json").read_text())
    edit(document)
    (artefact / "model.json").write_text(json.dumps(document))


def declare_f16(artefact: Path, largest_difference: float) -> None:
    """Declare the weights to be stored as f16, with the digest that follows."""
    change(artefact, lambda m: m.update(precision="f16"))
    change(artefact, lambda m: m["storage"].update(largest_difference=largest_difference))
    digest = compute_digest(read_artefact(artefact))
    change(artefact, lambda m: m.update(digest=digest))


def provider(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "provider_image", "check", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        env={**os.environ, **variables},
    )


def test_intact_model_passes_and_is_measured(artefact: Path) -> None:
    report = check_model(artefact, Device(threads=2), seconds=SECONDS)

    assert (report.is_ok, report.problem) == (True, None)
    assert (report.name, report.storage, report.threads, report.precision) == (MODEL, "f32", 2, "f32")
    assert report.pictures and all(image.problem is None for image in report.pictures)
    assert max(image.difference or 0 for image in report.pictures) <= TOLERANCE
    assert report.images_per_second > 0 and report.net_images_per_second > 0
    assert report.load_seconds > 0 and report.peak_memory_bytes > 10e6
    assert {"python", "openvino", "numpy", "pillow"} <= report.versions.keys()


def test_report_survives_json(artefact: Path) -> None:
    report = check_model(artefact, seconds=SECONDS)

    document = json.loads(json.dumps(report.to_json(), allow_nan=False))

    assert document["ok"] is True
    assert CheckReport.from_json(document) == report


@pytest.mark.parametrize("precision", ["bf16", "auto"])
def test_coarser_precision_passes_with_its_own_tolerance(artefact: Path, precision: str) -> None:
    report = check_model(artefact, Device(precision=precision), seconds=SECONDS)

    assert report.is_ok, report.problem
    assert report.tolerance == TOLERANCE_BF16


def test_order_of_the_top_five_labels_counts_in_f32_only(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class InAnotherOrder(Classification):
        def compare(self, expected: Any, output: Any, tolerance: float) -> Difference:
            return Difference(largest=0.0, is_same_order=False)

    monkeypatch.setattr("provider_image.check.load_service", lambda name: InAnotherOrder())

    f32, bf16 = (check_model(artefact, Device(precision=precision), seconds=SECONDS) for precision in ("f32", "bf16"))

    assert (f32.is_ok, bf16.is_ok) == (False, True)
    assert {image.problem for image in f32.pictures} == {"the top five labels are in another order"}


def test_unknown_precision_is_refused(artefact: Path) -> None:
    with pytest.raises(ConfigError, match="f8"):
        check_model(artefact, Device(precision="f8"))


@pytest.mark.parametrize("number", [3, 4])
def test_an_artefact_whose_digest_does_not_cover_its_files_is_ok_with_a_warning(artefact: Path, number: int) -> None:
    change(artefact, lambda m: m.update(format=number))
    digest = compute_digest(read_artefact(artefact))
    change(artefact, lambda m: m.update(digest=digest))

    report = check_model(artefact, seconds=SECONDS)

    assert report.is_ok, report.problem
    assert (report.warning is not None) == (number == 3)
    warned = [line for line in describe(report) if line.split()[0] == "warning"]
    assert ["mlg models compile efficientnet_lite0" in line for line in warned] == [True] * (number == 3)


def test_the_process_of_a_check_has_limits_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = tmp_path / "noted"
    (tmp_path / "sitecustomize.py").write_text(f"""
import atexit, json, resource, socket

notes = open({str(noted)!r}, "w")

def note():
    kinds = resource.RLIMIT_DATA, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE
    limits = [resource.getrlimit(kind)[0] for kind in kinds]
    try:
        socket.socket().close()
        has_network = True
    except OSError:
        has_network = False
    notes.write(json.dumps([limits, has_network]))

atexit.register(note)
""")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    report = check_in_process(tmp_path / "nothing", tmp_path, threads=1, precision="f32")

    assert "has no artefact" in str(report.problem)
    limits, has_network = json.loads(noted.read_text())
    assert min(limits) > 0
    assert has_network == (platform.machine() not in ("x86_64", "aarch64"))


# What must fail


def flip_a_bit(artefact: Path) -> None:
    data = bytearray((artefact / "model.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (artefact / "model.bin").write_bytes(data)


def lower_a_probability(artefact: Path) -> None:
    def lower(document: dict[str, Any]) -> None:
        document["samples"][-1]["output"][0][2] -= 0.002  # still a valid result

    change(artefact, lower)


def swap_two_labels(artefact: Path) -> None:
    def swap(document: dict[str, Any]) -> None:
        rows = document["samples"][0]["output"]
        rows[0][:2], rows[1][:2] = rows[1][:2], rows[0][:2]

    change(artefact, swap)


def change_an_image(artefact: Path) -> None:
    path = artefact / "selftest-0.jpg"
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_bit, "model.bin has changed"),
        (lambda a: (a / "model.xml").write_text("<net/>"), "model.xml is cut short"),
        (lambda a: (a / "model.bin").unlink(), "damaged"),
        (change_an_image, "1 of .* cannot be used"),
        (lambda a: (a / "selftest-0.jpg").unlink(), "1 of .* cannot be used"),
        (lower_a_probability, "1 of .* give other results than recorded"),
        (swap_two_labels, "1 of .* give other results than recorded"),
        (lambda a: change(a, lambda m: m["samples"][0].update(output=[])), "1 of .* cannot be used"),
        (lambda a: change(a, lambda m: m["samples"].clear()), "no self-test images"),
        (lambda a: change(a, lambda m: m.pop("samples")), "damaged"),
        (lambda a: change(a, lambda m: m.update(digest="0" * 64)), "digest does not match"),
        (lambda a: change(a, lambda m: m["labels"].reverse()), "digest does not match"),
        (lambda a: change(a, lambda m: m.update(crop=None)), "digest does not match"),
        (lambda a: change(a, lambda m: m.update(format=1)), "format 1"),
        (lambda a: change(a, lambda m: m.update(service="sorcery")), "digest does not match"),
        (lambda a: (a / "model.json").write_text("{"), "damaged"),
        (lambda a: (a / "model.json").unlink(), "has no artefact"),
        (shutil.rmtree, "not installed.*mlg models compile efficientnet_lite0"),
    ],
)
def test_broken_model_fails_with_a_remedy(artefact: Path, damage: Callable[[Path], object], words: str) -> None:
    damage(artefact)

    report = check_model(artefact, seconds=SECONDS)
    lines = describe(report)

    assert not report.is_ok
    assert re.search(words, report.problem), report.problem
    assert "nstall" in report.problem or "mlg models compile" in report.problem or "Name a folder" in report.problem
    assert "\n" not in report.problem
    assert report.images_per_second is None
    assert lines[-1].split()[:2] == ["verdict", "FAILED:"]


def test_only_images_with_a_problem_have_a_line(artefact: Path) -> None:
    intact = "\n".join(describe(check_model(artefact, seconds=SECONDS)))
    lower_a_probability(artefact)

    damaged = "\n".join(describe(check_model(artefact, seconds=SECONDS)))

    assert "selftest-" not in intact
    assert any(
        line.split()[0] == "resizing" and line.split()[1].rstrip(":") in ("avx2", "pillow")
        for line in intact.splitlines()
    )
    assert intact.splitlines()[-1].split() == ["verdict", "ok"]
    assert damaged.count("selftest-") == 1
    assert "the result differs by 0.002 from the recorded one" in damaged


def test_tolerance_includes_the_measured_error_of_f16_storage(artefact: Path) -> None:
    lower_a_probability(artefact)
    as_f32 = check_model(artefact, seconds=SECONDS)
    declare_f16(artefact, 0.003)

    as_f16 = check_model(artefact, seconds=SECONDS)

    assert (as_f32.is_ok, as_f16.is_ok) == (False, True)
    assert as_f16.tolerance == pytest.approx(0.0031)


@pytest.mark.parametrize("claimed", [1.0, float("inf"), float("nan")])
def test_artefact_cannot_raise_the_tolerance_beyond_bf16(artefact: Path, claimed: float) -> None:
    def record_a_fish(document: dict[str, Any]) -> None:
        best, *others = document["samples"][0]["output"]
        best[:] = ["n01440764", "tench", 1.0]
        for row in others:
            row[2] = 0.0

    change(artefact, record_a_fish)
    declare_f16(artefact, claimed)

    report = check_model(artefact, seconds=SECONDS)

    assert (report.is_ok, report.pictures[0].difference) == (False, pytest.approx(1.0, abs=0.01))


def test_artefact_in_a_folder_of_another_name_fails_only_in_a_models_folder(models: Path, artefact: Path) -> None:
    other = artefact.rename(models / "mine")

    installed = check_model(other, installed_as="mine", seconds=SECONDS)
    elsewhere = check_model(other, seconds=SECONDS)

    assert (installed.is_ok, elsewhere.is_ok) == (False, True)
    assert "Rename it" in installed.problem


# An embedding


@pytest.fixture
def embedding(tmp_path: Path, embedding_models_folder: Path) -> Path:
    """The artefact of an embedding that the test may change."""
    return shutil.copytree(embedding_models_folder / f"{MODEL}_embedding", tmp_path / f"{MODEL}_embedding")


def replace_vector(artefact: Path, data: bytes) -> None:
    """Record another vector for the first image."""
    (artefact / "selftest-0-vector.bin").write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    change(artefact, lambda m: m["samples"][0]["files"]["vector"].__setitem__(1, sha256))


def test_embedding_is_compared_with_the_recorded_vectors(embedding: Path) -> None:
    report = check_model(embedding, seconds=SECONDS)

    assert report.is_ok, report.problem
    assert report.pictures and all(image.difference is not None for image in report.pictures)
    assert max(image.difference or 0 for image in report.pictures) <= report.tolerance == TOLERANCE
    assert report.images_per_second > 0


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda a: replace_vector(a, (a / "selftest-1-vector.bin").read_bytes()), "give other results than recorded"),
        (lambda a: replace_vector(a, bytes(4 * 1280)), "1 of .* cannot be used"),
        (lambda a: replace_vector(a, b"short"), "1 of .* cannot be used"),
        (lambda a: (a / "selftest-0-vector.bin").write_bytes(b""), "1 of .* cannot be used"),
        (lambda a: (a / "selftest-0-vector.bin").unlink(), "1 of .* cannot be used"),
        (lambda a: change(a, lambda m: m["samples"][0]["files"].clear()), "give other results than recorded"),
        (lambda a: change(a, lambda m: m.update(dimensions=1279)), "digest does not match"),
    ],
)
def test_embedding_with_other_vectors_fails(embedding: Path, damage: Callable[[Path], object], words: str) -> None:
    damage(embedding)

    report = check_model(embedding, seconds=SECONDS)

    assert not report.is_ok
    assert re.search(words, report.problem), report.problem


# Finding the folder


@pytest.mark.parametrize("text", [MODEL, "EfficientNet-Lite0", "lite0"])
def test_model_is_found_in_any_spelling(models: Path, text: str) -> None:
    assert find_folder(models, text) == models / MODEL


def test_installed_model_that_is_not_in_the_catalogue_is_found(models: Path) -> None:
    (models / "mine").mkdir()

    assert find_folder(models, "mine") == models / "mine"
    assert installed_folders(models) == [models / MODEL, models / "mine"]


def test_path_of_an_artefact_is_accepted(models: Path, artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(artefact.parent)
    (models / "My copy").mkdir()

    assert find_folder(Path("/none"), str(artefact)) == artefact
    assert find_folder(Path("/none"), f"./{MODEL}") == artefact
    assert find_folder(Path("/none"), "My copy") == models / "My copy"


def test_unknown_model_names_the_nearest(models: Path) -> None:
    with pytest.raises(UnknownModel, match="densenet121"):
        find_folder(models, "densenet12")


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.touch()])
def test_empty_models_folder_names_the_install_command(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "models")

    with pytest.raises(NotInstalled, match="mlg models compile"):
        installed_folders(tmp_path / "models")


# In a separate process


def test_memory_is_that_of_the_check_alone(models: Path, artefact: Path) -> None:
    ballast = b"x" * 300_000_000

    report = check_in_process(artefact, models, threads=1, precision="f32")

    assert len(ballast) == 300_000_000
    assert report.is_ok, report.problem
    # 162 MB with two threads; without a model a process has some 20.
    assert 50e6 < report.peak_memory_bytes < 300e6


def test_report_says_that_the_process_was_killed(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))

    report = check_in_process(models / MODEL, models, threads=None, precision="f32")

    assert "signal 9" in report.problem
    assert "memory" in report.problem


# The command


def test_command_checks_every_installed_model(models: Path) -> None:
    (models / "mine").mkdir()

    done = provider("--models", models, "--threads", "1")

    assert (done.returncode, done.stderr) == (1, "")
    first, second = done.stdout.split("\n\n")
    assert first.startswith(f"{MODEL} (EfficientNet-Lite0)\n")
    assert first.splitlines()[-1].split() == ["verdict", "ok"]
    assert second.startswith("mine\n")
    assert "FAILED" in second.splitlines()[-1]


def test_command_writes_json_and_its_exit_status_is_the_verdict(models: Path, artefact: Path) -> None:
    intact = provider("Lite0", "--models", models, "--threads", "1", "--precision", "bf16", "--json")
    flip_a_bit(artefact)
    damaged = provider(artefact, "--json")

    assert (intact.returncode, json.loads(intact.stdout)["ok"]) == (0, True)
    assert (damaged.returncode, json.loads(damaged.stdout)["ok"]) == (1, False)
    assert intact.stderr == damaged.stderr == ""


@pytest.mark.parametrize("arguments", [["nonsuch"], []])
def test_command_with_nothing_to_check_is_one_line(tmp_path: Path, arguments: list[str]) -> None:
    done = provider(*arguments, "--models", tmp_path / "none")

    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert not (tmp_path / "none").exists()


# Speeds


def speed(digest: str = "d" * 64, rate: float = 123.4) -> Speed:
    return Speed(digest=digest, images_per_second=rate, threads=2, precision="f32", measured_at="2026-01-01T00:00:00Z")


def test_speed_is_returned_for_the_same_digest_only(tmp_path: Path) -> None:
    assert write_speed(tmp_path, MODEL, speed())

    assert read_speed(tmp_path, MODEL, "d" * 64) == speed()
    assert read_speed(tmp_path, MODEL, "e" * 64) is None
    assert read_speed(tmp_path, "another", "d" * 64) is None
    assert [path.name for path in (tmp_path / ".speeds").iterdir()] == [f"{MODEL}.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"digest": 1}', "[" * 4000, "\xff"])
def test_speed_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    write_speed(tmp_path, MODEL, speed())
    (tmp_path / ".speeds" / f"{MODEL}.json").write_bytes(text.encode("latin-1"))

    assert read_speed(tmp_path, MODEL, "d" * 64) is None


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_invalid_speed_is_none(tmp_path: Path, rate: float) -> None:
    write_speed(tmp_path, MODEL, speed(rate=rate))

    assert read_speed(tmp_path, MODEL, "d" * 64) is None


def test_speed_that_cannot_be_written_is_not_an_error(tmp_path: Path) -> None:
    (tmp_path / ".speeds").touch()

    assert not write_speed(tmp_path, MODEL, speed())


def test_speed_is_stored_only_for_an_installed_model_measured_with_the_defaults(models: Path, artefact: Path) -> None:
    cores = available_cores()
    usual = check_model(artefact, seconds=SECONDS)
    copy = shutil.copytree(artefact, models.parent / "copy")

    others = [
        check_model(copy, seconds=SECONDS),
        check_model(artefact, Device(threads=cores + 1), seconds=SECONDS),
        check_model(artefact, Device(precision="bf16"), seconds=SECONDS),
    ]

    assert not any(record_speed(report, models) for report in others)
    assert record_speed(usual, models)
    assert read_speed(models, MODEL, usual.digest).threads == cores
