"""`mlg models compile` for vision transformers: where their folders are found, and what is said without them."""

from __future__ import annotations

from pathlib import Path

import pytest

from provider_image.models.artefact import read_artefact
from tests.cli.run_mlg import mlg
from tests.transformer_folders import config_of, seeded_tensors, write_folder

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def test_a_custom_transformer_is_installed_with_its_embedding(tmp_path: Path) -> None:
    config = config_of("vit", ["owl", "wren"])
    folder = write_folder(tmp_path / "given", config, seeded_tensors(config), HALF)

    done = mlg("models", "compile", "my_birds", "--huggingface", str(folder), "--title", "My birds", home=tmp_path)
    embedded = mlg("models", "compile", "my_birds_embedding", home=tmp_path)

    assert (done.returncode, embedded.returncode) == (0, 0), done.stderr + embedded.stderr
    artefact = read_artefact(tmp_path / "models" / "my_birds")
    assert (artefact.title, artefact.labels[0], artefact.preprocessing) == ("My birds", ("owl", "owl"), "tf")
    assert "reading weights" in done.stderr and "my_birds is installed in" in done.stdout
    assert "a vector of 32 values" in embedded.stdout


def test_the_folder_of_a_catalogue_model_is_found_by_option_and_variable(tmp_path: Path) -> None:
    config = config_of("vit")
    weights = tmp_path / "weights"
    write_folder(weights / "vit_base_patch16_224", config, {})
    wrong = "describes a vit with 32 values, 2 layers and images of 32 pixels"

    for arguments, variables in (
        (["--weights", str(weights / "vit_base_patch16_224")], {}),
        (["--weights", str(weights)], {}),
        ([], {"MLG_WEIGHTS_DIR": str(weights)}),
    ):
        done = mlg("models", "compile", "vit_base_patch16_224", *arguments, home=tmp_path, **variables)

        assert done.returncode == 1
        assert wrong in done.stderr.splitlines()[-1]


def test_all_leaves_out_transformers_without_a_folder_and_says_which(tmp_path: Path) -> None:
    write_folder(tmp_path / "beit_base", config_of("beit"), {})

    done = mlg("models", "compile", "all", "--weights", str(tmp_path), home=tmp_path)

    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if "left out" in line)
    assert "vit_base_patch16_224, vit_large_patch16_224, deit_base, deit_base_distilled" in line
    assert "beit_base" not in line and "embedding" not in line
    assert "mlg: beit_base: " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["beit_base"], 1, "Give it: mlg models compile beit_base --weights FOLDER"),
        (["beit_base", "--weights", "/nowhere"], 1, "It is not in /nowhere or /nowhere/beit_base."),
        (["beit_base_embedding"], 1, "Give it: mlg models compile beit_base --weights FOLDER"),
        (["my_birds", "--huggingface", "/nowhere"], 1, "There is no /nowhere/config.json"),
        (["my_birds", "--huggingface", "a", "--keras", "b"], 2, "exclude each other"),
        (["my_birds", "--huggingface", "a", "--weights", "b"], 2, "--huggingface FOLDER contains its weights"),
        (["my_birds", "--huggingface", "a", "--size", "8x8"], 2, "its config.json fixes that"),
        (["my_birds", "--huggingface", "a", "--channels", "bgr"], 2, "--channels is for --onnx"),
        (["my_birds", "--huggingface", "a", "--preprocessing", "caffe"], 2, "whose models take RGB"),
        (["all", "--huggingface", "a"], 2, "installs one model"),
    ],
)
def test_mistakes_are_one_error_line(tmp_path: Path, arguments: list[str], status: int, words: str) -> None:
    done = mlg("models", "compile", *arguments, home=tmp_path)

    assert (done.returncode, words in done.stderr.splitlines()[-1]) == (status, True), done.stderr
    assert "Traceback" not in done.stderr
