"""The operator's dashboard, controls, page and commands."""

from __future__ import annotations

import importlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import flask.testing
import pytest
from click.testing import CliRunner

from cli.operate import operate
from server.app import create_app
from server.pages.charts import minutes_chart, nice_ticks, points_chart
from server.settings import ServerSettings
from server.status.dashboard import Dashboard
from server.status.queue_stats import QueueStats
from server.status.stale_cache import StaleCache
from store import new_id
from store.chunks import ChunkRecord
from store.processes.batchers import BatcherRecord
from store.rentals.ledger import AgreementRecord, AllocationRecord, BillState, InvoiceRecord
from store.requests import Answer, Claim, NewRequest, RequestRecord
from store.store import Store

MODEL = "efficientnet_lite0"
ADDRESS = "0xa1fa000000000000000000000000000000000001"


class OperatorHarness:
    """A store with a clock, and methods to make requests and chunks in it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.now = datetime.now(UTC).replace(microsecond=0)
        self._chunks = 0

    def clock(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def add(self, count: int = 1, *, model: str = MODEL) -> list[RequestRecord]:
        return [
            self.store.requests.add(
                NewRequest(id=new_id(), service="classification", model=model, is_fresh=True, created_at=self.now),
                self.store.images.stage(b"image"),
            )
            for _ in range(count)
        ]

    def claim(self, limit: int = 100) -> list[Claim]:
        return self.store.requests.claim(
            models=[MODEL], limit=limit, now=self.now, lease_ends_at=self.now + timedelta(hours=1), oldest_before=None
        )

    def start_chunk(self, items: int, **facts: Any) -> str:
        self._chunks += 1
        self.store.chunks.start(
            ChunkRecord(
                **{
                    "id": f"chunk{self._chunks}",
                    "batcher_id": "b1",
                    "executor": "local",
                    "provider": None,
                    "service": "classification",
                    "model": MODEL,
                    "items": items,
                    "bytes_sent": 1,
                    "bytes_received": None,
                    "dispatched_at": self.now,
                    "finished_at": None,
                    "seconds": None,
                    "done": None,
                    "failed": None,
                    "cost": None,
                    "code": None,
                    "reason": None,
                    **facts,
                }
            )
        )
        return f"chunk{self._chunks}"

    def end_chunk(
        self, id: str, *, done: int, failed: int = 0, code: str | None = None, cost: str | None = None
    ) -> None:
        self.store.chunks.finish(
            id,
            provider="local",
            bytes_received=1,
            seconds=1.0,
            done=done,
            failed=failed,
            cost=cost,
            code=code,
            reason=None if code is None else "It broke.",
            now=self.now,
            agreement_id=None if cost is None else "ag1",
            provider_id=None if cost is None else ADDRESS,
        )

    def answer(self, claims: list[Claim]) -> None:
        """Answer claims, all in one chunk."""
        id = self.start_chunk(len(claims))
        self.store.requests.finish(
            [
                Answer(
                    claim=claim,
                    output=[["n1", "cat", 0.9]],
                    digest="d" * 64,
                    chunk_id=id,
                    provider="local",
                    seconds=0.25,
                )
                for claim in claims
            ],
            now=self.now,
        )
        self.end_chunk(id, done=len(claims))

    def heartbeat(self, **facts: Any) -> None:
        """Record the heartbeat of a batcher."""
        self.store.batchers.heartbeat(
            BatcherRecord(
                **{
                    "id": "b1",
                    "host": "here",
                    "pid": 1,
                    "executor": "local",
                    "every_seconds": 600,
                    "max_wait_seconds": 600,
                    "capacity": 4,
                    "started_at": self.now,
                    "seen_at": self.now,
                    **facts,
                }
            )
        )

    def status(self) -> dict[str, Any]:
        """Find all figures anew."""
        return Dashboard(self.store, QueueStats(self.store), self.clock).status()


@pytest.fixture
def harness(store: Store) -> OperatorHarness:
    return OperatorHarness(store)


@pytest.fixture
def client(settings: ServerSettings, store: Store, harness: OperatorHarness) -> flask.testing.FlaskClient:
    return create_app(settings, store, clock=harness.clock).test_client()


@pytest.fixture
def command(settings: ServerSettings, store: Store) -> Callable[..., Any]:
    """Run a command of the group on the home."""

    def run(*words: str) -> Any:
        return CliRunner().invoke(operate, [words[0], "--home", str(settings.home), *words[1:]])

    return run


# Dashboard


def test_the_queue_shows_how_many_requests_wait_and_for_how_long(harness: OperatorHarness) -> None:
    harness.add(2)
    harness.advance(30)
    harness.add()
    (claim,) = harness.claim(1)

    status = harness.status()

    (row,) = status["queue"]
    assert (row["model"], row["waiting"], row["claimed"], row["oldest_seconds"]) == (MODEL, 2, 1, 30)
    assert (status["waiting"], status["claimed"], status["is_idle"]) == (2, 1, False)
    assert claim.model == MODEL


def test_throughput_counts_requests_received_and_answered_per_minute(harness: OperatorHarness) -> None:
    harness.now = harness.now.replace(second=30)
    harness.add(5)
    harness.answer(harness.claim())
    harness.advance(60)
    harness.add(3)
    harness.answer(harness.claim(2))

    throughput = harness.status()["throughput"]

    assert [(each["arrived"], each["answered"], each["images"]) for each in throughput["minutes"][-2:]] == [
        (5, 5, 5),
        (3, 2, 2),
    ]
    assert len(throughput["minutes"]) == 60
    assert throughput["minutes"][-1]["minute"] == harness.now.strftime("%Y-%m-%dT%H:%MZ")
    for period, length in (("hour", 59.5), ("day", 1439.5)):
        found = throughput[period]
        assert (found["arrived"], found["answered"], found["images"]) == (8, 7, 7)
        assert found["answered_per_minute"] == round(7 / length, 2)


def test_past_minutes_are_not_read_again_except_for_chunks_that_end_late(
    harness: OperatorHarness, monkeypatch: Any
) -> None:
    dashboard = Dashboard(harness.store, QueueStats(harness.store), harness.clock)
    starts = []
    read = harness.store.stats.list_minute_stats
    monkeypatch.setattr(harness.store.stats, "list_minute_stats", lambda since: starts.append(since) or read(since))
    late = harness.start_chunk(4)
    harness.add(3)
    harness.answer(harness.claim())
    dashboard._read_minutes()
    ended_at = harness.now
    harness.advance(180)
    now, harness.now = harness.now, ended_at
    harness.end_chunk(late, done=4)  # recorded three minutes after it ended
    harness.now = now

    minutes = dashboard._read_minutes()

    assert sum(each["images"] for each in minutes) == 7
    assert starts[1] - starts[0] > timedelta(hours=23)
    harness.advance(25 * 3600)
    assert sum(each["images"] for each in dashboard._read_minutes()) == 0


def test_latencies_are_percentiles_of_the_latest_results(harness: OperatorHarness) -> None:
    for seconds in range(1, 101):
        harness.add()
        harness.advance(seconds)
        claims = harness.claim()
        harness.advance(1)
        harness.answer(claims)

    latency = harness.status()["latency"]

    assert latency["of"] == 100
    assert latency["wait"] == {"p50": 50, "p95": 95, "p99": 99}
    assert latency["answer"] == {"p50": 51, "p95": 96, "p99": 100}
    assert latency["model"] == {"p50": 0.25, "p95": 0.25, "p99": 0.25}


def test_failures_are_grouped_by_code_with_the_latest_reason(harness: OperatorHarness) -> None:
    harness.add(3)
    claims = harness.claim()
    for claim, code in zip(claims, ("broken_image", "timeout", "broken_image"), strict=True):
        harness.advance(1)
        harness.store.requests.fail([claim], code=code, reason=f"{code} of {claim.number}", now=harness.now)
    harness.end_chunk(harness.start_chunk(2), done=0, failed=2, code="worker_died")

    failures = harness.status()["failures"]

    assert [(row["code"], row["count"], row["reason"]) for row in failures["requests"]] == [
        ("broken_image", 2, f"broken_image of {claims[2].number}"),
        ("timeout", 1, f"timeout of {claims[1].number}"),
    ]
    assert [(row["code"], row["count"]) for row in failures["chunks"]] == [("worker_died", 1)]


def test_only_chunks_of_live_batchers_are_running(harness: OperatorHarness) -> None:
    harness.heartbeat()
    harness.start_chunk(16)
    harness.start_chunk(16, batcher_id="one that was killed")
    harness.advance(5)

    status = harness.status()

    assert [(row["id"], row["items"], row["seconds"]) for row in status["chunks"]] == [("chunk1", 16, 5)]
    assert (len(status["batchers"]), status["capacity"]) == (1, 4)


def test_spending_shows_what_was_spent_today_and_what_is_left(harness: OperatorHarness) -> None:
    harness.heartbeat(executor="golem", budget={"day": "1", "total": "5.5"})
    harness.heartbeat(id="b2", executor="golem", budget={"day": "0.5"})
    for id, settled_at in (("ag1", harness.now), ("ag2", harness.now - timedelta(days=2))):
        harness.store.ledger.record_agreement(
            AgreementRecord(
                id=id,
                allocation_id="al1",
                provider_id=ADDRESS,
                provider_name="alpha",
                model=MODEL,
                start_price=Decimal(0),
                price_per_cpu_second=Decimal(0),
                price_per_second=Decimal(0),
                created_at=settled_at,
            )
        )
        harness.store.ledger.record_invoice(
            InvoiceRecord(
                id=f"of {id}",
                agreement_id=id,
                amount=Decimal("0.2"),
                state=BillState.ACCEPTED,
                received_at=settled_at,
                settled_at=settled_at,
            )
        )
    harness.store.ledger.record_allocation(
        AllocationRecord(
            id="al1", batcher_id="b1", platform="erc20", address="0x1", amount=Decimal("0.7"), created_at=harness.now
        )
    )

    harness.store.reservations.set_caps("b2", {"day": Decimal("0.5")})
    # More digits than a default context of decimals has.
    reserved, left = Decimal("0.12000000000000000000000000000001"), Decimal("0.17999999999999999999999999999999")
    harness.store.reservations.reserve("r1", batcher_id="b2", purpose=MODEL, amount=reserved, now=harness.now)

    money = harness.status()["money"]

    assert (Decimal(money["today"]), Decimal(money["total"])) == (Decimal("0.2"), Decimal("0.4"))
    assert (money["used_day"], money["used_total"]) == (f"0.32{str(reserved)[4:]}", f"0.52{str(reserved)[4:]}")
    assert (Decimal(money["budget_day"]), Decimal(money["left_day"])) == (Decimal("0.5"), left)
    assert Decimal(money["left_total"]) == Decimal("4.97999999999999999999999999999999")
    # Exactly what is left may be reserved.
    for amount, is_denied in ((Decimal("0.181"), True), (Decimal(money["left_day"]), False)):
        denial = harness.store.reservations.reserve(
            f"r{amount}", batcher_id="b2", purpose=MODEL, amount=amount, now=harness.now
        )
        assert (denial is not None) == is_denied
    assert [Decimal(each["amount"]) for each in money["allocations"]] == [Decimal("0.7")]


def test_a_cached_figure_is_loaded_again_when_it_is_stale_or_invalidated(monkeypatch: Any) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("server.status.stale_cache.time.monotonic", lambda: now[0])
    now = [0.0]
    cache = StaleCache(lambda: next(clock), fresh_seconds=1, stale_seconds=5)

    assert (cache.get(), cache.get()) == (0, 0)
    now[0] = 5.0
    assert cache.get() == 1
    cache.invalidate()
    assert cache.get() == 2


def test_a_cached_figure_is_loaded_again_after_no_thread_could_be_started(monkeypatch: Any) -> None:
    clock, now = iter(range(100)), [0.0]
    monkeypatch.setattr("server.status.stale_cache.time.monotonic", lambda: now[0])
    cache = StaleCache(lambda: next(clock), fresh_seconds=1, stale_seconds=5)
    cache.get()
    now[0] = 2.0

    def no_thread(*arguments: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as without_threads:
        without_threads.setattr(threading.Thread, "start", no_thread)
        assert cache.get() == 0
    now[0] = 6.0

    found: list[int] = []
    reader = threading.Thread(target=lambda: found.append(cache.get()), daemon=True)
    reader.start()
    reader.join(120)
    assert found == [1]


@pytest.mark.parametrize(
    ("name", "indexes"),
    [
        ("requests:_FIRST_QUEUED", {"requests_queued"}),
        ("requests:_OLDEST_DUE", {"requests_queued", "batches_arriving"}),
        ("requests:_COUNT_DUE", {"requests_queued", "batches_arriving"}),
        ("requests:_NEXT_DUE", {"requests_queued", "batches_arriving"}),
        ("requests:_BACKLOG", {"requests_queued", "requests_claimed", "batches_arriving"}),
        ("stats:_MINUTES", {"chunks_finished"}),
        ("stats:_ANSWERED", {"requests_finished"}),
        ("stats:_FAILURES", {"requests_failed"}),
        ("stats:_FAILED_CHUNKS", {"chunks_failed"}),
        ("stats:_UNFINISHED_CHUNKS", {"chunks_under_way"}),
        ("stats:_PIPELINES_BEFORE", {"pipeline_runs_number"}),
        ("pipelines.pipelines:_READY", {"pipeline_runs_ready", "batches_arriving"}),
        ("pipelines.pipelines:_WAITING_MODELS", {"requests_parent", "requests_queued"}),
    ],
)
def test_frequent_queries_use_an_index_that_stays_small(store: Store, name: str, indexes: set[str]) -> None:
    module, _, attribute = name.partition(":")
    statement = getattr(importlib.import_module(f"store.{module}"), attribute)
    if not statement.lstrip().startswith(("SELECT", "WITH")):
        statement = f"UPDATE requests SET token = 1 WHERE {statement}"
    values: Any = dict.fromkeys(re.findall(r":(\w+)", statement), 1) or [1] * statement.count("?")

    with store.database.read() as connection:
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", values)]

    assert {found for line in plan for found in re.findall(r"(?<!VIRTUAL TABLE )INDEX (\w+)", line)} == indexes, plan
    assert not [line for line in plan if re.fullmatch(r"SCAN (requests|chunks)|SCAN .*requests_queued", line)], plan


# Controls


def test_pausing_resuming_and_running_change_the_control_state(
    client: flask.testing.FlaskClient, store: Store, harness: OperatorHarness
) -> None:
    paused = client.post("/operator/pause", data={"reason": "new kernel"})
    pause = store.controls.state().pause

    assert paused.status_code == 200 and paused.json is not None
    assert pause is not None
    assert paused.json["hold"] == {
        "mode": "paused",
        "by": "the operator",
        "since": harness.now.strftime("%Y-%m-%dT%H:%M:%S.000Z"),
        "reason": "new kernel",
    }
    assert client.get("/operator/status").json["hold"]["notice"] == pause.notice  # type: ignore[index]

    assert client.post("/operator/drain").json["hold"]["mode"] == "draining"  # type: ignore[index]
    assert client.post("/operator/resume").json == {"success": True, "hold": None}
    assert store.controls.state().pause is None
    token = client.post("/operator/run").json["token"]  # type: ignore[index]
    assert store.controls.state().run_token == token


@pytest.mark.parametrize(
    ("address", "arguments", "status", "word"),
    [
        ("/operator/pause", {"data": {"resaon": "x"}}, 400, "reason"),
        ("/operator/pause", {"json": {"reason": "x"}}, 415, "form"),
        ("/operator/resume", {"data": {"reason": "x"}}, 400, "takes none"),
        ("/operator/providers/nobody/ban", {}, 404, "no provider"),
        ("/operator/providers/nobody/unban", {}, 404, "no provider"),
        ("/operator/providers/alpha/ban", {"data": {"seconds": "-1"}}, 400, "seconds"),
        ("/operator/providers/alpha/ban", {"data": {"seconds": "nan"}}, 400, "seconds"),
    ],
)
def test_a_control_rejects_fields_that_it_does_not_have(
    client: flask.testing.FlaskClient,
    harness: OperatorHarness,
    address: str,
    arguments: dict[str, Any],
    status: int,
    word: str,
) -> None:
    record_offer(harness)

    refused = client.post(address, **arguments)

    assert refused.status_code == status and refused.json is not None
    assert word in refused.json["reason"]


def record_offer(harness: OperatorHarness) -> None:
    harness.store.providers.record_offer(
        ADDRESS,
        name="alpha",
        start_price=Decimal("0.01"),
        price_per_cpu_second=Decimal("0.0001"),
        price_per_second=Decimal(0),
        now=harness.now,
    )
    harness.store.providers.record_work(ADDRESS, model=MODEL, images=160, seconds=16, is_failure=False, now=harness.now)


def test_a_provider_is_banned_temporarily_or_permanently_and_unbanned(
    client: flask.testing.FlaskClient, harness: OperatorHarness
) -> None:
    record_offer(harness)

    banned = client.post("/operator/providers/alpha/ban", data={"seconds": "60", "reason": "too slow"})
    assert banned.json == {
        "success": True,
        "id": ADDRESS,
        "name": "alpha",
        "is_banned": True,
        "banned_until": (harness.now + timedelta(seconds=60)).strftime("%Y-%m-%dT%H:%M:%S.000Z"),
        "ban_reason": "too slow",
    }
    (shown,) = client.get("/operator/status").json["providers"]  # type: ignore[index]
    assert (shown["is_banned"], shown["is_banned_by_operator"], shown["ban_reason"]) == (True, True, "too slow")
    assert shown["per_1000_images"] == "0.010000"

    assert client.post(f"/operator/providers/{ADDRESS}/unban").json["is_banned"] is False  # type: ignore[index]
    assert client.post(f"/operator/providers/{ADDRESS}/ban").json["banned_until"] is None  # type: ignore[index]
    assert set(harness.store.providers.banned(harness.now + timedelta(days=9999))) == {ADDRESS}


def test_a_page_of_another_site_cannot_use_a_control(client: flask.testing.FlaskClient, store: Store) -> None:
    refused = client.post("/operator/pause", headers={"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"})

    assert refused.status_code == 403
    assert store.controls.state().pause is None


@pytest.mark.parametrize("address", ["/operator/status", "/ui/operator", "/metrics"])
def test_with_keys_the_operator_endpoints_require_the_operate_scope(
    client: flask.testing.FlaskClient, store: Store, address: str
) -> None:
    from store.clients.keys import KeyRecord, Scope, hash_key, make_key

    keys = {}
    for name, scopes in (("boss", {Scope.OPERATE}), ("sender", {Scope.SUBMIT})):
        id, keys[name] = make_key()
        store.keys.add(
            KeyRecord(
                id=id, name=name, sha256=hash_key(keys[name]), scopes=frozenset(scopes), created_at=datetime.now(UTC)
            )
        )

    assert client.get(address).status_code == 401
    assert client.get(address, headers={"Authorization": f"Bearer {keys['sender']}"}).status_code == 403
    assert client.get(address, headers={"Authorization": f"Bearer {keys['boss']}"}).status_code == 200
    client.post("/operator/pause", headers={"Authorization": f"Bearer {keys['boss']}"})
    pause = store.controls.state().pause
    assert pause is not None and pause.by == "boss"


# The page


@pytest.fixture
def busy(harness: OperatorHarness) -> Iterator[OperatorHarness]:
    """A store with some of everything that the page shows."""
    harness.heartbeat(notices={MODEL: "<b>The budget is used up.</b>"}, budget={"day": "1"})
    record_offer(harness)
    harness.add(6)
    claims = harness.claim(5)
    harness.advance(2)
    harness.answer(claims[:3])
    harness.store.requests.fail(claims[3:4], code="broken_image", reason="<script>alert(1)</script>", now=harness.now)
    harness.start_chunk(16)
    yield harness


def test_the_page_shows_everything_and_escapes_text_from_outside(
    client: flask.testing.FlaskClient, busy: OperatorHarness
) -> None:
    shown = client.get("/ui/operator", headers={"Accept": "text/html"})

    assert shown.status_code == 200
    for words in (MODEL, "alpha", "broken_image", "Model time by file size", "here (1)", "/ui/requests/"):
        assert words in shown.text
    assert "<script>alert" not in shown.text and "<b>The budget" not in shown.text
    assert "'unsafe" not in shown.headers["Content-Security-Policy"]
    assert not re.search(r"<[^>]+ (style|on\w+)=", shown.text)
    assert "<style" not in shown.text


def test_each_chart_has_a_text_alternative_and_a_table(
    client: flask.testing.FlaskClient, busy: OperatorHarness
) -> None:
    html = client.get("/ui/operator", headers={"Accept": "text/html"}).text

    figures = re.findall(r"<figure.*?</figure>", html, re.S)
    assert len(figures) == 2
    for figure in figures:
        assert re.search(r'<svg[^>]* role="img" aria-label="[^"]+"', figure)
        assert "<table" in figure and '<th scope="col">' in figure
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    for name in re.findall(r'aria-labelledby="([^"]+)"', html):
        assert name in ids
    for name in re.findall(r'<label[^>]* for="([^"]+)"', html):
        assert name in ids


def test_the_page_of_an_empty_home_has_a_text_for_each_empty_table(client: flask.testing.FlaskClient) -> None:
    html = client.get("/ui/operator", headers={"Accept": "text/html"}).text

    for words in ("No batcher is running", "The queue is empty", "No failures", "No provider has made an offer"):
        assert words in html


def test_a_control_redirects_browsers_to_the_page_which_shows_the_pause(
    client: flask.testing.FlaskClient,
) -> None:
    done = client.post("/operator/drain", data={"reason": "an <update>"}, headers={"Accept": "text/html"})

    assert (done.status_code, done.headers["Location"]) == (303, "/ui/operator")
    html = client.get("/ui/operator", headers={"Accept": "text/html"}).text
    assert "being drained" in html and "an &lt;update&gt;" in html
    assert "Nothing is being processed: the batchers may be stopped" in html


def test_ticks_are_round_and_reach_the_maximum() -> None:
    for maximum in (0.0003, 0.07, 1, 3, 7, 99, 100, 101, 12345, 4e9):
        ticks = nice_ticks(maximum)

        assert ticks[0] == 0 and ticks[-1] >= maximum * (1 - 1e-9) and 2 <= len(ticks) <= 6
    assert nice_ticks(0) == [0, 1]


def test_everything_in_a_chart_is_inside_its_frame() -> None:
    minutes = [
        {"minute": f"2026-11-21T10:{n:02d}Z", "arrived": n * 7 % 50, "answered": n * 3 % 90, "images": n, "failed": 0}
        for n in range(60)
    ]
    chart = minutes_chart(minutes)
    points = points_chart([{"bytes": 1000 * n, "seconds": n / 7, "model": MODEL} for n in range(1, 50)])

    assert len(chart["bars"]) == 60 and len(chart["rows"]) == 6
    assert all(chart["top"] <= bar["y"] <= bar["y"] + bar["h"] <= chart["bottom"] + 0.1 for bar in chart["bars"])
    assert all(chart["left"] <= bar["x"] and bar["x"] + bar["w"] <= chart["right"] for bar in chart["bars"])
    assert points is not None
    assert all(points["left"] <= point["x"] <= points["right"] for point in points["points"])
    assert sum(row["count"] for row in points["rows"]) == 49
    assert points_chart([]) is None


# Commands


def test_the_commands_pause_and_resume(command: Callable[..., Any], store: Store) -> None:
    paused = command("pause", "--reason", "the line is down")
    pause = store.controls.state().pause

    assert paused.exit_code == 0 and pause is not None
    assert paused.output.strip() == pause.notice and "the line is down" in pause.notice
    assert command("resume").output == "batchers continue\n"
    assert store.controls.state().pause is None


def test_drain_waits_until_nothing_is_claimed(command: Callable[..., Any], harness: OperatorHarness) -> None:
    assert command("drain", "--wait").output.endswith("no request is being processed\n")
    harness.add(2)
    harness.claim()

    assert command("drain").output.endswith("2 requests are being processed\n")
    waited = command("drain", "--wait", "--patience", "0")
    assert waited.exit_code == 1 and "2 requests are still being processed" in str(waited.exception)


def test_run_reports_how_many_batchers_there_are(
    command: Callable[..., Any], harness: OperatorHarness, store: Store
) -> None:
    before = store.controls.run_now(by="me", now=harness.now)
    alone = command("run")
    harness.heartbeat()

    assert alone.exit_code == 1 and "No batcher is running" in str(alone.exception)
    assert command("run").output == "1 batcher processes all queued requests\n"
    assert store.controls.state().run_token != before
    command("pause")
    assert "mlg operate resume" in str(command("run").exception)


def test_status_is_a_table_or_json(command: Callable[..., Any], busy: OperatorHarness) -> None:
    text, found = command("status").output, json.loads(command("status", "--json").output)

    assert MODEL in text and "1 broken_image" in text and "1, 4 chunks at once" in text
    assert found["queue"][0]["waiting"] == 1


def test_the_commands_import_nothing_heavy() -> None:
    source = (Path(__file__).parents[3] / "cli" / "operate.py").read_text()

    assert not re.search(r"^(import|from) (flask|rich|sqlite_utils)", source, re.M)
