"""The command `mlg golem check`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.run_mlg import mlg


@pytest.fixture
def home(tmp_path: Path, models_folder: Path) -> Path:
    (tmp_path / "models").symlink_to(models_folder)
    return tmp_path


def test_it_prints_what_is_wrong_and_what_to_do_and_fails(home: Path) -> None:
    variables = {"YAGNA_APPKEY": "key", "YAGNA_API_URL": "http://127.0.0.1:9", "MLG_GOLEM_IMAGE": "", "PATH": "/bin"}

    shown = mlg("golem", "check", home=home, **variables)
    listed = mlg("golem", "check", "lite0", "--json", home=home, **variables)

    lines = shown.stdout.splitlines()
    assert (shown.returncode, shown.stderr, listed.returncode) == (1, "", 1)
    assert lines[0].startswith("FAILED  daemon: No daemon responds at http://127.0.0.1:9")
    assert lines[1].startswith("        Start it: yagna service run.")
    rows = [json.loads(line) for line in listed.stdout.splitlines()]
    assert [(row["name"], row["is_ok"]) for row in rows] == [
        *(("daemon", False), ("gftp", False), ("image of efficientnet_lite0", False))
    ]


def test_an_unknown_model_is_an_error(home: Path) -> None:
    done = mlg("golem", "check", "efficientnet_lite9", home=home)

    assert done.returncode != 0 and done.stderr.count("\n") == 1 and "efficientnet_lite0" in done.stderr


def test_without_an_installed_model_the_rest_is_checked_too(tmp_path: Path) -> None:
    done = mlg("golem", "check", home=tmp_path, YAGNA_APPKEY="", PATH="/bin")

    assert (done.returncode, done.stderr) == (1, "")
    assert [line.split(":")[0] for line in done.stdout.splitlines() if line.startswith("FAILED")] == [
        "FAILED  app key",
        "FAILED  gftp",
        "FAILED  models",
    ]
