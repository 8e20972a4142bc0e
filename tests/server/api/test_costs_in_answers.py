"""Costs in responses, and a database from before there were costs."""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import flask.testing
import pytest

from server.settings import ServerSettings
from store import migrations, new_id
from store.chunks import ChunkRecord
from store.processes.batchers import BatcherRecord
from store.rentals.ledger import BillState, InvoiceRecord
from store.requests import Answer, NewRequest
from store.store import Store
from tests.conftest import MODEL, OUTPUT
from tests.stores import make_earlier_home

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


def start_chunk(store: Store, id: str = "c1") -> None:
    store.chunks.start(
        ChunkRecord(
            id=id, batcher_id="b1", executor="golem", provider=None, service="classification", model=MODEL,
            items=1, bytes_sent=1, bytes_received=None, dispatched_at=NOW, finished_at=None, seconds=None,
            done=None, failed=None, cost=None, code=None, reason=None,
        )
    )  # fmt: skip


def answer_one(store: Store, data: bytes = b"image", *, chunk_id: str = "c1") -> str:
    new = NewRequest(id=new_id(), service="classification", model=MODEL, created_at=NOW)
    request = store.requests.add(new, store.images.stage(data))
    (claim,) = store.requests.claim(
        models=[MODEL], limit=9, now=NOW, lease_ends_at=NOW + timedelta(seconds=9), oldest_before=None
    )
    answer = Answer(claim=claim, output=OUTPUT, digest="d" * 64, chunk_id=chunk_id, provider="alpha", seconds=0.1)
    assert store.requests.finish([answer], now=NOW) == 1
    return request.id


def end_chunk(store: Store, *, cost: str | None) -> None:
    store.chunks.finish(
        "c1", provider="alpha", bytes_received=1, seconds=2.0, done=1, failed=0, cost=cost, code=None, reason=None,
        now=NOW, agreement_id="ag1",
    )  # fmt: skip


def read(client: flask.testing.FlaskClient, id: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/readPrediction/{id}").get_json()
    return found


def test_an_answer_has_its_cost_as_an_estimate_and_then_finally(
    client: flask.testing.FlaskClient, store: Store
) -> None:
    start_chunk(store)
    ids = [answer_one(store, data) for data in (b"one", b"two", b"three")]
    before = read(client, ids[0])
    end_chunk(store, cost="0.3")
    estimated = read(client, ids[0])
    store.ledger.record_invoice(
        InvoiceRecord(id="i1", agreement_id="ag1", amount=Decimal("0.1"), state=BillState.ACCEPTED, received_at=NOW)
    )
    final = [read(client, id) for id in ids]

    assert before["cost"] is None
    assert "cost_is_final" not in before
    assert (estimated["cost"], estimated["cost_is_final"]) == ("0.1", False)
    assert {answer["cost_is_final"] for answer in final} == {True}
    assert sum(Decimal(answer["cost"]) for answer in final) == Decimal("0.1")


def test_where_nothing_is_paid_the_cost_is_null(client: flask.testing.FlaskClient, store: Store) -> None:
    start_chunk(store)
    id = answer_one(store)
    end_chunk(store, cost=None)

    shown = read(client, id)

    assert shown["cost"] is None
    assert "cost_is_final" not in shown


def test_a_waiting_request_has_no_cost(client: flask.testing.FlaskClient, store: Store) -> None:
    new = NewRequest(id=new_id(), service="classification", model=MODEL, created_at=NOW)
    request = store.requests.add(new, store.images.stage(b"image"))

    assert "cost" not in read(client, request.id)


def test_a_client_sees_the_notice_that_every_batcher_has_of_the_model(
    client: flask.testing.FlaskClient, store: Store
) -> None:
    notice = "No provider offers it for that price."
    now = datetime.now(UTC)
    store.batchers.heartbeat(
        BatcherRecord(
            id="b1", host="h", pid=1, executor="golem", every_seconds=600, max_wait_seconds=600, capacity=4,
            started_at=now, seen_at=now, notices={MODEL: notice},
        )
    )  # fmt: skip
    new = NewRequest(id=new_id(), service="classification", model=MODEL, created_at=NOW)
    request = store.requests.add(new, store.images.stage(b"image"))

    shown = read(client, request.id)

    assert (shown["waiting_for"], shown["eta_seconds"]) == (notice, None)


def test_the_notices_of_a_batcher_change_with_each_heartbeat(store: Store) -> None:
    first = BatcherRecord(
        id="b1", host="h", pid=1, executor="golem", every_seconds=600, max_wait_seconds=600, capacity=4,
        started_at=NOW, seen_at=NOW, notices={"vgg16": "Zu teuer: \N{EURO SIGN} 5."},
    )  # fmt: skip

    store.batchers.heartbeat(first)
    assert store.batchers.list(seen_since=NOW) == [first]

    store.batchers.heartbeat(BatcherRecord(**{**vars(first), "notices": {}}))
    assert store.batchers.list(seen_since=NOW)[0].notices == {}


def test_a_database_from_before_costs_is_migrated(tmp_path: Path) -> None:
    settings = ServerSettings(home=tmp_path / "home")
    assert make_earlier_home(settings, migrations.m003_money) == ["m001_requests", "m002_journal"]
    # As the version before wrote them.
    with sqlite3.connect(settings.database) as connection:
        connection.execute(
            "INSERT INTO requests (id, service, model, image_sha256, image_bytes, state, created_at, due_at,"
            " finished_at, chunk_id, digest, output)"
            " VALUES ('r0', 'classification', 'm', ?, 1, 'done', ?, ?, ?, 'c0', 'd', '[]')",
            ("0" * 64, *["2026-11-20T12:00:00.000Z"] * 3),
        )
        connection.execute(
            "INSERT INTO chunks (id, batcher_id, executor, service, model, items, bytes_sent, dispatched_at)"
            " VALUES ('c0', 'b0', 'local', 'classification', 'm', 1, 1, '2026-11-20T12:00:00.000Z')"
        )
        connection.execute(
            "INSERT INTO batchers VALUES ('b0', 'h', 1, 'local', 1, 1, 1, '2026-11-20T12:00:00.000Z',"
            " '2026-11-20T12:00:00.000Z')"
        )
    connection.close()

    store = Store(settings)
    applied = store.migrate()

    assert applied == [step.__name__ for step in migrations.STEPS[2:]]
    assert store.requests.get("r0").cost is None
    (chunk,) = store.chunks.list()
    assert (chunk.agreement_id, chunk.answers, chunk.is_cost_final) == (None, 0, False)
    assert [batcher.notices for batcher in store.batchers.list(seen_since=NOW)] == [{}]
    assert store.ledger.spent() == 0
    start_chunk(store)
    answer_one(store)
    end_chunk(store, cost="0.3")
    assert store.ledger.spent() == Decimal("0.3")
    store.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE invoices SET state = 'paid'",
        "UPDATE invoices SET amount = '1e-5'",
        "UPDATE invoices SET amount = '-1'",
        "UPDATE invoices SET settled_at = NULL",
        "UPDATE chunks SET is_cost_final = 2",
    ],
)
def test_the_tables_check_states_and_amounts(store: Store, settings: ServerSettings, statement: str) -> None:
    start_chunk(store)
    store.ledger.record_invoice(
        InvoiceRecord(id="i1", agreement_id="ag1", amount=Decimal("0.1"), state=BillState.ACCEPTED, received_at=NOW)
    )
    connection = sqlite3.connect(settings.database)

    with pytest.raises(sqlite3.IntegrityError, match="CHECK"):
        connection.execute(statement)

    connection.close()
