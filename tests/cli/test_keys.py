"""The commands of `mlg keys`, and servers that need a key before they listen for other machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click.testing
import httpx
import pytest

from cli.keys import keys
from store.clients.keys import hash_key, key_id_of
from tests.conftest import RunningServer
from tests.timing import DEADLINE_SECONDS

ROOT = Path(__file__).parents[2]


def run(home: Path, *arguments: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(keys, [*arguments, "--home", str(home)])


def rows(home: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in run(home, "list", "--json").stdout.splitlines()]


def test_only_the_key_is_written_to_stdout_and_only_its_hash_is_stored(tmp_path: Path) -> None:
    created = run(tmp_path / "home", "create", "alice")

    key = created.stdout.strip()
    assert created.exit_code == 0
    assert created.stdout == f"{key}\n"
    assert "first key" in created.stderr
    assert key not in created.stderr
    database = b"".join(path.read_bytes() for path in (tmp_path / "home").glob("mlg.db*"))
    assert hash_key(key).encode() in database
    assert key[17:].encode() not in database


def test_only_the_first_key_is_announced_as_such(tmp_path: Path) -> None:
    run(tmp_path, "create", "alice")

    assert run(tmp_path, "create", "bob").stderr == ""


def test_keys_are_listed_with_their_scopes_and_limits(tmp_path: Path) -> None:
    key = run(tmp_path, "create", "alice").stdout.strip()
    limits = ("--quota", "1000", "--rate", "120", "--expires", "90d")
    run(tmp_path, "create", "bob", "--scope", "operate", *limits)

    alice, bob = rows(tmp_path)
    table = run(tmp_path, "list").stdout

    assert (alice["id"], alice["name"], alice["scopes"]) == (key_id_of(key), "alice", ["read", "submit"])
    assert (alice["pictures_per_day"], alice["requests_per_minute"], alice["expires_at"]) == (None, None, None)
    assert (bob["scopes"], bob["pictures_per_day"], bob["requests_per_minute"]) == (["operate"], 1000, 120)
    assert (bob["is_usable"], bob["pictures_today"], bob["last_used_at"]) == (True, 0, None)
    assert str(bob["expires_at"]) > str(bob["created_at"])
    assert "0 of 1000" in table
    assert key[17:] not in table + json.dumps(alice)


@pytest.mark.parametrize("by", ["name", "id"])
def test_a_key_is_revoked_by_name_or_id(tmp_path: Path, by: str) -> None:
    run(tmp_path, "create", "alice")
    (alice,) = rows(tmp_path)

    revoked = run(tmp_path, "revoke", str(alice[by]))

    assert revoked.stdout == f"alice\t{alice['id']}\trevoked\n"
    assert rows(tmp_path)[0]["is_usable"] is False
    assert "revoked 2" in run(tmp_path, "list").stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("create", ""), "printable"),
        (("create", "a\nb"), "printable"),
        (("create", "x" * 101), "printable"),
        (("create", "bob", "--quota", "0"), "quota"),
        (("create", "bob", "--rate", "-1"), "rate"),
        (("create", "bob", "--scope", "everything"), "scope"),
        (("create", "bob", "--expires", "soon"), "duration"),
        (("create", "bob", "--expires", "0d"), "duration"),
    ],
)
def test_a_bad_argument_is_an_error_and_creates_no_key(tmp_path: Path, arguments: tuple[str, ...], word: str) -> None:
    run(tmp_path, "create", "alice")

    done = run(tmp_path, *arguments)

    assert (done.exit_code, done.stdout) == (2, "")
    assert word in done.stderr
    assert len(rows(tmp_path)) == 1


def test_a_name_can_be_used_once(tmp_path: Path) -> None:
    run(tmp_path, "create", "alice")

    again = run(tmp_path, "create", "alice")

    assert (again.exit_code, again.stdout) == (1, "")
    assert len(rows(tmp_path)) == 1


def test_a_server_for_other_machines_starts_only_with_a_key(
    start_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    home = tmp_path / "home"
    refused = subprocess.run(
        [sys.executable, "-m", "mlg", "serve", "--home", str(home), "--port", "0", "--host", "0.0.0.0"],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    key = run(home, "create", "alice").stdout.strip()

    base = start_server("--host", "0.0.0.0").base.replace("0.0.0.0", "127.0.0.1")
    with httpx.Client(base_url=base, trust_env=False) as client:
        statuses = [
            client.get("/readPrediction/x").status_code,
            client.get("/readPrediction/x", headers={"Authorization": f"Bearer {key}"}).status_code,
            client.get("/healthz").status_code,
        ]

    assert refused.returncode == 2
    assert "mlg keys create" in refused.stderr
    assert statuses == [401, 404, 200]


def test_up_fails_like_serve_before_it_starts_anything(tmp_path: Path) -> None:
    refused = subprocess.run(
        [sys.executable, "-m", "mlg", "up", "--home", str(tmp_path), "--port", "0", "--host", "0.0.0.0"],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )

    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--open" in refused.stderr


def test_an_open_server_for_other_machines_starts_without_keys(
    start_server: Callable[..., RunningServer],
) -> None:
    base = start_server("--host", "0.0.0.0", "--open").base.replace("0.0.0.0", "127.0.0.1")

    with httpx.Client(base_url=base, trust_env=False) as client:
        assert client.get("/readPrediction/x").status_code == 404
