"""Copies of a model in other precisions, as a user installs and lists them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.run_mlg import mlg
from tests.reduced_models import install_colours, install_copy, write_photos


def test_a_copy_is_installed_with_figures_that_the_list_shows(tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    install_colours(tmp_path / "models")
    photos = write_photos(tmp_path / "photos", 40)

    done = mlg(
        "models", "compile", "Colours", "--precision", "int8", "--calibrate", str(photos), home=tmp_path, MLG_DEBUG="1"
    )

    assert done.returncode == 0, done.stderr
    assert "colours_int8 is installed" in done.stdout and "first label as colours on" in done.stdout
    assert "colours_int8: judging" in done.stderr
    facts = json.loads((tmp_path / "models/colours_int8/model.json").read_text())["reduced"]
    share = f"{facts['same_first_label']} of {facts['images']} images"
    listed = mlg("models", home=tmp_path).stdout
    assert re.search(rf"\n  _int8 .*int8.*\n(.*\n)*\ncolours_int8: first label as colours on {share}", listed)


def test_the_json_says_which_copy_is_taken(tmp_path: Path) -> None:
    install_colours(tmp_path / "models")
    install_copy(tmp_path / "models", "colours")

    def reduced() -> dict[str, object]:
        rows = [json.loads(line) for line in mlg("models", "list", "--json", home=tmp_path).stdout.splitlines()]
        found: dict[str, object] = next(row for row in rows if row["name"] == "colours_int8")["reduced"]
        return found

    assert reduced().items() >= {"base": "colours", "images": 1000, "bound": 0.2, "is_quickest": True}.items()
    install_copy(tmp_path / "models", "colours", processor_id="another")
    assert reduced()["is_quickest"] is False


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--precision", "int8"], "--calibrate FOLDER"),
        (["--calibrate", "photos"], "are for --precision"),
        (["--precision", "int4", "--calibrate", "photos"], "int4"),
        (["--precision", "int8", "--calibrate", "photos", "--title", "T"], "build that first"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = mlg("models", "compile", "efficientnet_lite0", *arguments, home=tmp_path)

    assert (done.returncode, words in done.stderr) == (2, True), done.stderr
