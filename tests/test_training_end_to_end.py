"""A training as a user does it: photos in folders become a model that is asked over HTTP; processes are killed."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from devnet.scenario import PROVIDER_NAMES
from scripts.benchmarks.execution import golem
from tests.conftest import ROOT
from tests.system import System
from tests.timing import wait_until


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    system = System(tmp_path_factory.mktemp("up") / "home", MLG_WORKERS="1")
    yield system
    system.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, photos: dict[str, bytes]) -> Path:
    """Eight different parts of each of two photos, in a folder for each, and a file that is no image."""
    folder = tmp_path_factory.mktemp("photos")
    for name, label in (("chelsea", "cats"), ("coffee", "cups")):
        (folder / label).mkdir()
        photo = Image.open(io.BytesIO(photos[name]))
        for number in range(8):
            part(photo, number).save(folder / label / f"{number}.jpg", "JPEG")
    (folder / "cats" / "broken.jpg").write_bytes(b"no image")
    return folder


def part(photo: Image.Image, number: int) -> Image.Image:
    """Cut a part out of a photo, at another place for each number."""
    side = min(photo.size) * 3 // 4
    left, top = (photo.width - side) * number // 8, (photo.height - side) * (number * 3 % 8) // 8
    return photo.crop((left, top, left + side, top + side)).resize((160, 160))


def run_mlg(system: System, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlg", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "MLG_URL": system.base, "MLG_HOME": str(system.home)},
    )


def ask(system: System, data: bytes, model: str = "pets") -> Any:
    return system.answer(system.post(data, model=model)["req_id"])


@pytest.mark.slow
def test_photos_in_folders_become_a_model(
    system: System, folder: Path, photos: dict[str, bytes], tmp_path: Path
) -> None:
    trained = run_mlg(system, "train", "pets", str(folder), "--out", str(tmp_path / "figures"))

    assert trained.returncode == 0, trained.stderr + system.log.read_text()
    assert "pets, version 1: " in trained.stdout and "% right of 16" in trained.stdout
    assert max(map(len, trained.stdout.splitlines())) <= 100 or "http" in trained.stdout
    assert "broken.jpg" in trained.stderr
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"answers.csv", "mistakes.csv", "confusion.png"}
    assert (tmp_path / "figures" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    for name, label in (("chelsea", "cats"), ("coffee", "cups")):
        answer = ask(system, photos[name])
        assert (answer["preds"][0][1], len(answer["preds"])) == (label, 2)

    # Other data, and a second version by another seed while the batcher is killed.
    evaluated = run_mlg(system, "evaluate", "pets", str(folder), "--with", "pets", "--json")
    figures = json.loads(evaluated.stdout)
    assert figures["models"]["pets"]["accuracy"] == 1.0
    assert (figures["comparison"]["count"], figures["comparison"]["equal"]) == (16, 16)

    sent = run_mlg(system, "train", "pets", str(folder), "--seed", "1", "--no-wait", "--json")
    id = json.loads(sent.stdout)["training_id"]
    for pid in system.pids("batch"):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: json.loads(run_mlg(system, "trainings", "show", id, "--json").stdout)["state"] == "done")
    versions = [
        json.loads(line) for line in run_mlg(system, "models", "versions", "pets", "--json").stdout.splitlines()
    ]
    assert [(one["version"], one["is_used"], one["is_kept"]) for one in versions] in (
        [(2, True, True), (1, False, True)],
        [(2, True, True), (1, True, True)],  # the seed made no difference
    )
    first = versions[1]["digest"]
    assert run_mlg(system, "models", "use", "pets@1").returncode == 0
    variant = io.BytesIO()
    part(Image.open(io.BytesIO(photos["chelsea"])), 3).save(variant, "PNG")
    assert ask(system, variant.getvalue())["digest"] == first


@pytest.mark.slow
def test_features_come_from_rented_computers(folder: Path, tmp_path: Path, models_folder: Path) -> None:
    providers = tmp_path / "providers"
    # A copy: the devnet installs further models.
    shutil.copytree(models_folder, providers / "models")

    with golem.devnet(tmp_path, providers, golem.scenario(tmp_path, 2, {})) as variables:
        system = System(tmp_path / "home", "--executor", "golem", **variables)
        try:
            trained = run_mlg(system, "train", "pets", str(folder), "--json")
            assert trained.returncode == 0, trained.stderr + system.log.read_text()
            figures = json.loads(trained.stdout)["figures"]
            listed = run_mlg(system, "requests", "list", "--model", "efficientnet_lite0_embedding", "--json")
        finally:
            system.stop()

    features = [json.loads(line) for line in listed.stdout.splitlines()]
    assert (figures["count"], figures["accuracy"]) == (16, 1.0)
    assert len(features) == 16
    assert {one["provider"] for one in features} <= set(PROVIDER_NAMES)
    assert all(one["cost"] is not None for one in features)
