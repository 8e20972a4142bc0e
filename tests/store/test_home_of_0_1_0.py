"""A home made by mlg 0.1.0 keeps working: nothing is lost, and pending requests are finished.

`home_of_0_1_0.zip` has the home (`home/`), what the code of 0.1.0 read from it (`expected.json`), and the script that
made both in a checkout of that version (`make_home.py`). The models are left out. Never make it again with later code.
"""

from __future__ import annotations

import enum
import io
import json
import os
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from server.app import create_app
from server.settings import ServerSettings
from store.clients.idempotency import SavedResponse
from store.clients.keys import Scope, key_id_of, verify_key
from store.clients.webhooks import DeliveryRecord
from store.migrations import STEPS
from store.processes.controls import Mode
from store.requests import Answer
from store.states import RequestState
from store.store import Store
from tests.contracts.deliveries import claim_due, finish
from tests.timing import DEADLINE_SECONDS

ROOT = Path(__file__).parents[2]
ARCHIVE = Path(__file__).with_name("home_of_0_1_0.zip")
MODEL = "efficientnet_lite0"
#: A hundred years: the batcher's own clock must not delete what is compared.
KEEP = "3.1e9"
#: The clock of the home started here.
START = datetime(2025, 3, 1, 12, 0, tzinfo=UTC)
#: Fields of records that have another name today.
RENAMED_FIELDS = {"pictures_per_day": "images_per_day"}
#: Fields that records did not have; those of the home are empty.
NEW_FIELDS = {
    "inputs",
    "files",
    "written_off_at",
    "replaces",
    "replaced_by",
    "parent",
    "step",
    "position",
    "run",
    "progress",
    "waiting_steps",
}
#: Fields that deliveries did not have.
NEW_FIELDS_OF_DELIVERIES = {"owner", "host"}


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


