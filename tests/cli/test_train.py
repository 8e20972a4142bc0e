"""`mlg train`, `mlg evaluate`, `mlg trainings` and the versions of models: their errors, and what they print."""

from __future__ import annotations

import csv
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cli.training.archive import names_images, read_archive
from cli.training.shown import headline, print_figures
from provider_image.errors import ConfigError
from server.settings import ServerSettings
from store import new_id
from store.store import Store
from store.trainings.records import TrainingKind, TrainingRecord
from tests.cli.run_mlg import mlg
from tests.conftest import RunningServer
from tests.server.api.test_batch_views import make_image
from tests.server.api.test_trainings import two_classes
from trainer.errors import UnusableExamples

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


def finish(store: Store, name: str, **figures: Any) -> TrainingRecord:
    training = TrainingRecord(id=new_id(), name=name, kind=TrainingKind.TABLE, target="x", created_at=NOW)
    store.trainings.add(training)
    claimed = store.trainings.claim(training.id, now=NOW)
    assert claimed is not None
    assert store.trainings.finish(claimed, digest="d" * 64, figures=figures, files={}, now=NOW)
    return training


def test_a_folder_is_sent_as_a_zip_and_a_table_as_it_is(tmp_path: Path) -> None:
    import io
    import zipfile

    (tmp_path / "photos" / "cats").mkdir(parents=True)
    (tmp_path / "photos" / "cats" / "1.png").write_bytes(make_image(1))
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    table = tmp_path / "rows.csv"
    table.write_text("name,size\nsmall,1\n")

    archive = zipfile.ZipFile(io.BytesIO(read_archive(tmp_path / "photos", target=None, label=None)))

    assert archive.namelist() == ["cats/1.png"]
    assert archive.read("cats/1.png") == make_image(1)
    assert read_archive(table, target="size", label=None) == table.read_bytes()
    with pytest.raises(ConfigError, match="There is no file"):
        read_archive(tmp_path / "nothing", target=None, label=None)


def test_a_table_that_names_images_is_sent_with_them(tmp_path: Path) -> None:
    import io
    import zipfile

    table = tmp_path / "scores.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["image", "score"], *([f"{n}.png", n] for n in range(10))])
    for number in range(10):
        (tmp_path / f"{number}.png").write_bytes(make_image(number))

    archive = zipfile.ZipFile(io.BytesIO(read_archive(table, target="score", label=None)))

    assert names_images(table)
    assert archive.namelist() == ["scores.csv", *(f"{n}.png" for n in range(10))]
    with pytest.raises(UnusableExamples, match="colour"):
        read_archive(table, target="colour", label=None)


def test_figures_are_wrapped_and_safe_for_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a/rather/long/path/of/an/image/that/nobody/wants/to/read.jpg"
    per_class = [{"name": name, "count": 5, "recall": 1.0, "precision": None}]
    mistakes = [{"name": name, "true": name, "predicted": "cats\x1b[31m", "probability": 0.99}]
    left_out = [{"name": name, "reason": "It is broken."}]
    shared = {"kind": "classification", "count": 5, "basis": "word " * 60, "per_class": per_class}
    accuracy = {"accuracy": 0.8, "accuracy_low": 0.4, "accuracy_high": 0.95}

    print_figures({**shared, **accuracy, "mistakes": mistakes, "left_out": left_out, "left_out_count": 1})

    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if "word" in line) <= 80
    assert "100.0 %" in printed and "\x1b" not in printed and "1 examples were left out" in printed
    assert headline({**shared, **accuracy}) == "80.0 % right of 5 (95 % interval: 40.0 % to 95.0 %)"
    assert headline({"kind": "classification", "count": 0}) == "no figures: too few different examples"


def test_a_server_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "pets.zip").write_bytes(two_classes())

    done = mlg("train", "pets", str(tmp_path / "pets.zip"), "--url", "http://127.0.0.1:9", "--no-wait", MLG_DEBUG="")

    assert done.returncode == 1
    assert "does not answer" in done.stderr and "mlg up" in done.stderr


def test_what_a_server_refuses_is_one_line(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "few.zip").write_bytes(two_classes(count=2))
    (tmp_path / "pets.zip").write_bytes(two_classes())

    few = mlg("train", "pets", str(tmp_path / "few.zip"), "--url", server.base)
    sent = mlg("train", "pets", str(tmp_path / "pets.zip"), "--url", server.base, "--no-wait", "--json")

    assert few.returncode == 1 and few.stderr.startswith("mlg: Each class needs at least 5 images")
    assert json.loads(sent.stdout)["accepted"] == 10


def test_trainings_are_listed_shown_and_cancelled(settings: ServerSettings, store: Store) -> None:
    done = finish(store, "pets", kind="classification", count=0)
    waiting = store.trainings.add(
        TrainingRecord(id=new_id(), name="cars", kind=TrainingKind.TABLE, target="x", created_at=NOW)
    )

    listed = mlg("trainings", "list", "--json", home=settings.home)
    shown = mlg("trainings", "show", done.id, home=settings.home)
    cancelled = mlg("trainings", "cancel", waiting.id, home=settings.home)
    again = mlg("trainings", "cancel", waiting.id, home=settings.home)

    assert [json.loads(line)["name"] for line in listed.stdout.splitlines()] == ["cars", "pets"]
    assert shown.stdout.startswith("pets, version 1: done, no figures")
    assert cancelled.returncode == 0
    assert (again.returncode, "has ended already" in again.stderr) == (1, True)


def test_a_version_that_does_not_exist_is_an_error(settings: ServerSettings, store: Store) -> None:
    finish(store, "pets", kind="classification", count=0)

    listed = mlg("models", "versions", "pets", "--json", home=settings.home)
    unknown = mlg("models", "use", "pets@7", home=settings.home)
    deleted = mlg("models", "use", "pets@1", home=settings.home)
    untrained = mlg("models", "versions", "cars", home=settings.home)

    assert [(one["version"], one["is_kept"]) for one in map(json.loads, listed.stdout.splitlines())] == [(1, False)]
    for one in (unknown, deleted, untrained):
        assert one.returncode == 1 and one.stderr.startswith("mlg: "), one
