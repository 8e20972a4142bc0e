"""Contract of usage. A new backend adds a parameter to `store`, not tests."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from store import new_id
from store.batches import ARRIVAL_SECONDS, BatchRecord, RefusedItem
from store.chunks import ChunkRecord
from store.clients.keys import KeyRecord, Scope
from store.clients.usage import USAGE_BY, ClientKind, UsageRow
from store.errors import QuotaReached, StoreUnavailable
from store.rentals.ledger import AgreementRecord, BillState, InvoiceRecord
from store.requests import ROWS_PER_COMMIT, Answer, Claim, NewRequest, RequestRecord
from store.store import Store

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
MODEL = "resnet50"
KEY = "alice0000000"


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def new(**changes: Any) -> NewRequest:
    facts = {"id": new_id(), "service": "classification", "model": MODEL, "created_at": NOW, **changes}
    return NewRequest(**facts)


def add(store: Store, data: bytes = b"image", **changes: Any) -> RequestRecord:
    return store.requests.add(new(**changes), store.images.stage(data))


def add_batch(store: Store, count: int, *, refused: int = 0, key_id: str | None = None) -> BatchRecord:
    batch = BatchRecord(id=new_id(), service="classification", model=MODEL, created_at=NOW, key_id=key_id)
    items = [(new(batch_id=batch.id, key_id=key_id), store.images.stage(b"%d" % place)) for place in range(count)]
    bad = [RefusedItem(position=count + place, client_id=f"{place}", code="c", reason="r") for place in range(refused)]
    store.batches.add(batch, items, bad, client=ClientKind.BROWSER)
    return batch


def claim(store: Store) -> list[Claim]:
    return store.requests.claim(models={MODEL}, limit=1000, now=NOW, lease_ends_at=after(30), oldest_before=None)


def answer_all(store: Store, chunk_id: str = "c") -> None:
    answers = [
        Answer(claim=one, output=["x"], digest="d" * 64, chunk_id=chunk_id, provider="p", seconds=0.25)
        for one in claim(store)
    ]
    store.requests.finish(answers, now=NOW)


def start_chunk(store: Store, id: str = "c") -> None:
    chunk = ChunkRecord(
        id=id, batcher_id="b", executor="golem", service="classification", model=MODEL, items=1, bytes_sent=1,
        dispatched_at=NOW,
    )  # fmt: skip
    store.chunks.start(chunk)


def end_chunk(store: Store, id: str = "c", *, cost: str | None = "0.5", agreement_id: str | None = "ag") -> None:
    store.chunks.finish(
        id, provider="p", bytes_received=1, seconds=1.0, done=1, failed=0, cost=cost, code=None, reason=None, now=NOW,
        agreement_id=agreement_id,
    )  # fmt: skip


def bill(store: Store, amount: str, state: BillState = BillState.ACCEPTED) -> None:
    invoice = InvoiceRecord(
        id="i", agreement_id="ag", amount=Decimal(amount), state=state, received_at=NOW, settled_at=NOW
    )
    store.ledger.record_invoice(invoice)


def used(store: Store, *by: str, key_id: str | None = None) -> list[UsageRow]:
    return store.usage.list(since=date(2026, 11, 1), until=date(2026, 11, 30), by=by, key_id=key_id)


def test_requests_are_counted_by_day_key_model_and_client(store: Store) -> None:
    add(store, client=ClientKind.CURL)
    add(store, client=ClientKind.CURL, key_id=KEY)
    add(store, client=ClientKind.CURL, key_id=KEY, created_at=NOW - timedelta(days=1))
    add(store, client=ClientKind.MOBILE, key_id=KEY, model="vgg16")
    add(store, client=ClientKind.MOBILE, key_id=KEY, model="vgg16")

    rows = {(row.day, row.key, row.model, row.client): row.accepted for row in used(store, *USAGE_BY)}

    assert rows == {
        ("2026-11-20", "", MODEL, "curl"): 1,
        ("2026-11-20", KEY, MODEL, "curl"): 1,
        ("2026-11-19", KEY, MODEL, "curl"): 1,
        ("2026-11-20", KEY, "vgg16", "mobile"): 2,
    }
    assert [(row.day, row.accepted) for row in used(store, "day")] == [("2026-11-20", 4), ("2026-11-19", 1)]
    assert [(row.model, row.accepted) for row in used(store, "model", key_id=KEY)] == [(MODEL, 2), ("vgg16", 2)]
    assert [row.accepted for row in used(store, key_id="")] == [1]
    assert used(store, key_id="unknown") == [UsageRow()]
    assert store.usage.list(since=date(2026, 11, 20), until=date(2026, 11, 20))[0].bytes == 4 * len(b"image")


def test_every_outcome_is_counted_and_one_that_is_retried_no_more(store: Store) -> None:
    add(store, b"1", digest="d" * 64)
    answer_all(store)
    add(store, b"1", digest="d" * 64)  # done at once
    failed = add(store, b"2")
    store.requests.fail(claim(store), code="c", reason="r", now=NOW)
    expired = add(store, b"3", deadline_at=after(1))
    store.requests.expire(after(2))
    cancelled = add(store, b"4")
    store.requests.cancel(cancelled.id, now=NOW)
    add(store, b"5")

    (ended,) = used(store)
    for one in (failed, expired, cancelled):
        store.requests.retry(one.id, now=after(3))
    (retried,) = used(store)
    store.requests.cancel(failed.id, now=NOW)

    counts = [
        (row.accepted, row.done, row.cached, row.failed, row.cancelled, row.expired)
        for row in (ended, retried, *used(store))
    ]
    assert counts == [(6, 1, 1, 1, 1, 1), (6, 1, 1, 0, 0, 0), (6, 1, 1, 0, 1, 0)]
    assert ended.seconds == 0.25  # an earlier answer takes no time


def test_a_batch_counts_what_it_accepts_and_what_it_refuses(store: Store) -> None:
    add_batch(store, 3, refused=2, key_id=KEY)
    large = add_batch(store, ROWS_PER_COMMIT + 5, key_id=KEY)
    store.batches.cancel(large.id, now=NOW)

    (row,) = used(store, "client")

    assert (row.client, row.accepted, row.refused, row.cancelled) == (
        "browser",
        ROWS_PER_COMMIT + 8,
        2,
        ROWS_PER_COMMIT + 5,
    )
    assert store.keys.images_used(KEY, now=NOW) == ROWS_PER_COMMIT + 10


def test_a_large_batch_that_is_given_up_counts_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    publish, published = store.images.publish, []

    def fail_late(staged: Any) -> None:
        published.append(staged)
        if len(published) > ROWS_PER_COMMIT + 5:
            raise StoreUnavailable()
        publish(staged)

    monkeypatch.setattr(store.images, "publish", fail_late)

    with pytest.raises(StoreUnavailable):
        add_batch(store, 2 * ROWS_PER_COMMIT, key_id=KEY)
    store.batches.finish_interrupted(now=after(2 * ARRIVAL_SECONDS))

    assert (used(store, "day"), store.requests.list(), store.keys.images_used(KEY, now=NOW)) == ([], [], 0)


def test_a_quota_counts_all_models_and_programs_of_a_day(store: Store) -> None:
    scopes = frozenset({Scope.SUBMIT})
    store.keys.add(KeyRecord(id=KEY, name="alice", sha256="0" * 64, scopes=scopes, images_per_day=3, created_at=NOW))
    for model, client in ((MODEL, ClientKind.CURL), ("vgg16", ClientKind.CURL), (MODEL, ClientKind.BROWSER)):
        add(store, key_id=KEY, model=model, client=client)

    with pytest.raises(QuotaReached):
        add(store, key_id=KEY, model="xception")
    with pytest.raises(QuotaReached):
        add_batch(store, 0, refused=1, key_id=KEY)

    assert [(row.key_name, row.accepted) for row in used(store, "key")] == [("alice", 3)]


def test_usage_outlives_its_requests_and_is_deleted_after_its_own_time(store: Store) -> None:
    add(store, key_id=KEY)
    start_chunk(store)
    answer_all(store)
    end_chunk(store)
    (before,) = used(store)
    late = after(9)

    store.retention.purge(images_before=late, results_before=late, usage_before=NOW, now=late)
    (kept,) = used(store)
    store.retention.purge(images_before=late, results_before=late, usage_before=NOW + timedelta(days=1), now=late)
    bill(store, "1")

    assert store.requests.list() == []
    assert (kept, kept.done, kept.cost) == (before, 1, Decimal("0.5"))
    assert used(store) == [UsageRow()]
    assert store.database.rows("SELECT 1 FROM usage_chunks") == []


def test_costs_follow_the_bill_also_after_the_requests_are_gone(store: Store) -> None:
    agreement = AgreementRecord(
        id="ag", allocation_id="al", provider_id="0x", provider_name="p", model=MODEL, start_price=Decimal(0),
        price_per_cpu_second=Decimal(0), price_per_second=Decimal(0), created_at=NOW,
    )  # fmt: skip
    store.ledger.record_agreement(agreement)
    for client in (ClientKind.CURL, ClientKind.CURL, ClientKind.OTHER):
        add(store, client=client)
    start_chunk(store)
    answer_all(store)
    end_chunk(store, cost="0.3")
    estimated = used(store, "client")
    for one in store.requests.list():
        store.requests.remove(one.id)

    bill(store, "1")

    final = used(store, "client")
    assert [(row.client, row.cost, row.is_cost_final) for row in estimated] == [
        ("curl", Decimal("0.2"), False),
        ("other", Decimal("0.1"), False),
    ]
    # A third each; the first share has the last digit that is left.
    assert [(row.client, row.cost, row.is_cost_final) for row in final] == [
        ("curl", Decimal("0.666666666666666667"), True),
        ("other", Decimal("0.333333333333333333"), True),
    ]
    bill(store, "1", BillState.REFUSED)  # too late
    assert used(store)[0].cost == 1


@pytest.mark.parametrize("is_late", [False, True])
def test_chunks_that_nobody_is_paid_for_leave_no_shares(store: Store, is_late: bool) -> None:
    add(store)
    start_chunk(store)
    steps = [lambda: answer_all(store), lambda: end_chunk(store, cost=None, agreement_id=None)]

    for step in reversed(steps) if is_late else steps:
        step()

    assert store.database.rows("SELECT 1 FROM usage_chunks") == []
    assert used(store)[0].cost == 0


def test_doing_requests_again_counts_for_who_asks(store: Store) -> None:
    earlier = add(store, key_id="bob000000000", client=ClientKind.CURL)
    answer_all(store)
    batch = BatchRecord(id=new_id(), service="classification", model="vgg16", created_at=NOW, key_id="bob000000000")
    again = new(model="vgg16", batch_id=batch.id, replaces=earlier.id, key_id="bob000000000")

    store.batches.add_replacements(batch, [again], charged_key_id=KEY, client=ClientKind.BROWSER)

    rows = {
        (row.key, row.model, row.client): (row.accepted, row.bytes) for row in used(store, "key", "model", "client")
    }
    assert rows == {("bob000000000", MODEL, "curl"): (1, 5), (KEY, "vgg16", "browser"): (1, 5)}
