"""Classes of an installed model get other names without compiling anything."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from cli.models import models as models_group
from provider_image.backends import Device, load_net
from provider_image.check import check_model
from provider_image.compiler.class_names import replace_names
from provider_image.compiler.labels import imagenet_labels
from provider_image.errors import BrokenArtefact, ConfigError, NotInstalled, UnsuitableModel
from provider_image.models.artefact import Artefact, read_artefact
from provider_image.models.registry import find_row
from provider_image.services.classification import Classification

MODEL = "efficientnet_lite0"
IDS = [id for id, _ in imagenet_labels()]
#: A translation with ids, not in the model's order.
GERMAN = "".join(f"{id}\tKlasse {number}\n" for number, id in reversed(list(enumerate(IDS)))).replace(
    "Klasse 285", "Ägyptische Mau"
)


@pytest.fixture
def models(tmp_path: Path, models_folder: Path) -> Path:
    """A models folder with a copy of the starter model, whose files are those of the original."""
    folder = tmp_path / "models" / MODEL
    folder.mkdir(parents=True)
    for file in (models_folder / MODEL).iterdir():
        (folder / file.name).hardlink_to(file)
    return folder.parent


def labels(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "labels.tsv"
    path.write_text(text, encoding="utf-8")
    return path


def answer(artefact: Artefact, photo: bytes) -> list[list[object]]:
    service = Classification()
    item = service.prepare(artefact, {"image": photo}, {})
    found: list[list[object]] = service.run(load_net(artefact, Device(threads=1)), [item], [{}])[0].data
    return found


def test_names_are_replaced_by_their_ids(models: Path, tmp_path: Path, photos: dict[str, bytes]) -> None:
    before = read_artefact(models / MODEL)
    english = answer(before, photos["chelsea"])

    after = replace_names(models, MODEL, labels(tmp_path, GERMAN))

    german = answer(after, photos["chelsea"])
    assert [(row[0], row[2]) for row in german] == [(row[0], row[2]) for row in english]
    assert ["n02124075", "Ägyptische Mau"] in [row[:2] for row in german]
    assert (after.files, after.source) == (before.files, before.source) and after.digest != before.digest
    assert check_model(after.folder, Device(threads=1), seconds=0.01).is_ok
    assert {path.name for path in models.iterdir()} == {MODEL, f".{MODEL}.lock"}


def test_a_name_a_line_counts_in_the_models_order(models: Path, tmp_path: Path) -> None:
    after = replace_names(models, MODEL, labels(tmp_path, "\n".join(f"Klasse {number}" for number in range(1000))))

    assert after.labels[:2] == (("n01440764", "Klasse 0"), ("n01443537", "Klasse 1"))


def test_a_copy_answers_beside_its_model(models: Path, tmp_path: Path) -> None:
    before = read_artefact(models / MODEL)

    copy = replace_names(models, MODEL, labels(tmp_path, GERMAN), copy_as="lite0_german", title="Auf Deutsch")

    assert (copy.name, copy.title, copy.source) == ("lite0_german", "Auf Deutsch", "own")
    assert find_row(models, "Lite0-German").title == "Auf Deutsch"
    assert read_artefact(models / MODEL) == before
    assert check_model(copy.folder, Device(threads=1), seconds=0.01).is_ok


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("cat\ndog\n", "1000 classes and .* 2 names"),
        (GERMAN.replace("n02124075\tÄgyptische Mau\n", ""), "does not name the class 'n02124075'"),
        (GERMAN + "n99999999\tNichts\n", "'n99999999', which the model does not have"),
        (GERMAN + GERMAN, "repeats"),
    ],
)
def test_a_file_that_does_not_name_each_class_once_is_refused(
    models: Path, tmp_path: Path, text: str, reason: str
) -> None:
    before = read_artefact(models / MODEL)

    with pytest.raises(UnsuitableModel, match=reason):
        replace_names(models, MODEL, labels(tmp_path, text))

    assert read_artefact(models / MODEL) == before


def test_a_damaged_or_missing_model_or_a_name_that_is_taken_is_refused(models: Path, tmp_path: Path) -> None:
    german = labels(tmp_path, GERMAN)
    with pytest.raises(ConfigError, match="is taken"):
        replace_names(models, MODEL, german, copy_as="resnet50")
    with pytest.raises(NotInstalled):
        replace_names(models, "resnet50", german)
    graph = models / MODEL / "model.bin"
    damaged = bytes(graph.stat().st_size)
    graph.unlink()
    graph.write_bytes(damaged)

    with pytest.raises(BrokenArtefact, match=r"model\.bin has changed"):
        replace_names(models, MODEL, german, copy_as="copy")

    assert not (models / "copy").exists()


def test_the_commands_list_and_replace_names(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    german = str(labels(tmp_path, GERMAN))

    def run(*arguments: str) -> str:
        models_group.main([*arguments, "--home", str(tmp_path)], standalone_mode=False)
        return capsys.readouterr().out

    listed = run("labels", "Lite0")
    replaced = run("labels", MODEL, german)
    listed_again = run("labels", MODEL)
    compiled = run("compile", MODEL, "--again", "--labels", german)

    assert listed.splitlines() == [f"{id}\t{name}" for id, name in imagenet_labels()]
    assert "n02124075\tÄgyptische Mau" in listed_again.splitlines()
    assert f"{MODEL} is installed in" in replaced and read_artefact(models / MODEL).digest[:12] in replaced
    assert compiled == replaced  # compiled again and renamed, it is the same artefact
    with pytest.raises(click.UsageError, match="--as NAME needs FILE"):
        run("labels", MODEL, "--as", "other")
    with pytest.raises(click.UsageError, match="--title is for"):
        run("labels", MODEL, german, "--title", "Other")