@pytest.fixture
def settings(tmp_path: Path) -> ServerSettings:
    """The home as 0.1.0 left it."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path)
    return ServerSettings(home=tmp_path / "home")


@pytest.fixture
def expected(settings: ServerSettings) -> dict[str, Any]:
    """What 0.1.0 read from it."""
    found: dict[str, Any] = json.loads((settings.home.parent / "expected.json").read_text())
    return found


@pytest.fixture
def store(settings: ServerSettings) -> Iterator[Store]:
    made = Store(settings)
    made.migrate()
    yield made
    made.close()


def to_json(value: Any) -> Any:
    """Turn records into JSON as `make_home.py` did."""
    if is_dataclass(value) and not isinstance(value, type):
        values = asdict(value)
        if isinstance(value, DeliveryRecord):
            values = {name: field for name, field in values.items() if name not in NEW_FIELDS_OF_DELIVERIES}
        return to_json({name: field for name, field in values.items() if name not in NEW_FIELDS or field})
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, float) and value == float("inf"):
        return "infinite"
    if isinstance(value, set | frozenset):
        return sorted(to_json(item) for item in value)
    if isinstance(value, dict):
        return {str(to_json(key)): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def with_names_of_today(value: Any) -> Any:
    if isinstance(value, dict):
        return {RENAMED_FIELDS.get(key, key): with_names_of_today(item) for key, item in value.items()}
    return [with_names_of_today(item) for item in value] if isinstance(value, list) else value


def test_migrating_applies_only_the_steps_that_0_1_0_did_not_have(
    settings: ServerSettings, expected: dict[str, Any]
) -> None:
    store = Store(settings)

    applied = store.migrate()
    again = store.migrate()

    store.close()
    names = [step.__name__ for step in STEPS]
    assert set(expected["migrations"]) <= set(names)
    assert applied == [name for name in names if name not in expected["migrations"]]
    assert again == []


def test_migrating_drops_the_triggers_of_0_1_0(settings: ServerSettings) -> None:
    def triggers() -> list[str]:
        with closing(sqlite3.connect(settings.database)) as connection:
            return [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'")]

    before = triggers()
    store = Store(settings)
    store.migrate()
    store.close()

    assert len(before) == 10
    assert triggers() == []


def test_every_record_reads_as_before(store: Store, expected: dict[str, Any]) -> None:
    batch = expected["batch"]
    requests = sorted(store.requests.list(limit=1000), key=lambda request: request.number)

    found = {
        "requests": requests,
        "batches": store.batches.list(),
        "refused_items": store.batches.refused_items(batch),
        "batch_progress": store.batches.progress(batch),
        "batch_results": store.batches.results(batch),
        "batch_items": store.batches.items(batch),
        "keys": store.keys.list(),
        "images_used": store.keys.images_used_by_key(now=at(0)),
        "endpoints": store.webhooks.list_endpoints(),
        "webhook_secret": store.webhooks.secret(None),
        # Those of one moment have another order today.
        "deliveries": sorted(store.webhooks.list_deliveries(limit=1000), key=lambda delivery: delivery.id),
        "allocations": store.ledger.allocations(),
        "agreements": store.ledger.agreements(),
        "costs": {by: store.ledger.costs(by) for by in ("day", "model", "provider", "total")},
        "spent": store.ledger.spent(),
        "providers": store.providers.list(),
        "speeds": store.providers.speeds(),
        "banned": store.providers.banned(at(100)),
        "controls": {control.name: control for control in store.controls.list()},
        "chunks": store.chunks.list(),
        "batchers": store.batchers.list(seen_since=at(0)),
        "backlog": store.requests.backlog(),
        "throughput": store.chunks.throughput(MODEL),
        "count_accepted": store.stats.count_accepted(),
        "totals": store.stats.list_totals(),
        "minutes": store.stats.list_minute_stats(at(0)),
        "answered": store.stats.list_answered(limit=100),
        "failures": store.stats.list_failures(limit=100),
        "changes": store.changes.list(0),
        "count_changes": store.changes.count(0),
        "snapshot": store.changes.snapshot(ids=[request.id for request in requests]),
    }

    records = with_names_of_today(expected["records"])
    records["speeds"] = {
        each["provider_id"]: {each["model"]: each["images"] / each["seconds"]} for each in records["speeds"]
    }
    records["deliveries"].sort(key=lambda delivery: delivery["id"])
    assert found.keys() == records.keys()
    for name, value in found.items():
        assert to_json(value) == records[name], name


def test_the_home_has_something_of_every_kind(store: Store, expected: dict[str, Any]) -> None:
    states = {request.status for request in store.requests.list(limit=1000)}
    deliveries = {delivery.status for delivery in store.webhooks.list_deliveries(limit=1000)}

    assert states == {"queued", "claimed", "done", "failed", "cancelled", "expired"}
    assert deliveries == {"pending", "delivered", "dead"}
    assert all(expected["records"].values())


def test_pending_requests_are_answered_by_the_local_executor(
    settings: ServerSettings, expected: dict[str, Any], models_folder: Path
) -> None:
    (settings.home / "models").symlink_to(models_folder)
    store = Store(settings)
    store.migrate()
    store.controls.resume(by="a test", now=datetime.now(UTC))
    pending = expected["ids"]["queued"] + expected["ids"]["claimed"]

    run = subprocess.run(
        [
            *(sys.executable, "-m", "mlg", "batch", "--once", "--home", str(settings.home)),
            *("--executor", "local", "--workers", "1", "--json"),
        ],
        cwd=ROOT,
        env={**os.environ, "MLG_KEEP_RESULTS_SECONDS": KEEP, "MLG_KEEP_PICTURES_SECONDS": KEEP},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )

    report = json.loads(run.stdout)
    answered = [store.requests.get(id) for id in pending]
    progress = store.batches.progress(expected["batch"])
    notified = {
        delivery.subject for delivery in store.webhooks.list_deliveries(limit=1000) if delivery.event == "batch.done"
    }
    store.close()
    assert run.returncode == 0, run.stderr
    assert (report["done"], report["failed"], report["left"]) == (len(pending), 0, [])
    assert [request.state for request in answered] == [RequestState.DONE] * len(pending)
    assert all(len(request.output) == 20 and request.digest is not None for request in answered)
    assert (progress.waiting, progress.done, progress.failed) == (0, 2, 1)
    assert notified == {expected["batch"]}


def test_a_claim_of_a_dead_batcher_is_released_and_its_token_no_longer_counts(
    store: Store, expected: dict[str, Any]
) -> None:
    (id,) = expected["ids"]["claimed"]
    later = {"now": at(9000), "lease_ends_at": at(9060)}

    assert store.requests.release_expired(at(9000)) == 1
    claims = store.requests.claim(models=[MODEL], limit=16, oldest_before=None, **later)  # type: ignore[arg-type]

    claim = next(claim for claim in claims if claim.id == id)
    answer = Answer(claim=claim, output=[], digest="cd" * 32, chunk_id="later", provider="test", seconds=0.1)
    stale = Answer(**{**vars(answer), "claim": type(claim)(**{**vars(claim), "token": claim.token - 1})})
    assert sorted(claim.id for claim in claims) == sorted([id, *expected["ids"]["queued"]])
    assert store.requests.finish([stale], now=at(9001)) == 0
    assert store.requests.finish([answer], now=at(9001)) == 1
    assert store.requests.get(id).state is RequestState.DONE


def test_images_of_pending_requests_survive_a_purge(store: Store, expected: dict[str, Any]) -> None:
    pending = [store.requests.get(id) for id in expected["ids"]["queued"] + expected["ids"]["claimed"]]

    purged = store.retention.purge(images_before=at(1e9), results_before=at(-1), now=at(9000))

    images = {request.id: store.images.read(request.image_sha256) for request in pending}
    assert purged.images == 2  # the batch's answered one and its failed one
    assert {len(images[request.id]) for request in pending} == {request.image_bytes for request in pending}
    assert images[expected["ids"]["queued"][0]].hex() == expected["image_of_k_1"]


def test_keys_still_authenticate_and_read_their_answers(
    settings: ServerSettings, store: Store, expected: dict[str, Any]
) -> None:
    client = create_app(settings, store, clock=lambda: at(3600)).test_client()
    id = expected["records"]["batch_results"][0][1]["id"]

    def read(key: str | None) -> Any:
        return client.get(f"/readPrediction/{id}", headers={} if key is None else {"Authorization": f"Bearer {key}"})

    own, operator, anonymous = read(expected["key"]), read(expected["operator_key"]), read(None)

    record = store.keys.find(key_id_of(expected["key"]) or "")
    assert record is not None and verify_key(expected["key"], record)
    assert record.scopes == {Scope.SUBMIT, Scope.READ}
    assert (own.status_code, operator.status_code, anonymous.status_code) == (200, 200, 401)
    assert own.get_json()["status"] == "done"
    assert own.get_json()["preds"] == expected["records"]["batch_results"][0][1]["output"][:5]
    assert [key.is_usable(at(3600)) for key in store.keys.list()].count(True) == 2


def test_a_repeated_post_gets_the_first_response(
    settings: ServerSettings, store: Store, expected: dict[str, Any]
) -> None:
    client = create_app(settings, store, clock=lambda: at(3600)).test_client()
    accepted = store.stats.count_accepted()

    reply = client.post(
        f"/requestPrediction/{MODEL}",
        data={"image": (io.BytesIO(bytes.fromhex(expected["image_of_k_1"])), "cat.jpg")},
        headers={"Authorization": f"Bearer {expected['key']}", "Idempotency-Key": "k-1"},
    )

    assert (reply.status_code, reply.headers["Idempotent-Replayed"]) == (202, "true")
    assert reply.get_json()["req_id"] == expected["ids"]["queued"][0]
    assert store.stats.count_accepted() == accepted


def test_idempotency_keys_keep_their_responses(store: Store) -> None:
    answered = store.idempotency.find("", "answered", now=at(1e6))

    assert answered is not None
    answered.check("of any request")
    assert answered.response == SavedResponse(status=202, headers={"A": "b"}, body=b"body")
    # No process of that version may run any more.
    assert store.idempotency.find("", "killed", now=at(1520)) is None


def test_deliveries_that_were_due_are_still_due_and_signed_with_the_same_secret(
    store: Store, expected: dict[str, Any]
) -> None:
    pending = {found["id"]: found for found in expected["records"]["deliveries"] if found["next_at"] is not None}
    claimed: dict[str, int] = {}

    while due := claim_due(store, now=at(9000)):
        for delivery in due:
            claimed[delivery.id] = delivery.attempts
            assert store.webhooks.secret(delivery.endpoint_id).startswith("whsec_")
            assert finish(store, delivery, now=at(9001))

    assert claimed == {id: found["attempts"] + 1 for id, found in pending.items()}
    assert store.webhooks.list_deliveries(status="pending") == []


def test_costs_add_up_to_the_same(store: Store, expected: dict[str, Any]) -> None:
    paid = [store.requests.get(id).cost for id in expected["ids"]["done"]]

    (total,) = store.ledger.costs("total")

    assert (total.paid, total.open, total.refused) == (Decimal("0.030000000000000001"), Decimal("0.0123"), 9)
    assert store.ledger.spent() == total.paid + total.open
    # 0.030000000000000001 in units of the 18th decimal: the remainder of one unit goes to the first request.
    assert paid == [Decimal("0.010000000000000001"), Decimal("0.01"), Decimal("0.01")]


def test_a_bill_that_was_refused_stays_refused_and_the_daemon_will_be_told(store: Store) -> None:
    refused = store.decisions.refused()

    assert [(each.amount, each.finished_at) for each in refused] == [(9, None)]
    assert store.decisions.unfinished() == refused


def test_the_pause_and_the_bans_last_until_they_are_lifted(store: Store) -> None:
    state = store.controls.state()

    assert state.pause is not None
    assert (state.pause.mode, state.pause.by, state.pause.reason) == (Mode.PAUSED, "anna", "new disks")
    store.controls.resume(by="a test", now=at(9000))
    assert store.controls.state().pause is None
    assert sorted(store.providers.banned(at(7000)).values()) == ["It answered too slowly.", "not trusted"]
    assert list(store.providers.banned(at(7300)).values()) == ["not trusted"]
    assert not store.providers.unban("beta").is_banned(at(7300))


def test_the_change_feed_continues_after_the_last_change(store: Store, expected: dict[str, Any]) -> None:
    last = store.changes.latest()

    store.requests.cancel(expected["ids"]["queued"][1], now=at(9000))

    (change,) = store.changes.list(last)
    assert last == expected["records"]["snapshot"]["latest"]
    assert (change.seq, change.state) == (last + 1, RequestState.CANCELLED)
