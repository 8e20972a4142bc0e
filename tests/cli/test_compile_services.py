"""`mlg models compile` with the services of models of one's own: what does not fit is one error line."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.compile import compile_models


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--keras", "a", "--service", "embedding"], "--service embedding is for --onnx FILE"),
        (["--huggingface", "a", "--service", "face_detection"], "--service face_detection is for --onnx FILE"),
        (["--onnx", "a", "--service", "embedding", "--labels", "b"], "--labels FILE is for classifiers"),
        (["--onnx", "a", "--service", "face_detection", "--returns", "logits"], "--returns is not for it"),
        (["--onnx", "a", "--input", "face"], "--onnx FILE needs --labels FILE"),
        (["--keras", "a", "--gpu"], "--gpu is for --onnx FILE"),
        (["--gpu"], "--gpu is for custom models"),
        (["--service", "embedding"], "--service is for custom models"),
        (["--onnx", "a", "--service", "faces"], "'faces' is not one of"),
    ],
)
def test_options_that_do_not_fit_a_service_are_refused(arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(compile_models, ["own", *arguments])

    assert (done.exit_code, words in " ".join(done.output.split())) == (2, True), done.output


@pytest.mark.parametrize("service", ["embedding", "face_detection"])
def test_a_file_that_is_not_there_is_named(service: str, tmp_path: Path) -> None:
    arguments = ["own", "--onnx", str(tmp_path / "no.onnx"), "--service", service, "--home", str(tmp_path)]

    done = CliRunner().invoke(compile_models, arguments)

    assert "no.onnx cannot be read" in str(done.exception)
