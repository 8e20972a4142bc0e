"""Images of faces stay with executors that are trusted, unless the operator says otherwise."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from batcher.errors import ExecutorUnavailable
from batcher.executors import Job, Outcome
from batcher.executors.fallback import FallbackExecutor
from batcher.executors.trusted import FacesSettings, WithoutFaces
from provider_image.compiler.installing import begin_artefact, build_folder, install
from provider_image.models.catalogue import ModelFacts
from tests.batcher.executors.test_fallback import Member

FACE_MODELS = ("face_detector", "face_crop", "face_quality", "face_pictures")


def job(model: str, tmp_path: Path) -> Job:
    return Job(
        chunk_id=model,
        model=model,
        items=1,
        chunk=tmp_path / "chunk.zip",
        results=tmp_path / "results.zip",
        timeout_seconds=9,
    )


def run(executor: WithoutFaces | FallbackExecutor, model: str, tmp_path: Path) -> Outcome:
    return asyncio.run(executor.run(job(model, tmp_path)))


@pytest.fixture
def golem() -> Member:
    return Member("golem", is_remote=True)


@pytest.mark.parametrize("model", FACE_MODELS)
def test_strangers_get_no_faces_and_requests_say_why_they_wait(model: str, golem: Member, tmp_path: Path) -> None:
    executor = WithoutFaces(golem, tmp_path)

    outcome = run(executor, model, tmp_path)

    assert "MLG_FACES_REMOTE" in (executor.unavailable_reason(model) or "")
    assert isinstance(outcome.error, ExecutorUnavailable) and outcome.is_blameless
    assert golem.received == []


def test_strangers_get_other_images(golem: Member, tmp_path: Path) -> None:
    executor = WithoutFaces(golem, tmp_path)

    assert executor.unavailable_reason("efficientnet_lite0") is None
    assert run(executor, "efficientnet_lite0", tmp_path).provider == "golem"


@pytest.mark.parametrize("order", ["golem,local", "local,golem"])
def test_with_several_executors_faces_go_to_the_trusted_one(order: str, golem: Member, tmp_path: Path) -> None:
    local = Member("local")
    members = {"golem": WithoutFaces(golem, tmp_path), "local": local}
    executor = FallbackExecutor([members[name] for name in order.split(",")], {})

    outcome = run(executor, "face_detector", tmp_path)

    assert executor.unavailable_reason("face_detector") is None
    assert (outcome.provider, golem.received) == ("local", [])


@pytest.mark.parametrize(("takes_faces", "received"), [(True, []), (False, ["arcface"])])
def test_a_model_of_ones_own_counts_if_it_was_installed_for_faces(
    takes_faces: bool, received: list[str], golem: Member, tmp_path: Path
) -> None:
    row = ModelFacts(name="arcface", title="A", service="embedding", preprocessing="none", takes_faces=takes_faces)
    with build_folder(tmp_path, row.name) as folder:
        install(begin_artefact(row, weights_sha256="", recipe="test", reference="test"), folder, tmp_path, ())

    run(WithoutFaces(golem, tmp_path), "arcface", tmp_path)

    assert golem.received == received


def test_faces_are_sent_to_strangers_only_if_the_operator_says_so() -> None:
    assert not FacesSettings.from_env({}).faces_remote
    assert FacesSettings.from_env({"MLG_FACES_REMOTE": "on"}).faces_remote
