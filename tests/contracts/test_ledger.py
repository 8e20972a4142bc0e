"""Contract of the ledger and the providers. A new backend adds a parameter to `store`, not tests."""

from __future__ import annotations

import tempfile
import threading
from collections import defaultdict
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from store import new_id
from store.amounts import total
from store.chunks import ChunkRecord
from store.clients.usage import ClientKind
from store.rentals.ledger import (
    COSTS_BY,
    ActivityRecord,
    AgreementRecord,
    AllocationRecord,
    BillState,
    CostRow,
    DebitNoteRecord,
    InvoiceRecord,
)
from store.rentals.providers import UnknownProvider
from store.requests import Answer, NewRequest, RequestRecord
from store.store import Store
from tests.contracts.conftest import OpenStore

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
PRICES = {
    "start_price": Decimal("0.01"),
    "price_per_cpu_second": Decimal("0.0001"),
    "price_per_second": Decimal("0.00005"),
}
ALPHA, BETA = "0xa1fa000000000000000000000000000000000001", "0xbe7a000000000000000000000000000000000002"


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def allocation(id: str = "al1", **changes: object) -> AllocationRecord:
    made = AllocationRecord(
        id=id, batcher_id="b1", platform="erc20-test", address="0xpayer", amount=Decimal("1.5"), created_at=NOW
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def agreement(id: str = "ag1", **changes: object) -> AgreementRecord:
    made = AgreementRecord(
        id=id,
        allocation_id="al1",
        provider_id=ALPHA,
        provider_name="alpha",
        model="resnet50",
        created_at=NOW,
        **PRICES,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def invoice(
    amount: str | Decimal, state: BillState = BillState.ACCEPTED, *, id: str = "i1", **changes: object
) -> InvoiceRecord:
    made = InvoiceRecord(
        id=id,
        agreement_id="ag1",
        amount=Decimal(amount),
        state=state,
        received_at=NOW,
        settled_at=None if state == BillState.RECEIVED else after(1),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def debit(amount: str, state: BillState = BillState.ACCEPTED, *, id: str = "d1", **changes: object) -> DebitNoteRecord:
    made = DebitNoteRecord(
        id=id, activity_id="ac1", agreement_id="ag1", amount=Decimal(amount), state=state, received_at=NOW
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def start_chunk(store: Store, id: str, *, model: str = "resnet50") -> None:
    store.chunks.start(
        ChunkRecord(
            id=id, batcher_id="b1", executor="golem", provider=None, service="classification", model=model,
            items=16, bytes_sent=1000, bytes_received=None, dispatched_at=NOW, finished_at=None, seconds=None,
            done=None, failed=None, cost=None, code=None, reason=None,
        )
    )  # fmt: skip


def end_chunk(
    store: Store, id: str, *, agreement_id: str | None = "ag1", seconds: float = 2.0, cost: str | None = "0.1"
) -> None:
    store.chunks.finish(
        id, provider="alpha", bytes_received=10, seconds=seconds, done=16, failed=0, cost=cost, code=None,
        reason=None, now=after(2), agreement_id=agreement_id, activity_id="ac1", provider_id=ALPHA,
    )  # fmt: skip


def work(store: Store, id: str, **how: object) -> None:
    start_chunk(store, id)
    end_chunk(store, id, **how)  # type: ignore[arg-type]


def answer_requests(store: Store, chunk_id: str, count: int) -> list[str]:
    """Add requests and answer all queued ones with this chunk."""
    for position in range(count):
        client = tuple(ClientKind)[position % 2]
        new = NewRequest(id=new_id(), service="classification", model="resnet50", created_at=NOW, client=client)
        store.requests.add(new, store.images.stage(b"image"))
    claims = store.requests.claim(models=["resnet50"], limit=100, now=NOW, lease_ends_at=after(30), oldest_before=None)
    answers = [
        Answer(
            claim=claim, output=[["n1", "cat", 0.5]], digest="d" * 64, chunk_id=chunk_id, provider="alpha", seconds=1
        )
        for claim in claims
    ]
    assert store.requests.finish(answers, now=after(1)) == count
    assert store.requests.finish(answers, now=after(1)) == 0  # repeated
    return [claim.id for claim in claims]


def chunk_costs(store: Store) -> dict[str, tuple[str | None, bool]]:
    return {chunk.id: (chunk.cost, chunk.is_cost_final) for chunk in store.chunks.list(limit=1000)}


def total_row(store: Store) -> CostRow:
    (row,) = store.ledger.costs("total")
    return row


# Records


def test_an_allocation_is_open_until_it_is_released(store: Store) -> None:
    store.ledger.record_allocation(allocation())
    store.ledger.record_allocation(allocation(amount=Decimal("2.5")))

    before = store.ledger.allocations(is_open=True)
    store.ledger.release_allocation("al1", now=after(5))
    store.ledger.release_allocation("al1", now=after(6))
    store.ledger.record_allocation(allocation())

    assert before == [allocation(amount=Decimal("2.5"))]
    assert store.ledger.allocations(is_open=True) == []
    assert store.ledger.allocations() == store.ledger.allocations(is_open=False) == [allocation(released_at=after(5))]


def test_the_first_end_of_an_agreement_counts(store: Store) -> None:
    store.ledger.record_agreement(agreement())
    store.ledger.record_agreement(agreement(model="another"))
    assert store.ledger.agreements() == store.ledger.agreements(is_open=True) == [agreement()]

    store.ledger.end_agreement("ag1", reason="no more work", now=after(5))
    store.ledger.end_agreement("ag1", reason="later", now=after(6))
    store.ledger.record_agreement(agreement())

    assert store.ledger.agreements(is_open=True) == []
    assert store.ledger.agreements(is_open=False) == [agreement(ended_at=after(5), reason="no more work")]


def test_an_agreement_is_settled_when_it_ended_and_its_invoice_was_decided(store: Store) -> None:
    for id in ("ended", "billed", "settled", "refused"):
        store.ledger.record_agreement(agreement(id))
    for id in ("ended", "settled", "refused"):
        store.ledger.end_agreement(id, reason="done", now=after(5))
    store.ledger.record_invoice(invoice("1", BillState.RECEIVED, id="i1", agreement_id="ended"))
    store.ledger.record_invoice(invoice("1", id="i2", agreement_id="billed"))
    store.ledger.record_invoice(invoice("1", id="i3", agreement_id="settled"))
    store.ledger.record_invoice(invoice("1", BillState.REFUSED, id="i4", agreement_id="refused", reason="too much"))

    assert [each.id for each in store.ledger.agreements(is_settled=True)] == ["refused", "settled"]
    assert [each.id for each in store.ledger.agreements(is_settled=False)] == ["billed", "ended"]
    assert [each.id for each in store.ledger.agreements(is_open=False, is_settled=False)] == ["ended"]


def test_prices_keep_their_last_digit(store: Store) -> None:
    exact = agreement(price_per_second=Decimal("0.000000000000000001"), start_price=Decimal("1E-7"))

    store.ledger.record_agreement(exact)

    assert store.ledger.agreements() == [exact]


def test_an_activity_may_be_recorded_again_with_its_end(store: Store) -> None:
    begun = ActivityRecord(id="ac1", agreement_id="ag1", created_at=NOW)

    for activity in (begun, replace(begun, ended_at=after(9), cpu_seconds=3.5, seconds=9.0), begun):
        store.ledger.record_activity(activity)


# Costs


def test_an_estimate_counts_until_the_invoice_is_accepted(store: Store) -> None:
    store.ledger.record_agreement(agreement())
    work(store, "c1", cost="0.1")
    work(store, "c2", cost="0.25")
    assert store.ledger.spent() == Decimal("0.35")

    store.ledger.record_invoice(invoice("0.3", BillState.RECEIVED))
    assert store.ledger.spent() == Decimal("0.35")

    store.ledger.record_invoice(invoice("0.3"))
    assert store.ledger.spent() == Decimal("0.3")
    assert (total_row(store).paid, total_row(store).open) == (Decimal("0.3"), 0)


def test_debit_notes_count_when_they_are_more_than_the_estimate(store: Store) -> None:
    work(store, "c1", cost="0.1")
    store.ledger.record_debit_note(debit("0.05"))
    assert store.ledger.spent() == Decimal("0.1")

    # The notes of one activity include each other; those of two add up.
    store.ledger.record_debit_note(debit("0.2", id="d2"))
    store.ledger.record_debit_note(debit("0.04", id="d3", activity_id="ac2"))
    assert store.ledger.spent() == Decimal("0.24")

    store.ledger.record_debit_note(debit("9", BillState.RECEIVED, id="d4"))
    store.ledger.record_debit_note(debit("9", BillState.REFUSED, id="d5"))
    assert store.ledger.spent() == Decimal("0.24")


def test_a_refused_invoice_costs_nothing(store: Store) -> None:
    work(store, "c1", cost="0.1")
    store.ledger.record_debit_note(debit("0.5"))
    store.ledger.record_invoice(invoice("7", BillState.REFUSED, reason="more than was agreed"))

    assert store.ledger.spent() == 0
    assert chunk_costs(store) == {"c1": ("0", True)}
    assert (total_row(store).refused, total_row(store).open, total_row(store).paid) == (7, 0, 0)


def test_an_accepted_invoice_stays_and_a_refused_one_may_still_be_accepted(store: Store) -> None:
    work(store, "c1")
    store.ledger.record_invoice(invoice("7", BillState.REFUSED))
    store.ledger.record_invoice(invoice("0.7"))
    for late in (invoice("7", BillState.RECEIVED), invoice("7", BillState.REFUSED), invoice("0.9")):
        store.ledger.record_invoice(late)

    assert store.ledger.spent() == Decimal("0.7")
    assert total_row(store).refused == 0
    assert chunk_costs(store) == {"c1": ("0.7", True)}


def test_an_invoice_is_split_by_seconds_to_the_last_digit(store: Store) -> None:
    for id, seconds in (("c1", 1.0), ("c2", 2.0), ("c3", 4.0)):
        work(store, id, seconds=seconds)
    start_chunk(store, "under way")

    store.ledger.record_invoice(invoice("0.1"))

    costs = chunk_costs(store)
    assert costs["under way"] == (None, False)
    # 0.1 by 1 : 2 : 4 in units of 1e-18: the sevenths leave .29, .57 and .14, so the second gets the remaining one.
    assert [costs[id] for id in ("c1", "c2", "c3")] == [
        ("0.014285714285714286", True),
        ("0.028571428571428571", True),
        ("0.057142857142857143", True),
    ]


def test_a_chunk_that_ends_after_the_invoice_causes_a_new_split(store: Store) -> None:
    work(store, "c1", seconds=3.0)
    store.ledger.record_invoice(invoice("1"))
    assert chunk_costs(store) == {"c1": ("1", True)}

    work(store, "c2", seconds=1.0)

    assert chunk_costs(store) == {"c1": ("0.75", True), "c2": ("0.25", True)}
    assert store.ledger.spent() == 1


def test_an_invoice_without_chunks_stays_with_its_agreement(store: Store) -> None:
    store.ledger.record_agreement(agreement())
    store.ledger.record_invoice(invoice("0.2"))

    assert store.ledger.spent() == Decimal("0.2")
    (row,) = store.ledger.costs("model")
    assert (row.key, row.paid, row.chunks) == ("resnet50", Decimal("0.2"), 0)


def test_costs_of_an_unknown_agreement_are_not_lost(store: Store) -> None:
    store.ledger.record_invoice(invoice("0.2", agreement_id="never seen"))

    assert store.ledger.spent() == Decimal("0.2")
    assert [row.key for row in store.ledger.costs("provider")] == ["unknown"]


def test_an_amount_counts_on_the_day_of_its_settlement_and_open_amounts_always(store: Store) -> None:
    tomorrow = NOW.replace(hour=0) + timedelta(days=1)
    store.ledger.record_invoice(
        invoice("1", id="i1", agreement_id="a", settled_at=tomorrow - timedelta(milliseconds=1))
    )
    store.ledger.record_invoice(invoice("2", id="i2", agreement_id="b", settled_at=tomorrow))
    work(store, "c1", agreement_id="c", cost="4")

    assert [
        store.ledger.spent(),
        store.ledger.spent(since=tomorrow),
        store.ledger.spent(since=tomorrow + timedelta(days=1)),
    ] == [7, 6, 4]
    assert [(row.key, row.paid, row.open) for row in store.ledger.costs("day")] == [
        ("2026-11-20", 1, 0),
        ("2026-11-21", 2, 0),
        ("open", 0, 4),
    ]


def test_costs_have_images_chunks_and_names(store: Store) -> None:
    store.ledger.record_agreement(agreement())
    store.ledger.record_agreement(agreement("ag2", provider_id=BETA, provider_name="beta"))
    start_chunk(store, "c1")
    answer_requests(store, "c1", 3)
    end_chunk(store, "c1")
    work(store, "c2", agreement_id="ag2", cost="0.5")
    work(store, "at home", agreement_id=None, cost=None)
    store.ledger.record_invoice(invoice("1"))

    alpha, beta = store.ledger.costs("provider")

    assert (alpha.key, alpha.name, alpha.images, alpha.chunks, alpha.paid) == (ALPHA, "alpha", 3, 1, 1)
    assert (beta.key, beta.name, beta.images, beta.chunks, beta.open) == (BETA, "beta", 0, 1, Decimal("0.5"))
    assert (total_row(store).images, total_row(store).chunks) == (3, 2)


def test_the_total_of_an_empty_ledger_is_zero(store: Store) -> None:
    assert store.ledger.spent() == 0
    assert total_row(store).paid == total_row(store).open == total_row(store).refused == 0
    assert store.ledger.costs("day") == []
    with pytest.raises(ValueError, match="grouped by"):
        store.ledger.costs("colour")


# Requests


def test_requests_share_the_cost_of_their_chunk_to_the_last_digit(store: Store) -> None:
    start_chunk(store, "c1")
    ids = answer_requests(store, "c1", 3)
    assert {store.requests.get(id).cost for id in ids} == {None}

    end_chunk(store, "c1", cost="0.1")
    assert {store.requests.get(id).is_cost_final for id in ids} == {False}
    assert total(store.requests.get(id).cost or Decimal(0) for id in ids) == Decimal("0.1")

    store.ledger.record_invoice(invoice("0.2"))
    found = [store.requests.get(id) for id in ids]
    assert [request.cost for request in found] == [
        Decimal("0.066666666666666667"),
        Decimal("0.066666666666666667"),
        Decimal("0.066666666666666666"),
    ]
    assert all(request.is_cost_final for request in found)
    assert {request.id: request.cost for request in store.requests.list()} == {
        request.id: request.cost for request in found
    }


def test_late_answers_of_a_chunk_get_the_next_shares(store: Store) -> None:
    start_chunk(store, "c1")
    first = answer_requests(store, "c1", 2)
    end_chunk(store, "c1", cost="1")
    assert [store.requests.get(id).cost for id in first] == [Decimal("0.5")] * 2

    later = answer_requests(store, "c1", 2)

    assert [store.requests.get(id).cost for id in (*first, *later)] == [Decimal("0.25")] * 4
    (chunk,) = store.chunks.list()
    assert chunk.answers == 4


def test_a_reused_answer_costs_nothing(store: Store) -> None:
    start_chunk(store, "c1")
    answer_requests(store, "c1", 1)
    end_chunk(store, "c1", cost="1")
    new = NewRequest(id=new_id(), service="classification", model="resnet50", digest="d" * 64, created_at=NOW)

    cached = store.requests.add(new, store.images.stage(b"image"))

    assert cached.is_cached
    assert store.requests.get(cached.id).cost is None


def test_answers_of_an_unrecorded_chunk_have_no_cost(store: Store) -> None:
    (id,) = answer_requests(store, "never noted", 1)
    end_chunk(store, "never noted")

    assert store.requests.get(id).cost is None


# Providers


def note(store: Store, id: str = ALPHA, name: str = "alpha", *, at: datetime = NOW) -> None:
    store.providers.record_offer(id, name=name, now=at, **PRICES)


def did(store: Store, images: int, seconds: float, *, is_failure: bool = False, model: str = "resnet50") -> None:
    store.providers.record_work(ALPHA, model=model, images=images, seconds=seconds, is_failure=is_failure, now=NOW)


def test_a_provider_is_listed_with_its_latest_offer(store: Store) -> None:
    note(store, at=NOW)
    note(store, BETA, "beta", at=after(1))
    store.providers.record_offer(ALPHA, name="alpha", now=after(2), **{**PRICES, "start_price": Decimal("0.5")})

    alpha, beta = store.providers.list()

    assert (alpha.id, alpha.first_seen_at, alpha.seen_at, alpha.start_price) == (ALPHA, NOW, after(2), Decimal("0.5"))
    assert (beta.name, beta.score, beta.done, beta.price_per_second) == ("beta", 0.5, 0, PRICES["price_per_second"])


def test_the_score_follows_the_latest_work(store: Store) -> None:
    note(store)
    scores = []
    for is_failure in [False] * 5 + [True] * 5:
        did(store, 16, 2.0, is_failure=is_failure)
        scores.append(store.providers.list()[0].score)

    assert scores[:5] == sorted(scores[:5])
    assert scores[4:] == sorted(scores[4:], reverse=True)
    assert 0 < scores[-1] < 0.5 < scores[4] < 1
    (provider,) = store.providers.list()
    assert (provider.done, provider.failed, provider.images) == (5, 5, 80)


def test_the_speed_is_that_of_the_latest_work_by_model(store: Store) -> None:
    note(store)
    did(store, 16, 1.0)
    assert store.providers.speed("resnet50") == {ALPHA: 16.0}

    for _ in range(30):
        did(store, 16, 4.0)
    did(store, 16, 0.0)
    did(store, 0, 1.0)
    did(store, 16, 900.0, is_failure=True)

    assert store.providers.speed("resnet50")[ALPHA] == pytest.approx(4.0, rel=0.01)
    assert store.providers.speed("vgg16") == {}
    assert {id: list(speeds) for id, speeds in store.providers.speeds().items()} == {ALPHA: ["resnet50"]}


def test_work_of_an_unknown_provider_is_ignored(store: Store) -> None:
    did(store, 16, 1.0)

    assert store.providers.list() == []
    assert store.providers.speeds() == {}


def test_a_ban_ends_at_its_time_or_never(store: Store) -> None:
    note(store)
    note(store, BETA, "beta")

    store.providers.ban(ALPHA, until=after(60), reason="it failed", by_operator=False)
    banned = store.providers.ban("beta", until=None, reason="it lies", by_operator=True)

    assert (banned.ban_reason, banned.banned_until, banned.is_banned_by_operator) == ("it lies", None, True)
    assert store.providers.banned(after(59)) == {ALPHA: "it failed", BETA: "it lies"}
    assert store.providers.banned(after(60)) == {BETA: "it lies"}
    assert not store.providers.unban(BETA[:12]).is_banned(NOW)
    assert store.providers.banned(after(60)) == {}


def test_a_new_offer_does_not_lift_a_ban(store: Store) -> None:
    note(store)
    store.providers.ban("alpha", until=None, reason="x", by_operator=True)

    note(store, at=after(1))

    assert store.providers.banned(after(2)) == {ALPHA: "x"}


@pytest.mark.parametrize(
    ("operators", "batchers", "kept"),
    [(None, 60, "operator"), (60, 30, "operator"), (60, 90, "batcher"), (60, None, "batcher")],
)
def test_a_batcher_never_shortens_the_ban_of_an_operator(
    store: Store, operators: float | None, batchers: float | None, kept: str
) -> None:
    note(store)

    for seconds, reason in ((operators, "operator"), (batchers, "batcher")):
        until = None if seconds is None else after(seconds)
        banned = store.providers.ban(ALPHA, until=until, reason=reason, by_operator=reason == "operator")

    assert banned.ban_reason == kept
    assert banned.is_banned_by_operator == (kept == "operator")


def test_a_name_must_match_one_provider(store: Store) -> None:
    note(store, ALPHA, "same")
    note(store, BETA, "same")
    note(store, "0xcccc01", BETA)  # a name that equals another's address does not match it

    for unclear in ("nobody", "0x", "same", ""):
        with pytest.raises(UnknownProvider):
            store.providers.ban(unclear, until=None, reason="x", by_operator=True)
    with pytest.raises(UnknownProvider, match=f"{ALPHA}, {BETA}"):
        store.providers.unban("same")
    assert store.providers.ban(BETA, until=None, reason="x", by_operator=True).id == BETA


def test_many_threads_may_record_at_once(store: Store) -> None:
    note(store)

    def one(number: int) -> None:
        id = f"ag{number}"
        store.ledger.record_agreement(agreement(id))
        work(store, f"c{number}", agreement_id=id)
        store.ledger.record_invoice(invoice("0.125", id=f"i{number}", agreement_id=id))
        did(store, 16, 1.0)
        store.ledger.spent()

    threads = [threading.Thread(target=one, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert store.ledger.spent() == 2
    assert store.providers.list()[0].done == 16


class AnyHistory(RuleBasedStateMachine):
    """Any mix of events, repeated and out of order: not a digit is lost, and every way of adding up agrees.

    The machine keeps its own books in the simplest way, as a daemon that pays would.
    """

    agreement_ids = st.sampled_from(["ag0", "ag1", "ag2"])
    states = st.sampled_from(BillState)
    amounts = st.builds(lambda units: Decimal(units).scaleb(-18), st.integers(0, 10**21))
    RANK = (BillState.RECEIVED, BillState.REFUSED, BillState.ACCEPTED)

    def __init__(self, open_store: OpenStore) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store = open_store(Path(self.folder.name))
        self.store.ledger.record_allocation(allocation())
        self.clock = 0.0
        #: id -> the invoice in its current state.
        self.invoices: dict[str, InvoiceRecord] = {}
        self.debits: dict[str, DebitNoteRecord] = {}
        #: chunk -> (agreement, estimate) of those that ended.
        self.ended: dict[str, tuple[str, Decimal]] = {}
        self.begun: list[str] = []
        self.answered = 0

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    @rule(days=st.floats(0, 2))
    def time_passes(self, days: float) -> None:
        self.clock += days * 86400

    @rule(id=agreement_ids)
    def record_agreement(self, id: str) -> None:
        provider = {"ag0": (ALPHA, "alpha"), "ag1": (BETA, "beta"), "ag2": (BETA, "beta")}[id]
        model = "vgg16" if id == "ag2" else "resnet50"
        self.store.ledger.record_agreement(
            agreement(id, provider_id=provider[0], provider_name=provider[1], model=model)
        )

    @rule(id=agreement_ids)
    def end_agreement(self, id: str) -> None:
        self.store.ledger.end_agreement(id, reason="done", now=after(self.clock))

    @rule(
        id=agreement_ids,
        number=st.sampled_from(["", "", "b"]),
        state=states,
        amount=amounts,
        times=st.integers(1, 2),
    )
    def bill(self, id: str, number: str, state: BillState, amount: Decimal, times: int) -> None:
        made = invoice(
            amount,
            state,
            id=f"invoice of {id}{number}",
            agreement_id=id,
            settled_at=None if state == BillState.RECEIVED else after(self.clock),
        )
        for _ in range(times):
            self.store.ledger.record_invoice(made)
        known = self.invoices.get(made.id)
        if known is None or self.RANK.index(state) > self.RANK.index(known.state):
            self.invoices[made.id] = made

    @precondition(lambda self: self.invoices)
    @rule(pick=st.integers(0, 10))
    def repeat_an_invoice(self, pick: int) -> None:
        known = sorted(self.invoices)[pick % len(self.invoices)]
        self.store.ledger.record_invoice(self.invoices[known])
        self.store.ledger.record_invoice(replace(self.invoices[known], state=BillState.RECEIVED, settled_at=None))

    @rule(id=agreement_ids, number=st.integers(0, 3), state=states, amount=amounts)
    def debit(self, id: str, number: int, state: BillState, amount: Decimal) -> None:
        made = debit("0", state, id=f"note {number} of {id}", activity_id=f"{id}-{number % 2}", agreement_id=id)
        made = replace(made, amount=amount)
        self.store.ledger.record_debit_note(made)
        self.store.ledger.record_debit_note(made)
        known = self.debits.get(made.id)
        if known is None or self.RANK.index(state) > self.RANK.index(known.state):
            self.debits[made.id] = made

    @rule()
    def begin_a_chunk(self) -> None:
        self.begun.append(f"c{len(self.begun)}")
        start_chunk(self.store, self.begun[-1])

    @precondition(lambda self: self.begun)
    @rule(pick=st.integers(0, 20), count=st.integers(1, 3))
    def answer(self, pick: int, count: int) -> None:
        answer_requests(self.store, self.begun[pick % len(self.begun)], count)
        self.answered += count

    @precondition(lambda self: self.begun)
    @rule(
        pick=st.integers(0, 20),
        id=agreement_ids,
        seconds=st.one_of(st.just(0.0), st.floats(0.001, 1000)),
        estimate=st.one_of(st.none(), amounts),
    )
    def end_a_chunk(self, pick: int, id: str, seconds: float, estimate: Decimal | None) -> None:
        chunk_id = self.begun[pick % len(self.begun)]
        cost = None if estimate is None else str(estimate)
        end_chunk(self.store, chunk_id, agreement_id=id, seconds=seconds, cost=cost)
        self.ended[chunk_id] = (id, estimate or Decimal(0))

    def decided(self, id: str) -> list[InvoiceRecord]:
        return [bill for bill in self.invoices.values() if bill.agreement_id == id and bill.state != BillState.RECEIVED]

    def expected(self, *, since: datetime | None = None) -> Decimal:
        """Add up the costs that the model of the test has recorded."""
        parts = [
            bill.amount
            for bill in self.invoices.values()
            if bill.state == BillState.ACCEPTED
            and (since is None or (bill.settled_at is not None and bill.settled_at >= since))
        ]
        for id in ("ag0", "ag1", "ag2"):
            if self.decided(id):
                continue
            latest: dict[str, Decimal] = defaultdict(Decimal)
            for bill in self.debits.values():
                if bill.agreement_id == id and bill.state == BillState.ACCEPTED:
                    latest[bill.activity_id] = max(latest[bill.activity_id], bill.amount)
            estimates = [estimate for agreement_id, estimate in self.ended.values() if agreement_id == id]
            parts.append(max(total(latest.values()), total(estimates)))
        return total(parts)

    @invariant()
    def every_way_of_adding_up_agrees_with_the_books(self) -> None:
        expected = self.expected()
        refused = total(bill.amount for bill in self.invoices.values() if bill.state == BillState.REFUSED)
        assert self.store.ledger.spent() == expected
        for by in COSTS_BY:
            rows = self.store.ledger.costs(by)
            assert total(amount for row in rows for amount in (row.paid, row.open)) == expected
            assert total(row.refused for row in rows) == refused
            assert sum(row.chunks for row in rows) == len(self.ended)

    @invariant()
    def a_period_has_its_days_and_what_is_open(self) -> None:
        midnight = NOW.replace(hour=0) + timedelta(days=1)
        rows = [row for row in self.store.ledger.costs("day") if row.key == "open" or row.key >= "2026-11-21"]
        in_period = total(amount for row in rows for amount in (row.paid, row.open))
        assert self.store.ledger.spent(since=midnight) == in_period == self.expected(since=midnight)

    @invariant()
    def chunks_share_their_bill_and_requests_their_chunk(self) -> None:
        requests: dict[str | None, list[RequestRecord]] = defaultdict(list)
        for request in self.store.requests.list(limit=1000):
            requests[request.chunk_id].append(request)
        shares: dict[str, list[Decimal]] = defaultdict(list)
        for chunk in self.store.chunks.list(limit=1000):
            mine = requests[chunk.id]
            assert chunk.answers == len(mine)
            assert chunk.is_cost_final == (chunk.id in self.ended and bool(self.decided(self.ended[chunk.id][0])))
            if chunk.cost is None:
                assert all(request.cost is None for request in mine)
                continue
            if mine:
                assert total(request.cost or Decimal(0) for request in mine) == Decimal(chunk.cost)
                assert {request.is_cost_final for request in mine} == {chunk.is_cost_final}
            if chunk.is_cost_final:
                assert chunk.agreement_id is not None
                shares[chunk.agreement_id].append(Decimal(chunk.cost))
        for id, each in shares.items():
            assert total(each) == total(bill.amount for bill in self.decided(id) if bill.state == BillState.ACCEPTED)

    @invariant()
    def usage_equals_a_recount_of_the_requests(self) -> None:
        costs: dict[str, list[Decimal]] = defaultdict(list)
        finals: dict[str, set[bool]] = defaultdict(set)
        sql = "SELECT id, client FROM requests JOIN usage ON usage.number = usage"
        clients: dict[str, str] = dict(self.store.database.rows(sql))
        for request in self.store.requests.list(limit=1000):
            if request.cost is not None:
                costs[clients[request.id]].append(request.cost)
                finals[clients[request.id]].add(request.is_cost_final)
        days = {"since": NOW.date(), "until": NOW.date()}
        for row in self.store.usage.list(by=["client"], **days):
            assert row.client is not None
            assert row.cost == total(costs[row.client])
            assert row.is_cost_final or False in finals[row.client] or self.has_open_chunk()
            assert not row.is_cost_final or False not in finals[row.client]
        assert self.store.usage.list(**days)[0].cost == total(total(each) for each in costs.values())

    def has_open_chunk(self) -> bool:
        """Tell whether a chunk has ended whose bill is not decided; it may have no estimate."""
        return any(not self.decided(id) for id, _ in self.ended.values())


def test_in_any_history_every_way_of_adding_up_agrees(open_store: OpenStore) -> None:
    run_state_machine_as_test(
        lambda: AnyHistory(open_store),
        settings=settings(
            max_examples=75, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
