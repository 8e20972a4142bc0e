"""Contract of webhooks: one delivery for each event and URL, claimed by one sender at a time."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from store import new_id
from store.batches import BatchRecord
from store.clients.webhooks import DeliveryRecord, EndpointRecord, UnknownWebhook, new_secret
from store.requests import Answer, Blame, NewRequest
from store.store import Store
from tests.contracts.deliveries import claim_due, finish

MODEL = "m"
NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
URL = "https://example.org/hook"


def endpoint(url: str = URL, *events: str, id: str = "we_1") -> EndpointRecord:
    return EndpointRecord(
        id=id, url=url, events=events or ("request.done",), secret=new_secret(), created_at=NOW, disabled_at=None
    )


def new(**changes: object) -> NewRequest:
    return NewRequest(id=new_id(), service="s", model=MODEL, created_at=NOW, **changes)  # type: ignore[arg-type]


def add(store: Store, **changes: object) -> str:
    request = new(**changes)
    return store.requests.add(request, store.images.stage(request.id.encode())).id


def answer_all(store: Store) -> None:
    claims = store.requests.claim(
        models=[MODEL], limit=100, now=NOW, lease_ends_at=NOW + timedelta(seconds=30), oldest_before=None
    )
    store.requests.finish(
        [Answer(claim=one, output=[1], digest="d" * 64, chunk_id="c", provider="p", seconds=0.1) for one in claims],
        now=NOW,
    )


def claim(store: Store, *, now: datetime = NOW, **how: Any) -> list[DeliveryRecord]:
    return claim_due(store, now=now, **how)


def test_every_final_state_is_delivered_to_each_subscriber(store: Store) -> None:
    store.webhooks.add_endpoint(endpoint())
    store.webhooks.add_endpoint(endpoint("https://example.org/batches", "batch.done", id="we_2"))
    plain, with_url = add(store), add(store, webhook="https://example.net/own")
    assert claim(store) == []

    answer_all(store)

    delivered = {(one.subject, one.url, one.endpoint_id, one.event, one.state) for one in claim(store)}
    assert delivered == {
        (plain, URL, "we_1", "request.done", "done"),
        (with_url, URL, "we_1", "request.done", "done"),
        (with_url, "https://example.net/own", None, "request.done", "done"),
    }


def test_failing_and_cancelling_are_delivered_and_queueing_again_is_not(store: Store) -> None:
    store.webhooks.add_endpoint(endpoint())
    first, second = add(store), add(store)
    store.requests.cancel(first, now=NOW)
    (held,) = store.requests.claim(models=[MODEL], limit=9, now=NOW, lease_ends_at=NOW, oldest_before=None)
    store.requests.release([held], blame=Blame.NOBODY, code="x", reason="y", now=NOW)
    (held,) = store.requests.claim(models=[MODEL], limit=9, now=NOW, lease_ends_at=NOW, oldest_before=None)

    store.requests.fail([held], code="x", reason="y", now=NOW)

    assert {(one.subject, one.state) for one in claim(store)} == {(first, "cancelled"), (second, "failed")}


def test_a_reused_answer_is_delivered(store: Store) -> None:
    first = new(digest="d" * 64)
    store.requests.add(first, store.images.stage(b"x"))
    answer_all(store)

    again = new(digest="d" * 64, webhook=URL)
    store.requests.add(again, store.images.stage(b"x"))

    assert [(one.subject, one.url) for one in claim(store)] == [(again.id, URL)]


@pytest.mark.parametrize("are_known", [False, True])
def test_a_batch_is_delivered_once_when_all_of_it_has_ended(store: Store, are_known: bool) -> None:
    if are_known:
        for name in (b"0", b"1"):
            store.requests.add(new(digest="d" * 64), store.images.stage(name))
        answer_all(store)
    store.webhooks.add_endpoint(endpoint(URL, "batch.done"))
    batch = BatchRecord(id=new_id(), service="s", model=MODEL, created_at=NOW, webhook="https://example.net/own")
    digest = "d" * 64 if are_known else None

    store.batches.add(
        batch, [(new(batch_id=batch.id, digest=digest), store.images.stage(name)) for name in (b"0", b"1", b"2")], []
    )
    before = claim(store, now=datetime.now(UTC))
    answer_all(store)
    after = claim(store, now=datetime.now(UTC))

    assert before == []
    assert {(one.subject, one.event, one.url, one.endpoint_id) for one in after} == {
        (batch.id, "batch.done", URL, "we_1"),
        (batch.id, "batch.done", "https://example.net/own", None),
    }
    assert len(after) == 2


def test_a_batch_of_reused_answers_is_delivered_at_once(store: Store) -> None:
    store.requests.add(new(digest="d" * 64), store.images.stage(b"0"))
    answer_all(store)
    batch = BatchRecord(id=new_id(), service="s", model=MODEL, created_at=NOW, webhook=URL)

    store.batches.add(
        batch, [(new(batch_id=batch.id, digest="d" * 64), store.images.stage(b"0")) for _ in range(3)], []
    )

    assert [one.event for one in claim(store, now=datetime.now(UTC))] == ["batch.done"]


def test_a_delivery_is_claimed_by_one_sender_until_its_lease_ends(store: Store) -> None:
    add(store, webhook=URL)
    answer_all(store)
    claimed: list[DeliveryRecord] = []
    threads = [threading.Thread(target=lambda: claimed.extend(claim(store))) for _ in range(8)]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    later = claim(store, now=NOW + timedelta(seconds=61))

    assert [one.attempts for one in claimed] == [1]
    assert [(one.id, one.attempts) for one in later] == [(claimed[0].id, 2)]
    # The first sender was too slow; its result does not count any more.
    assert not finish(store, claimed[0], now=NOW, status=500, error="x")
    assert finish(store, later[0], now=NOW)
    assert store.webhooks.list_deliveries()[0].status == "delivered"


def test_a_host_gets_a_few_at_once_and_none_while_it_is_busy(store: Store) -> None:
    for number in range(9):
        add(store, webhook=f"{URL}?{number}")
    add(store, webhook="https://example.net/other")
    answer_all(store)

    assert [one.url for one in claim(store, sending=[("", "example.org")] * 4)] == ["https://example.net/other"]
    assert len(claim(store)) == 4


def test_owners_take_turns_and_each_gets_only_its_share(store: Store) -> None:
    for number in range(20):
        add(store, key_id="many", webhook=f"https://{number}.example.org/")
    add(store, key_id="few", webhook=URL)
    add(store, webhook=URL)
    answer_all(store)

    shared = claim(store, limit=4)
    busy = [("many", f"{number}.example.org") for number in range(3)]
    left = claim(store, limit=4, per_owner=5, sending=busy)

    assert sorted(one.owner for one in shared) == ["", "few", "many", "many"]
    assert [one.owner for one in left] == ["many", "many"]


def test_an_owner_with_older_deliveries_does_not_come_first_each_time(store: Store) -> None:
    for _ in range(4):
        add(store, key_id="old", webhook=URL)
    answer_all(store)
    for number in range(2):
        add(store, key_id="new", webhook=f"{URL}/{number}")
    store.requests.cancel(store.requests.list(limit=1)[0].id, now=NOW + timedelta(hours=1))
    store.requests.cancel(store.requests.list(limit=2)[1].id, now=NOW + timedelta(hours=1))

    owners = [one.owner for _ in range(5) for one in claim(store, now=NOW + timedelta(hours=2), limit=1)]

    assert sorted(owners[:2]) == sorted(owners[2:4]) == ["new", "old"]
    assert owners[4] == "old"


def test_an_owner_with_many_hosts_is_looked_at_in_parts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.clients.webhooks.MAX_HOSTS_PER_LIST", 3)
    for number in range(7):
        add(store, key_id="many", webhook=f"https://{number}.example.org/")
    answer_all(store)

    parts = [claim(store) for _ in range(4)]

    assert [len(part) for part in parts] == [3, 3, 1, 0]


def test_a_dead_delivery_can_be_sent_again_under_its_id(store: Store) -> None:
    add(store, webhook=URL)
    answer_all(store)
    claim(store, payload="first")
    (claimed,) = claim(store, now=NOW + timedelta(seconds=61), payload="second")
    finish(store, claimed, now=NOW, status=500, error="It answered 500.")
    (dead,) = store.webhooks.list_deliveries(status="dead")

    redelivered = store.webhooks.redeliver(dead.id, now=NOW)

    assert (dead.status, dead.last_error, dead.last_status) == ("dead", "It answered 500.", 500)
    assert (redelivered.id, redelivered.status, redelivered.attempts) == (dead.id, "pending", 0)
    assert [(one.id, one.payload) for one in claim(store)] == [(dead.id, "first")]
    assert store.webhooks.list_deliveries(status="dead") == []


def test_a_disabled_or_removed_endpoint_gets_nothing(store: Store) -> None:
    store.webhooks.add_endpoint(endpoint())
    store.webhooks.add_endpoint(endpoint("https://example.org/two", id="we_2"))
    add(store)
    answer_all(store)

    store.webhooks.disable_endpoint("we_1", reason="It answered 410.", now=NOW)
    store.webhooks.remove_endpoint("we_2")
    add(store)
    answer_all(store)

    assert claim(store) == []
    assert [one.status for one in store.webhooks.list_deliveries()] == ["dead"]
    (left,) = store.webhooks.list_endpoints()
    assert (left.id, left.disabled_reason) == ("we_1", "It answered 410.")


def test_unknown_endpoints_and_deliveries_are_errors(store: Store) -> None:
    with pytest.raises(UnknownWebhook):
        store.webhooks.remove_endpoint("we_9")
    with pytest.raises(UnknownWebhook):
        store.webhooks.redeliver("msg_9", now=NOW)
    with pytest.raises(UnknownWebhook):
        store.webhooks.secret("we_9")
    assert store.webhooks.secret(None).startswith("whsec_")


def test_old_deliveries_are_deleted_and_pending_ones_never(store: Store) -> None:
    for _ in range(3):
        add(store, webhook=URL)
    answer_all(store)
    delivered, dead, _ = claim(store)
    finish(store, delivered, now=NOW)
    finish(store, dead, now=NOW, status=500, error="x")

    assert store.webhooks.purge(before=NOW) == 0
    assert store.webhooks.purge(before=NOW + timedelta(days=30)) == 2
    assert [one.status for one in store.webhooks.list_deliveries()] == ["pending"]
