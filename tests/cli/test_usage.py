"""The command `mlg usage`."""

from __future__ import annotations

import csv
import io
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.clients.usage import usage
from store import new_id
from store.clients.keys import KeyRecord, Scope, UnknownKey
from store.clients.usage import ClientKind
from store.requests import NewRequest
from store.settings import HomeSettings
from tests.stores import open_store

NOW = datetime.now(UTC)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home in which a key with a quota has sent two images, and somebody without a key one."""
    monkeypatch.setenv("MLG_HOME", str(tmp_path / "home"))
    store = open_store(HomeSettings(home=tmp_path / "home"))
    key = KeyRecord(
        id="alice0000000",
        name="alice",
        sha256="0" * 64,
        scopes=frozenset({Scope.SUBMIT}),
        images_per_day=5,
        created_at=NOW,
    )
    store.keys.add(key)
    for key_id in (key.id, key.id, None):
        new = NewRequest(
            id=new_id(),
            service="classification",
            model="vgg16",
            key_id=key_id,
            client=ClientKind.CURL,
            created_at=NOW,
        )
        store.requests.add(new, store.images.stage(b"image"))
    store.close()
    return tmp_path / "home"


def run(*arguments: str) -> str:
    result = CliRunner().invoke(usage, list(arguments))
    if result.exception is not None:
        raise result.exception
    return result.output


def test_usage_is_listed_with_a_total_and_quotas(home: Path) -> None:
    lines = [line.split() for line in run("--by", "key,client").splitlines()]

    assert lines[0][:4] == ["key", "client", "requests", "done"]
    assert [line[:3] for line in lines[1:3]] == [["alice", "curl", "2"], ["no", "key", "curl"]]
    assert lines[3][:3] == ["total", "total", "3"]
    assert lines[-1] == ["alice", "2", "5", "3"]


def test_usage_of_one_key_as_json_and_csv(home: Path) -> None:
    (row,) = [json.loads(line) for line in run("--key", "alice", "--json").splitlines()]
    (cells,) = csv.DictReader(io.StringIO(run("--by", "model", "--csv", "--key", "alice0000000")))

    assert (row["day"], row["accepted"], row["cost"]) == (NOW.date().isoformat(), 2, "0")
    assert (cells["model"], cells["accepted"]) == ("vgg16", "2")
    with pytest.raises(UnknownKey, match="mlg keys list"):
        run("--key", "bob")
