"""`mlg submit` with texts and rows of tables, against a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from server.settings import ServerSettings
from store.store import Store
from tests.conftest import ROOT, RunningServer
from tests.linear_models import RENT_ROW, install_linear_models
from tests.timing import DEADLINE_SECONDS


@pytest.fixture
def settings(tmp_path: Path) -> ServerSettings:
    home = tmp_path / "home"
    install_linear_models(home / "models")
    return ServerSettings(home=home, server_threads=4)


def submit(server: RunningServer, tmp_path: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    options = ["--url", server.base, "--home", str(tmp_path / "client")]
    command = [sys.executable, "-m", "mlg", "submit", *options, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_SECONDS)


def test_lines_are_rows_and_files_are_texts(server: RunningServer, store: Store, tmp_path: Path) -> None:
    table, texts = tmp_path / "flats.jsonl", tmp_path / "reviews"
    rows = [dict(RENT_ROW), {"area": 61, "city": None}]
    table.write_text("\n\n".join(map(json.dumps, [*rows, {"size": 1}])) + "\n")
    texts.mkdir()
    (server.home / "pipelines").mkdir(exist_ok=True)
    (server.home / "pipelines/flat_rents.toml").write_text('[steps.guess]\nmodel = "rent"\nrow = "request.row"\n')
    for name, text in (("a.txt", "not good"), ("b.txt", "wonderful"), ("c.json", "{}")):
        (texts / name).write_text(text)

    sent = submit(server, tmp_path, "--model", "Rent", table)
    again = submit(server, tmp_path, "--model", "Rent", table)
    moods = submit(server, tmp_path, "--model", "mood", texts)
    whole = submit(server, tmp_path, "--model", "mood", table)
    flats = submit(server, tmp_path, "--model", "Flat-rents", table)

    lines = [line.split("\t") for line in sent.stdout.splitlines()]
    assert [line[0] for line in lines] == [f"{table}:1", f"{table}:3"], sent.stderr
    assert sent.returncode == 1 and f"{table}:5" in sent.stderr and "size" in sent.stderr
    assert again.stdout == sent.stdout
    found = {request.id: request for request in store.requests.list(limit=10)}
    kept = [json.loads(store.images.path(found[line[1]].image_sha256).read_bytes()) for line in lines]
    assert kept == rows
    assert (found[lines[1][1]].service, found[lines[1][1]].name) == ("table", "flats.jsonl:3")
    assert [line.split("\t")[0] for line in whole.stdout.splitlines()] == [str(table)]
    names = [Path(line.split("\t")[0]).name for line in moods.stdout.splitlines()]
    assert (moods.returncode, names, len(found)) == (0, ["a.txt", "b.txt"], 8)
    assert [line.split("\t")[0] for line in flats.stdout.splitlines()] == [f"{table}:{n}" for n in (1, 3, 5)]


def test_an_empty_file_and_one_that_is_missing_are_named(server: RunningServer, tmp_path: Path) -> None:
    empty, out = tmp_path / "empty.jsonl", tmp_path / "out.csv"
    empty.write_text("\n")

    nothing = submit(server, tmp_path, "--model", "rent", "--out", out, empty)
    missing = submit(server, tmp_path, "--model", "rent", tmp_path / "no.jsonl")

    assert (nothing.returncode, nothing.stderr) == (2, f"mlg: {empty} is empty.\n")
    assert missing.returncode == 2 and "There is no file or folder" in missing.stderr
    assert not out.exists()
