"""What can happen to requests, chosen by numbers, and what must have followed from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from store import new_id
from store.amounts import equal_share
from store.batches import BatchInProgress, BatchRecord
from store.chunks import ChunkRecord
from store.clients.usage import OUTCOMES, ClientKind
from store.clients.webhooks import EVENTS, EndpointRecord
from store.errors import NotCancellable, NotRemovable, NotRetryable, UnknownRequest
from store.requests import Answer, Blame, Claim, NewRequest
from store.store import Store
from store.transition import DURATION_BUCKETS

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
#: Names of the final states.
FINAL = ("done", "failed", "cancelled")
MODELS = ("resnet50", "vgg16")
DIGEST = "d" * 64
CHUNK = ChunkRecord(
    id="c",
    batcher_id="b",
    executor="local",
    service="classification",
    model=MODELS[0],
    items=1,
    bytes_sent=1,
    dispatched_at=NOW,
)


@dataclass
class Driver:
    """Does things with a store, chosen by numbers."""

    store: Store
    now: datetime = NOW
    claims: list[Claim] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    batches: list[str] = field(default_factory=list)
    endpoints: list[str] = field(default_factory=list)

    def new(self, choice: int, **changes: Any) -> NewRequest:
        values: dict[str, Any] = {
            "id": new_id(),
            "service": "classification",
            "model": MODELS[choice % 2],
            "created_at": self.now,
            "digest": DIGEST,
            "labels": {"place": f"{choice % 3}"} if choice % 2 else {},
            "deadline_at": self.now + timedelta(seconds=40) if choice % 3 == 1 else None,
            "webhook": f"https://example.org/{choice % 4}" if choice % 3 == 0 else None,
            "key_id": "k" if choice % 5 == 0 else None,
            "client": tuple(ClientKind)[choice % 4],
        }
        return NewRequest(**{**values, **changes})

    def add(self, choice: int) -> None:
        new = self.new(choice)
        self.requests.append(self.store.requests.add(new, self.store.images.stage(b"%d" % (choice % 6))).id)

    def add_batch(self, choice: int) -> None:
        webhook = "https://example.org/batch" if choice % 2 else None
        batch = BatchRecord(
            id=new_id(), service="classification", model=MODELS[choice % 2], created_at=self.now, webhook=webhook
        )
        items = [
            (self.new(choice, webhook=None, batch_id=batch.id), self.store.images.stage(b"%d" % (place % 6)))
            for place in range(choice % 5)
        ]
        client = tuple(ClientKind)[choice % 4]
        self.requests += [request.id for request in self.store.batches.add(batch, items, [], client=client)]
        self.batches.append(batch.id)

    def claim(self, choice: int) -> None:
        self.claims += self.store.requests.claim(
            models=MODELS[: 1 + choice % 2],
            limit=1 + choice % 20,
            now=self.now,
            lease_ends_at=self.now + timedelta(seconds=30),
            oldest_before=None,
        )

    def some_claims(self, choice: int) -> list[Claim]:
        """A few of the latest claims, among them claims that are no longer valid, and one twice."""
        latest = self.claims[-8:]
        first = choice % len(latest)
        return [*latest[first : first + 1 + choice % 4], latest[first]]

    def renew(self, choice: int) -> None:
        self.store.requests.renew(self.some_claims(choice), lease_ends_at=self.now + timedelta(seconds=30))

    def finish(self, choice: int) -> None:
        answers = [
            Answer(claim=claim, output=[["a", 0.5]], digest=DIGEST, chunk_id="c", provider="p", seconds=0.1)
            for claim in self.some_claims(choice)
        ]
        self.store.requests.finish(answers, now=self.now)

    def fail(self, choice: int) -> None:
        self.store.requests.fail(self.some_claims(choice), code=f"code_{choice % 2}", reason="x", now=self.now)

    def release(self, choice: int) -> None:
        blame = (Blame.ITEM, Blame.CHUNK, Blame.ITEM, Blame.NOBODY)[choice % 4]
        self.store.requests.release(self.some_claims(choice), blame=blame, code="x", reason="y", now=self.now)

    def release_expired(self, choice: int) -> None:
        self.store.requests.release_expired(self.now)

    def expire(self, choice: int) -> None:
        self.store.requests.expire(self.now)

    def cancel(self, choice: int) -> None:
        self.store.requests.cancel(self.requests[choice % len(self.requests)], now=self.now)

    def retry(self, choice: int) -> None:
        self.store.requests.retry(self.requests[choice % len(self.requests)], now=self.now)

    def remove(self, choice: int) -> None:
        self.store.requests.remove(self.requests[choice % len(self.requests)])

    def cancel_batch(self, choice: int) -> None:
        self.store.batches.cancel(self.batches[choice % len(self.batches)], now=self.now)

    def retry_batch(self, choice: int) -> None:
        self.store.batches.retry(self.batches[choice % len(self.batches)], now=self.now)

    def remove_batch(self, choice: int) -> None:
        self.store.batches.remove(self.batches[choice % len(self.batches)])

    def purge(self, choice: int) -> None:
        before = self.now - timedelta(seconds=choice % 90)
        self.store.retention.purge(images_before=before, results_before=before - timedelta(seconds=20), now=self.now)

    def add_endpoint(self, choice: int) -> None:
        endpoint = EndpointRecord(
            id=f"we_{len(self.endpoints)}",
            url=f"https://example.org/endpoint/{choice % 2}",
            events=(EVENTS, EVENTS[:1], EVENTS[1:])[choice % 3],
            secret="s",
            created_at=self.now,
        )
        self.store.webhooks.add_endpoint(endpoint)
        self.endpoints.append(endpoint.id)

    def disable_endpoint(self, choice: int) -> None:
        self.store.webhooks.disable_endpoint(self.endpoints[choice % len(self.endpoints)], reason="gone", now=self.now)

    def wait(self, choice: int) -> None:
        self.now += timedelta(seconds=choice % 35)


ACTIONS = [name for name, value in vars(Driver).items() if callable(value) and name[0] != "_"]
ACTIONS = [name for name in ACTIONS if name not in ("new", "some_claims")]
#: Of an action that is not possible now, or has nothing yet to choose from.
IMPOSSIBLE = (UnknownRequest, NotCancellable, NotRetryable, NotRemovable, BatchInProgress, ZeroDivisionError)
#: These happen more often, so that there is something to change.
FREQUENT = ["add", "add_batch", "claim", "claim", "claim", "release", "release", "fail", "wait", "retry_batch"]


@dataclass
class Facts:
    """What the database has, read by plain statements."""

    requests: dict[int, dict[str, Any]]
    batches: dict[str, dict[str, Any]]
    endpoints: list[dict[str, Any]]
    changes: list[tuple[int, str]]
    totals: Counter[tuple[str, str, str, float]]
    deliveries: Counter[tuple[str | None, str, str, str, str]]
    labels: set[tuple[str, str, int]]
    #: Sum of the totals' seconds.
    seconds: float
    #: Answers that chunks gave.
    answers: int
    #: (number of the row, column) -> what it has counted.
    usage: Counter[tuple[int, str]]
    #: Number of the row -> its cost; and that of its requests, with those that were deleted left out.
    costs: dict[int, Decimal]
    shares: dict[int, Decimal]
    #: Model -> requests that have not ended, as they are counted.
    open: Counter[str]


#: The columns of `usage` that are counted here; costs are in `test_ledger.py`.
USED = ("accepted", "refused", *OUTCOMES, "bytes", "microseconds")


_SHARES = """
    SELECT usage, share, cost, answers FROM requests JOIN chunks ON chunks.id = chunk_id
    WHERE share IS NOT NULL AND cost IS NOT NULL
