"""Doing answered requests again with another model: over HTTP, and by `mlg requests redo`."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import flask.testing
import pytest
from click.testing import CliRunner

from cli.requests import requests as command
from server.settings import ServerSettings
from store import new_id
from store.chunks import ChunkRecord
from store.clients.keys import KeyRecord, Scope, hash_key, make_key
from store.requests import Answer, NewRequest, RequestRecord
from store.store import Store
from tests.conftest import MODEL, OUTPUT

NOW = datetime.now(UTC)
URL = f"/requests/redo?model=resnet50&with={MODEL}"
Add = Callable[..., RequestRecord]


@pytest.fixture
def add(store: Store, photos: dict[str, bytes]) -> Add:
    """Add a request that another model has answered."""

    def add_one(data: str = "rocket", **changes: Any) -> RequestRecord:
        facts = {"id": new_id(), "service": "classification", "model": "resnet50", "created_at": NOW, **changes}
        request = store.requests.add(NewRequest(**facts), store.images.stage(photos[data]))
        claims = store.requests.claim(
            models=[request.model], limit=9, now=NOW, lease_ends_at=NOW + timedelta(seconds=30), oldest_before=None
        )
        answers = [
            Answer(claim=one, output=OUTPUT, digest="d" * 64, chunk_id="c", provider="local", seconds=0.01)
            for one in claims
        ]
        store.requests.finish(answers, now=NOW)
        return request

    return add_one


@pytest.fixture
def add_key(store: Store) -> Callable[..., tuple[str, dict[str, str]]]:
    """Add an API key; returns its id and the header with it."""

    def add_one(*scopes: Scope, **facts: Any) -> tuple[str, dict[str, str]]:
        id, key = make_key()
        given = frozenset(scopes or (Scope.SUBMIT, Scope.READ))
        store.keys.add(KeyRecord(id=id, name=id, sha256=hash_key(key), scopes=given, created_at=NOW, **facts))
        return id, {"X-API-Key": key}

    return add_one


def test_a_request_is_done_again_and_shows_the_newer_answer(
    client: flask.testing.FlaskClient, add: Add, answer: Callable[..., list[str]]
) -> None:
    earlier = add(name="a.jpg", labels={"album": "2026"}, keep_seconds=90.0)

    reply = client.post(URL, headers={"Idempotency-Key": "k"})
    body = reply.get_json()
    waiting = client.get(f"/readPrediction/{earlier.id}").get_json()
    (newer,) = answer()
    read = client.get(f"/readPrediction/{earlier.id}").get_json()
    shown = client.get(f"/requests/{newer}").get_json()

    assert (reply.status_code, body["found"], body["added"], body["next"]) == (202, 1, 1, None)
    assert reply.headers["Location"] == body["batches"][0]["status_url"]
    assert (waiting["preds"], "replaced_by" in waiting) == ([list(row) for row in OUTPUT[:5]], False)
    assert read["preds"] == waiting["preds"]
    assert read["replaced_by"] == {"req_id": newer, "model": MODEL, "status_url": f"/readPrediction/{newer}"}
    assert (shown["replaces"], shown["client_id"]) == (earlier.id, earlier.id)
    assert (shown["labels"], shown["name"], shown["keep_seconds"]) == ({"album": "2026"}, "a.jpg", 90.0)
    assert newer in client.get(f"/ui/requests/{earlier.id}").get_data(as_text=True)
    batch = client.get(body["batches"][0]["status_url"]).get_json()
    assert (batch["name"], batch["status"], batch["counts"]["done"]) == (f"resnet50 again with {MODEL}", "ended", 1)


def test_what_is_done_again_already_or_cannot_be_is_left_out(
    client: flask.testing.FlaskClient, store: Store, add: Add, settings: ServerSettings
) -> None:
    add(), add(service="another", labels={"a": "b"})
    first = client.post(URL).get_json()
    store.retention.purge(images_before=NOW + timedelta(days=1), results_before=NOW - timedelta(days=1), now=NOW)
    add("coffee"), add("chelsea")
    old = add("chelsea", name="last.jpg")
    store.database.execute("UPDATE requests SET image_deleted_at = ? WHERE id = ?", ("2026-01-01", old.id))

    labelled = client.post(f"{URL}&label=a:b").get_json()
    counted = client.post(f"{URL}&dry_run=1")
    newest = client.post(f"{URL}&limit=1").get_json()
    rest = client.post(f"{URL}&cursor={newest['next']}").get_json()
    repeated = client.post(URL)

    assert (first["added"], first["unsuitable"]) == (1, 1)
    # The image of a service that is not known is deleted too.
    assert (labelled["found"], labelled["without_inputs"]) == (0, 1)
    figures = counted.get_json()
    assert (counted.status_code, figures["found"], figures["existing"], figures["without_inputs"]) == (200, 2, 1, 2)
    assert (figures["eta_seconds"], figures["cost"], "added" in figures) == (None, None, False)
    assert (newest["added"], rest["added"], rest["existing"], rest["next"]) == (1, 1, 1, None)
    assert (repeated.status_code, repeated.get_json()["existing"], repeated.get_json()["batches"]) == (200, 3, [])


def test_a_dry_run_estimates_time_and_cost(client: flask.testing.FlaskClient, store: Store, add: Add) -> None:
    add(), add("coffee")
    chunk = ChunkRecord(
        id="c2", batcher_id="b", executor="golem", service="classification", model=MODEL, items=8, bytes_sent=1,
        dispatched_at=NOW,
    )  # fmt: skip
    store.chunks.start(chunk)
    store.chunks.finish(
        "c2", provider="p", bytes_received=1, seconds=2.0, done=8, failed=0, cost="0.5", code=None, reason=None,
        now=NOW, agreement_id="a",
    )  # fmt: skip
    store.database.execute("UPDATE chunks SET answers = 8")

    figures = client.post(f"{URL}&dry_run=1").get_json()

    # Eight images took two seconds and cost half a GLM.
    assert (figures["found"], figures["eta_seconds"], figures["cost"]) == (2, 0.5, "0.125")


def test_a_key_does_its_own_requests_again_and_its_quota_counts_them(
    client: flask.testing.FlaskClient, store: Store, add: Add, add_key: Callable[..., tuple[str, dict[str, str]]]
) -> None:
    (alice, with_alice), (bob, with_bob) = add_key(images_per_day=3), add_key()
    _, as_operator = add_key(Scope.OPERATE)
    add(key_id=alice), add("coffee", key_id=alice), add("chelsea", key_id=bob, client_id="x"), add("coffee", key_id=bob)

    first = client.post(URL, headers=with_alice).get_json()
    refused = client.post(URL, headers=with_alice)
    rest = client.post(URL, headers=as_operator).get_json()

    assert (first["found"], first["added"], first["next"] is None) == (1, 1, False)
    assert (refused.status_code, refused.get_json()["code"]) == (429, "quota_reached")
    assert sorted(batch["accepted"] for batch in rest["batches"]) == [1, 2]
    for owner, count in ((alice, 1), (bob, 2)):
        (batch,) = [one for one in store.batches.list(key_id=owner) if one.total == count][:1]
        assert {one.key_id for one in store.batches.items(batch.id)} == {owner}
    bobs = client.get("/requests?state=queued", headers=with_bob).get_json()["requests"]
    assert {one["client_id"] for one in bobs} >= {"x"}
    assert len({one["client_id"] for one in bobs}) == len(bobs) == 2
    nobody = client.post(URL, headers=add_key(Scope.READ)[1])
    assert nobody.status_code == 403


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("with=efficientnet_lite0", 400),
        ("model=resnet50", 400),
        ("model=resnet50&with=nosuchmodel", 404),
        (f"model=resnet50&with={MODEL}&limit=0", 400),
        (f"model=resnet50&with={MODEL}&cursor=x", 400),
        (f"model=resnet50&with={MODEL}&dry_run=maybe", 400),
        (f"model=resnet50&with={MODEL}&webhook=http://127.0.0.1/", 400),
        (f"model=resnet50&with={MODEL}&state=failed", 400),
    ],
)
def test_a_call_that_cannot_be_read_is_refused(client: flask.testing.FlaskClient, query: str, status: int) -> None:
    assert client.post(f"/requests/redo?{query}").status_code == status


def test_the_same_model_does_again_what_another_version_answered(
    client: flask.testing.FlaskClient, add: Add, answer: Callable[..., list[str]]
) -> None:
    add(model=MODEL)
    url = f"/requests/redo?model={MODEL}&with={MODEL}"

    first = client.post(url).get_json()
    second = client.post(url).get_json()

    assert (first["added"], second["added"], second["existing"]) == (1, 0, 1)


def test_the_command_does_all_again(settings: ServerSettings, store: Store, add: Add) -> None:
    earlier = [add(client_id="a"), add("coffee", client_id="a")]
    arguments = ["redo", "--home", str(settings.home), "--model", "resnet50", "--with", MODEL]

    counted = CliRunner().invoke(command, [*arguments, "--dry-run"])
    done = CliRunner().invoke(command, [*arguments, "--name", "better"])
    repeated = CliRunner().invoke(command, [*arguments, "--json"])

    assert "2 requests would be queued" in counted.output
    assert f"2 requests are queued for {MODEL}" in done.output
    assert json.loads(repeated.output) == {
        "found": 0, "added": 0, "existing": 2, "without_inputs": 0, "unsuitable": 0
    }  # fmt: skip
    (batch,) = store.batches.list()
    assert (batch.name, batch.total) == ("better", 2)
    assert [one.client_id for one in store.batches.items(batch.id)] == ["a", earlier[1].id]


def test_the_command_ends_when_the_queue_is_full(
    settings: ServerSettings, store: Store, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(), add("coffee")
    monkeypatch.setenv("MLG_MAX_BACKLOG", "1")
    arguments = ["redo", "--home", str(settings.home), "--model", "resnet50", "--with", MODEL]

    result = CliRunner().invoke(command, arguments)

    assert (result.exit_code, store.batches.list()[0].total) == (1, 1)
    assert "wait already" in str(result.exception)
