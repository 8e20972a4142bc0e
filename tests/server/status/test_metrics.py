"""The metrics for Prometheus: every line is valid, and counters never decrease."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import flask.testing
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.app import create_app
from server.settings import ServerSettings
from server.status.metrics import MAX_CODES, Family, exposition
from store import new_id
from store.processes.batchers import BatcherRecord
from store.requests import Answer, Claim, NewRequest
from store.states import RequestState
from store.store import Store
from store.transition import transition

MODEL = "efficientnet_lite0"
START = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)


class MetricsHarness:
    """A store with a clock, and methods to end requests in every way."""

    def __init__(self, settings: ServerSettings, store: Store) -> None:
        self.store = store
        self.now = START
        self.client: flask.testing.FlaskClient = create_app(settings, store, clock=lambda: self.now).test_client()

    def add(self, image: bytes, **facts: Any) -> str:
        return self.store.requests.add(
            NewRequest(
                **{"id": new_id(), "service": "classification", "model": MODEL, "created_at": self.now, **facts}
            ),
            self.store.images.stage(image),
        ).id

    def claim(self, limit: int = 100) -> list[Claim]:
        return self.store.requests.claim(
            models=[MODEL], limit=limit, now=self.now, lease_ends_at=self.now + timedelta(hours=9), oldest_before=None
        )

    def answer(self, claims: list[Claim]) -> None:
        answers = [
            Answer(claim=claim, output=[], digest="d" * 64, chunk_id="c", provider="local", seconds=0.1)
            for claim in claims
        ]
        self.store.requests.finish(answers, now=self.now)

    def fail(self, claims: list[Claim], code: str) -> None:
        self.store.requests.fail(claims, code=code, reason="It broke.", now=self.now)

    def read(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Return all samples: name and labels -> value."""
        answer = self.client.get("/metrics")
        assert answer.status_code == 200
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        return self.read()[name, tuple(sorted(labels.items()))]


@pytest.fixture
def harness(settings: ServerSettings, store: Store) -> MetricsHarness:
    return MetricsHarness(settings, store)


def end_requests(harness: MetricsHarness) -> None:
    """Have one request end in each way."""
    harness.add(b"one")
    harness.answer(harness.claim())
    harness.add(b"one", digest="d" * 64)
    harness.add(b"two")
    harness.fail(harness.claim(), "broken_image")
    harness.store.requests.cancel(harness.add(b"three"), now=harness.now)


def test_every_line_is_valid_and_every_metric_has_help_and_type(harness: MetricsHarness) -> None:
    end_requests(harness)
    harness.add(b"four")
    answer = harness.client.get("/metrics")

    families = list(text_string_to_metric_families(answer.text))

    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    names = [family.name for family in families]
    assert len(names) == len(set(names)) > 15
    for family in families:
        assert family.name.startswith("mlg_") and family.documentation.endswith(".")
        assert family.type in ("counter", "gauge", "histogram")
    lines = answer.text.splitlines()
    for kind in ("HELP", "TYPE"):
        listed = [line.split()[2] for line in lines if line.startswith(f"# {kind} ")]
        assert len(listed) == len(names)
        assert {name.removesuffix("_total") for name in listed} == {name.removesuffix("_total") for name in names}
    assert answer.text.endswith("\n")
    assert len({line.rsplit(" ", 1)[0] for line in lines}) == len(lines)


def test_requests_are_counted_by_outcome(harness: MetricsHarness) -> None:
    end_requests(harness)

    read = harness.read()

    ended = {dict(labels)["outcome"]: count for (name, labels), count in read.items() if name.endswith("_ended_total")}
    assert ended == {"done": 1, "cached": 1, "failed": 1, "cancelled": 1}
    assert read["mlg_requests_failed_total", (("code", "broken_image"),)] == 1
    assert read["mlg_requests_accepted_total", ()] == 4


def test_totals_do_not_decrease_when_retention_deletes_requests_or_a_request_is_tried_again(
    harness: MetricsHarness,
) -> None:
    end_requests(harness)
    before = harness.read()
    (failed,) = [request for request in harness.store.requests.list() if request.state == "failed"]
    harness.store.requests.retry(failed.id, now=harness.now)
    harness.answer(harness.claim())
    harness.now += timedelta(days=60)

    purged = harness.store.retention.purge(images_before=harness.now, results_before=harness.now, now=harness.now)

    assert purged.results == 4
    after = harness.read()
    for (name, labels), value in before.items():
        if name.endswith(("_total", "_count", "_sum", "_bucket")):
            assert after[name, labels] >= value, name
    assert after["mlg_requests_ended_total", (("model", MODEL), ("outcome", "done"))] == 2