"""


def read_facts(store: Store) -> Facts:
    rows = store.database.rows
    totals = rows("SELECT model, outcome, code, up_to, count, seconds FROM totals")
    deliveries = rows("SELECT endpoint_id, url, event, subject, state FROM webhook_deliveries")
    costs = {row["number"]: Decimal(row["cost"]) for row in rows("SELECT number, cost FROM usage")}
    shares = dict.fromkeys(costs, Decimal(0))
    for row in rows(_SHARES):
        shares[row["usage"]] += equal_share(Decimal(row["cost"]), row["answers"], row["share"])
    return Facts(
        requests={row["number"]: dict(row) for row in rows("SELECT * FROM requests")},
        batches={row["id"]: dict(row) for row in rows("SELECT * FROM batches")},
        endpoints=[dict(row) for row in rows("SELECT * FROM webhook_endpoints WHERE disabled_at IS NULL")],
        changes=[tuple(row) for row in rows("SELECT number, state FROM changes ORDER BY seq")],
        totals=Counter({tuple(row)[:4]: row["count"] for row in totals}),
        seconds=sum(row["seconds"] for row in totals),
        deliveries=Counter(map(tuple, deliveries)),
        labels={tuple(row) for row in rows("SELECT name, value, number FROM request_labels")},
        answers=sum(row["answers"] for row in rows("SELECT answers FROM chunks")),
        usage=Counter(
            {(row["number"], name): row[name] for row in rows("SELECT * FROM usage") for name in USED if row[name]}
        ),
        costs=costs,
        shares=shares,
        open=Counter({row["model"]: row["count"] for row in rows("SELECT * FROM open_requests WHERE count != 0")}),
    )


def recount(requests: Iterable[dict[str, Any]]) -> Counter[tuple[int, str]]:
    """What `usage` must have counted for requests."""
    found: Counter[tuple[int, str]] = Counter()
    for request in requests:
        number = request["usage"]
        found[number, "accepted"] += 1
        found[number, "bytes"] += request["image_bytes"]
        if request["state"] in FINAL:
            _, name, _, _ = outcome(request)
            found[number, name] += 1
            if name == "done":
                found[number, "microseconds"] += round(request["seconds"] * 1e6)
    return found


def count_open(facts: Facts) -> Counter[str]:
    """What `open_requests` must have."""
    return Counter(request["model"] for request in facts.requests.values() if request["state"] not in FINAL)


def lasted(request: dict[str, Any]) -> float:
    """Seconds from the arrival to the end."""
    return (
        datetime.fromisoformat(request["finished_at"]) - datetime.fromisoformat(request["created_at"])
    ).total_seconds()


def outcome(request: dict[str, Any]) -> tuple[str, str, str, float]:
    """The row of `totals` that counts a request that ended."""
    up_to = min(bound for bound in DURATION_BUCKETS if lasted(request) <= bound)
    name = request["state"]
    if name == "done" and request["is_cached"]:
        name = "cached"
    if name == "cancelled" and request["code"] == "expired":
        name = "expired"
    return request["model"], name, request["code"] if name == "failed" else "", up_to


def check_what_followed(before: Facts, after: Facts) -> None:
    """Compare what one action wrote with the states before and after it."""
    changed = {
        number: request
        for number, request in after.requests.items()
        if request["state"] != (before.requests[number]["state"] if number in before.requests else "queued")
    }
    ended = {number: request for number, request in changed.items() if request["state"] in FINAL}
    batches_of_ended = Counter(request["batch_id"] for request in ended.values() if request["batch_id"])
    waiting = {r["batch_id"] for r in after.requests.values() if r["state"] in ("queued", "claimed")}
    events = [("request.done", request["id"], request["state"], request["webhook"]) for request in ended.values()]
    empty = [id for id, batch in after.batches.items() if not batch["total"] and id not in before.batches]
    ended_batches = [*(id for id in batches_of_ended if id not in waiting), *empty]
    events += [("batch.done", id, "done", after.batches[id]["webhook"]) for id in ended_batches]
    deliveries = Counter(
        (endpoint_id, url, event, subject, state)
        for event, subject, state, webhook in events
        for endpoint_id, url in [
            *((each["id"], each["url"]) for each in after.endpoints if event in each["events"].split(",")),
            *([(None, webhook)] if webhook else []),
        ]
    )

    answered = [
        request["share"] for request in ended.values() if request["state"] == "done" and not request["is_cached"]
    ]

    assert after.changes[: len(before.changes)] == before.changes
    assert sorted(after.changes[len(before.changes) :]) == sorted((n, r["state"]) for n, r in changed.items())
    assert after.totals - before.totals == Counter(map(outcome, ended.values()))
    assert after.seconds - before.seconds == pytest.approx(sum(map(lasted, ended.values())))
    assert after.deliveries - before.deliveries == deliveries
    assert sorted(answered) == list(range(int(before.answers), int(after.answers)))
    # Of those that were deleted, everything stays counted.
    kept = [request for number, request in before.requests.items() if number in after.requests]
    used = before.usage.copy()
    used.subtract(recount(kept))
    used.update(recount(after.requests.values()))
    assert +used == after.usage
    assert after.open == count_open(after)
    for id, batch in after.batches.items():
        earlier = before.batches[id]["ended"] if id in before.batches else 0
        numbers = [request["ended_number"] for request in ended.values() if request["batch_id"] == id]
        assert batch["ended"] == earlier + batches_of_ended[id]
        assert sorted(numbers) == list(range(earlier + 1, batch["ended"] + 1))


def check_recount(facts: Facts) -> None:
    """Compare the feed, the totals, the webhook queue and the batches with each other; nothing may be purged."""
    ends = [(number, state) for number, state in facts.changes if state in FINAL]
    last = dict(facts.changes)

    assert recount(facts.requests.values()) == facts.usage
    assert facts.shares == facts.costs
    assert facts.open == count_open(facts)
    assert {n: r["state"] for n, r in facts.requests.items()} == {n: last.get(n, "queued") for n in facts.requests}
    assert facts.totals.total() == len(ends)
    assert Counter(name for _, name, _, _ in facts.totals.elements())["failed"] == [s for _, s in ends].count("failed")
    for endpoint in facts.endpoints:
        sent = [key for key in facts.deliveries.elements() if key[0] == endpoint["id"] and key[2] == "request.done"]
        assert sorted((subject, state) for *_, subject, state in sent) == sorted(
            (facts.requests[number]["id"], state) for number, state in ends
        )
    for id, batch in facts.batches.items():
        members = [request for request in facts.requests.values() if request["batch_id"] == id]
        numbers = [request["number"] for request in members]
        ended = [request["ended_number"] for request in members if request["finished_at"] is not None]
        assert batch["ended"] == sum(number in numbers for number, _ in ends)
        assert len(set(ended)) == len(ended) and None not in ended
    assert len(facts.labels) == sum(request["labels"] != "{}" for request in facts.requests.values())
