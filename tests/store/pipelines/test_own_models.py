"""Steps for all models of one's own that take faces, and the pipelines of faces that are part of mlg."""

from __future__ import annotations

from pathlib import Path

import pytest

from provider_image.compiler.installing import begin_artefact, build_folder, install
from provider_image.models.catalogue import ModelFacts
from store.pipelines.definition import InvalidPipeline, parse_pipeline
from store.pipelines.folder import PipelineFolder


def install_empty(models: Path, name: str, service: str, *, takes_faces: bool = True) -> None:
    """Install a model that is only described."""
    row = ModelFacts(
        name=name, title=name, service=service, preprocessing="none", source="own", takes_faces=takes_faces
    )
    with build_folder(models, name) as folder:
        install(begin_artefact(row, weights_sha256="", recipe="test", reference="test"), folder, models, ())


def steps(home: Path) -> dict[str, str]:
    """The models of the steps of `faces`."""
    pipeline = PipelineFolder(home, home / "models").find("faces")
    assert pipeline is not None
    return {step.name: step.model for step in pipeline.steps}


def test_faces_are_found_cut_out_and_measured(tmp_path: Path) -> None:
    assert steps(tmp_path) == {"detect": "face_detector", "crop": "face_crop", "quality": "face_quality"}


def test_each_model_that_was_installed_for_faces_answers_for_each_face(tmp_path: Path) -> None:
    install_empty(tmp_path / "models", "age", "classification")
    install_empty(tmp_path / "models", "arcface", "embedding")
    install_empty(tmp_path / "models", "yunet", "face_detection")
    install_empty(tmp_path / "models", "cars", "classification", takes_faces=False)
    install_empty(tmp_path / "models", "3d", "regression")

    found = steps(tmp_path)

    assert found.items() >= {("age", "age"), ("arcface", "arcface")}
    assert sorted(found.values()) == ["3d", "age", "arcface", "face_crop", "face_detector", "face_quality"]
    pipeline = PipelineFolder(tmp_path, tmp_path / "models").find("faces")
    assert pipeline is not None and {step.for_each for step in pipeline.steps[1:]} == {"detect.faces"}


@pytest.mark.parametrize("table", ['models = "cats"', 'models = ["faces"]', 'models = "faces"\nmodel = "crop"'])
def test_other_values_of_models_are_refused(table: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidPipeline, match="models can only be 'faces'"):
        parse_pipeline("p", f"[steps.own]\n{table}", tmp_path)


def test_the_pipeline_that_fills_a_collection_is_valid(tmp_path: Path) -> None:
    pipeline = PipelineFolder(tmp_path, tmp_path / "models").find("face_search")

    assert pipeline is not None and pipeline.steps[-1].collection == "faces"