def test_the_histogram_counts_each_answer_once_by_how_long_it_took(harness: MetricsHarness) -> None:
    taken = (0.05, 0.1, 0.2, 45, 700, 10**6)
    for place, seconds in enumerate(taken):
        harness.add(b"%d" % place, created_at=START - timedelta(seconds=seconds))
    harness.answer(harness.claim())

    read = harness.read()

    buckets = {
        float(dict(labels)["le"]): count
        for (name, labels), count in read.items()
        if name == "mlg_request_seconds_bucket"
    }
    assert list(buckets.values()) == sorted(buckets.values())
    assert buckets[0.1] == 2 and buckets[0.25] == 3 and buckets[60] == 4 and buckets[1200] == 5
    assert buckets[math.inf] == read["mlg_request_seconds_count", (("model", MODEL),)] == len(taken)
    assert read["mlg_request_seconds_sum", (("model", MODEL),)] == pytest.approx(sum(taken), abs=0.01)


def test_an_expired_request_is_counted_as_such_and_not_as_cancelled(harness: MetricsHarness) -> None:
    id = harness.add(b"one")
    harness.store.database.write(
        lambda transaction: transition(
            transaction,
            RequestState.CANCELLED,
            "id = :id",
            [{"id": id}],
            columns="code = 'expired'",
            now=harness.now,
        )
    )

    assert harness.value("mlg_requests_ended_total", model=MODEL, outcome="expired") == 1


def test_queue_batchers_providers_and_spending_have_gauges(harness: MetricsHarness) -> None:
    harness.add(b"one")
    harness.add(b"two")
    harness.claim(1)
    harness.now += timedelta(seconds=30)
    live = datetime.now(UTC)
    for id, capacity in (("b1", 4), ("b2", 2)):
        harness.store.batchers.heartbeat(
            BatcherRecord(
                id=id,
                host="h",
                pid=1,
                executor="golem",
                every_seconds=1,
                max_wait_seconds=1,
                capacity=capacity,
                started_at=live,
                seen_at=live,
                budget={"day": "0.5"},
            )
        )
    for number, name in enumerate(("alpha", "beta", "gamma")):
        harness.store.providers.record_offer(
            f"0x{number:040x}",
            name=name,
            start_price=Decimal(0),
            price_per_cpu_second=Decimal(0),
            price_per_second=Decimal(0),
            now=harness.now,
        )
    harness.client.post("/operator/providers/beta/ban")
    harness.client.post("/operator/pause")
    harness.store.reservations.reserve("r1", batcher_id="b1", purpose=MODEL, amount=Decimal("0.25"), now=harness.now)

    read = harness.read()

    for name, labels, value in (
        ("mlg_queue_waiting", {"model": MODEL}, 1),
        ("mlg_queue_claimed", {"model": MODEL}, 1),
        ("mlg_queue_oldest_seconds", {"model": MODEL}, 30),
        ("mlg_batchers", {}, 2),
        ("mlg_capacity", {}, 6),
        ("mlg_providers", {"state": "good"}, 2),
        ("mlg_providers", {"state": "banned"}, 1),
        ("mlg_hold", {"mode": "paused"}, 1),
        ("mlg_hold", {"mode": "draining"}, 0),
        ("mlg_budget_glm", {"period": "day"}, 0.5),
        ("mlg_budget_used_glm", {"period": "day"}, 0.25),
        ("mlg_budget_used_glm", {"period": "total"}, 0.25),
        ("mlg_spent_glm", {}, 0),
    ):
        assert read[name, tuple(sorted(labels.items()))] == value, name
    assert ("mlg_budget_glm", (("period", "total"),)) not in read


def test_codes_beyond_the_maximum_share_one_series(harness: MetricsHarness) -> None:
    for number in range(MAX_CODES + 5):
        harness.add(b"%d" % number)
        harness.fail(harness.claim(), f"code{number:03d}")

    codes = {dict(labels)["code"]: count for (name, labels), count in harness.read().items() if "failed_total" in name}

    assert len(codes) == MAX_CODES + 1 and codes["other"] == 5


def test_labels_with_special_characters_are_escaped() -> None:
    awkward = 'a "quoted" \\ back\nslash, {braces} = ünïcode'
    family = Family(name="mlg_x", kind="gauge", help="Back\\slash\nand line.", samples=[("", {"code": awkward}, 1.5)])

    (read,) = text_string_to_metric_families(exposition([family]))

    assert read.samples[0].labels == {"code": awkward} and read.samples[0].value == 1.5
    assert read.documentation == "Back\\slash\nand line."


def test_the_migration_counts_the_requests_of_an_older_database(
    settings: ServerSettings, store: Store, harness: MetricsHarness
) -> None:
    end_requests(harness)

    def undo(transaction: Any) -> None:
        for statement in (
            "DROP TABLE totals",
            "DROP TABLE controls",
            "DROP INDEX chunks_finished",
            "DROP INDEX chunks_under_way",
            "DROP INDEX chunks_failed",
            "ALTER TABLE batchers DROP COLUMN budget",
            "DELETE FROM migrations WHERE name IN ('m008_controls', 'm009_transition')",
        ):
            transaction.execute(statement).fetchall()

    before = {(each.outcome, each.code, each.count) for each in store.stats.list_totals()}
    store.database.write(undo)

    assert store.migrate() == ["m008_controls", "m009_transition"]
    assert {(each.outcome, each.code, each.count) for each in store.stats.list_totals()} == before
    assert len(before) == 4
