"""The group `mlg models` as a user runs it; `test_compile.py` tests installing."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from provider_image.models.catalogue import CATALOGUE
from tests.cli.run_mlg import ROOT, mlg
from tests.timing import DEADLINE_SECONDS

MODEL = "efficientnet_lite0"


def test_models_are_listed_with_and_without_the_subcommand(tmp_path: Path, models_folder: Path) -> None:
    (tmp_path / "models").symlink_to(models_folder)

    bare = mlg("models", home=tmp_path)
    as_json = [json.loads(line) for line in mlg("models", "list", "--json", home=tmp_path).stdout.splitlines()]
    group_json = mlg("models", "--json", "--home", str(tmp_path)).stdout.splitlines()

    assert re.search(r"efficientnet_lite0 .* 224 x 224 +yes", bare.stdout)
    assert re.search(r"nasnet_large .* 331 x 331 +no", bare.stdout)
    assert len(as_json) == len(group_json) == len(CATALOGUE)
    assert as_json[0]["installed"] is True
    assert (as_json[0]["storage"], as_json[0]["images_per_second"]) == ("f32", None)
    assert as_json[0]["size_bytes"] > 18e6
    assert re.search(rf"yes +{as_json[0]['digest'][:12]} +1\d\.\d +f32\s", bare.stdout)
    assert "mlg models check" in bare.stderr
    assert all(len(line) < 130 for line in bare.stdout.splitlines())


def test_models_fit_a_terminal_of_100_columns(tmp_path: Path, models_folder: Path) -> None:
    (tmp_path / "models").symlink_to(models_folder)
    main, other = pty.openpty()
    termios.tcsetwinsize(other, (40, 100))

    process = subprocess.Popen(
        [sys.executable, "-m", "mlg", "models"],
        cwd=ROOT,
        stdout=other,
        stderr=subprocess.DEVNULL,
        env={**{k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}, "MLG_HOME": str(tmp_path)},
    )
    os.close(other)
    shown = b""
    with os.fdopen(main, "rb", buffering=0) as terminal, contextlib.suppress(OSError):  # reading ends with an error
        while data := terminal.read(65536):
            shown += data
    status = process.wait(DEADLINE_SECONDS)

    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).split("\r\n")
    assert status == 0
    # A line for each model and one for the embedding that is there on first use, below its model.
    assert len([line for line in lines if line]) == 2 + sum(row.base is None for row in CATALOGUE.values())
    assert re.match(r"  _embedding +embedding +224 x 224 +first use", lines[2])
    assert all(word in lines[0] for word in ("service", "input", "digest", "MB", "weights", "images/s"))
    assert max(map(len, lines)) <= 100


def test_models_check_reports_ok_and_the_list_shows_the_speed_afterwards(tmp_path: Path, models_folder: Path) -> None:
    shutil.copytree(models_folder / MODEL, tmp_path / "models" / MODEL)

    checked = mlg("models", "check", "EfficientNet-Lite0", home=tmp_path)
    listed = mlg("models", home=tmp_path)
    as_json = json.loads(mlg("models", "list", "--json", home=tmp_path).stdout.splitlines()[0])

    assert (checked.returncode, checked.stderr) == (0, "")
    assert checked.stdout.startswith(f"{MODEL} (EfficientNet-Lite0)\n")
    assert checked.stdout.splitlines()[-1].split() == ["verdict", "ok"]
    speed = re.search(r"speed +([\d.]+) images/s", checked.stdout)
    assert speed and as_json["images_per_second"] == pytest.approx(float(speed[1]), abs=0.06)
    assert (listed.stderr, "f32" in listed.stdout) == ("", True)


def test_models_check_accepts_the_path_of_an_artefact_and_fails_if_it_is_damaged(
    tmp_path: Path, models_folder: Path
) -> None:
    copy = Path(shutil.copytree(models_folder / MODEL, tmp_path / "copy"))
    options = ("--json", "--threads", "1", "--precision", "bf16", "--home", str(tmp_path / "home"))
    intact = mlg("models", "check", str(copy), *options)
    data = bytearray((copy / "model.bin").read_bytes())
    data[1000] ^= 1
    (copy / "model.bin").write_bytes(data)

    damaged = mlg("models", "check", str(copy), "densenet121", *options)

    report = json.loads(intact.stdout)
    assert (intact.returncode, report["ok"], report["threads"], report["precision"]) == (0, True, 1, "bf16")
    assert damaged.returncode == 1
    problems = [json.loads(line)["problem"] for line in damaged.stdout.splitlines()]
    assert "model.bin has changed" in problems[0]
    assert "mlg models compile densenet121" in problems[1]
    assert not (tmp_path / "home").exists()


def test_models_check_of_an_unknown_model_is_one_error_line(tmp_path: Path) -> None:
    done = mlg("models", "check", "densenet12", home=tmp_path)

    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "densenet121" in done.stderr
