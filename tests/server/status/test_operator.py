"""What operators see and do: figures, levers, page, commands."""

from __future__ import annotations

import importlib
import json
import re
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
from store.chunks import BatcherRecord, ChunkRecord
from store.controls import read_control_state, run_now
from store.ledger import AgreementRecord, AllocationRecord, BillState, InvoiceRecord
from store.records import Answer, Claim, NewRequest, RequestRecord
from store.sqlite import SqliteStore

MODEL = "efficientnet_lite0"
ADDRESS = "0xa1fa000000000000000000000000000000000001"


class Day:
    """A store with a clock, and what happens in it."""

    def __init__(self, store: SqliteStore) -> None:
        self.store = store
        self.now = datetime.now(UTC).replace(microsecond=0)
        self._chunks = 0

    def clock(self) -> datetime:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def add(self, count: int = 1, *, model: str = MODEL) -> list[RequestRecord]:
        return [
            self.store.add(
                NewRequest(id=new_id(), service="classification", model=model, is_fresh=True, created_at=self.now),
                self.store.images.stage(b"picture"),
            )
            for _ in range(count)
        ]

    def claim(self, limit: int = 100) -> list[Claim]:
        return self.store.claim(
            models=[MODEL], limit=limit, now=self.now, lease_ends_at=self.now + timedelta(hours=1), oldest_before=None
        )

    def start_chunk(self, items: int, **facts: Any) -> str:
        self._chunks += 1
        self.store.start_chunk(
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
        self.store.finish_chunk(
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
        self.store.finish(
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
        """Have a batcher be alive."""
        self.store.heartbeat(
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
def day(store: SqliteStore) -> Day:
    return Day(store)


@pytest.fixture
def client(settings: ServerSettings, store: SqliteStore, day: Day) -> flask.testing.FlaskClient:
    return create_app(settings, store, clock=day.clock).test_client()


@pytest.fixture
def command(settings: ServerSettings, store: SqliteStore) -> Callable[..., Any]:
    """Run a command of the group on the home."""

    def run(*words: str) -> Any:
        return CliRunner().invoke(operate, [words[0], "--home", str(settings.home), *words[1:]])

    return run


# Figures


def test_the_queue_says_how_much_waits_and_since_when(day: Day) -> None:
    day.add(2)
    day.pass_by(30)
    day.add()
    (claim,) = day.claim(1)

    status = day.status()

    (row,) = status["queue"]
    assert (row["model"], row["waiting"], row["claimed"], row["oldest_seconds"]) == (MODEL, 2, 1, 30)
    assert (status["waiting"], status["claimed"], status["is_idle"]) == (2, 1, False)
    assert claim.model == MODEL


def test_throughput_counts_what_came_and_what_was_answered_by_minute(day: Day) -> None:
    day.now = day.now.replace(second=30)
    day.add(5)
    day.answer(day.claim())
    day.pass_by(60)
    day.add(3)
    day.answer(day.claim(2))

    throughput = day.status()["throughput"]

    assert [(each["arrived"], each["answered"], each["images"]) for each in throughput["minutes"][-2:]] == [
        (5, 5, 5),
        (3, 2, 2),
    ]
    assert len(throughput["minutes"]) == 60
    assert throughput["minutes"][-1]["minute"] == day.now.strftime("%Y-%m-%dT%H:%MZ")
    for period, length in (("hour", 59.5), ("day", 1439.5)):
        found = throughput[period]
        assert (found["arrived"], found["answered"], found["images"]) == (8, 7, 7)
        assert found["answered_per_minute"] == round(7 / length, 2)


def test_minutes_that_are_over_are_not_read_again_but_late_ends_are_seen(day: Day, monkeypatch: Any) -> None:
    figures = Dashboard(day.store, QueueStats(day.store), day.clock)
    asked = []
    read = day.store.list_minute_stats
    monkeypatch.setattr(day.store, "list_minute_stats", lambda since: asked.append(since) or read(since))
    late = day.start_chunk(4)
    day.add(3)
    day.answer(day.claim())
    figures._read_minutes()
    ended_at = day.now
    day.pass_by(180)
    now, day.now = day.now, ended_at
    day.end_chunk(late, done=4)  # noted three minutes after it ended
    day.now = now

    minutes = figures._read_minutes()

    assert sum(each.images for each in minutes) == 7
    assert asked[1] - asked[0] > timedelta(hours=23)
    day.pass_by(25 * 3600)
    assert sum(each.images for each in figures._read_minutes()) == 0


def test_latencies_are_those_of_the_latest_answers(day: Day) -> None:
    for seconds in range(1, 101):
        day.add()
        day.pass_by(seconds)
        claims = day.claim()
        day.pass_by(1)
        day.answer(claims)

    latency = day.status()["latency"]

    assert latency["of"] == 100
    assert latency["wait"] == {"p50": 50, "p95": 95, "p99": 99}
    assert latency["answer"] == {"p50": 51, "p95": 96, "p99": 100}
    assert latency["model"] == {"p50": 0.25, "p95": 0.25, "p99": 0.25}


def test_failures_are_grouped_by_code_with_the_latest_reason(day: Day) -> None:
    day.add(3)
    claims = day.claim()
    for claim, code in zip(claims, ("broken_image", "timeout", "broken_image"), strict=True):
        day.pass_by(1)
        day.store.fail([claim], code=code, reason=f"{code} of {claim.number}", now=day.now)
    day.end_chunk(day.start_chunk(2), done=0, failed=2, code="worker_died")

    failures = day.status()["failures"]

    assert [(row["code"], row["count"], row["reason"]) for row in failures["requests"]] == [
        ("broken_image", 2, f"broken_image of {claims[2].number}"),
        ("timeout", 1, f"timeout of {claims[1].number}"),
    ]
    assert [(row["code"], row["count"]) for row in failures["chunks"]] == [("worker_died", 1)]


def test_only_chunks_of_live_batchers_are_under_way(day: Day) -> None:
    day.heartbeat()
    day.start_chunk(16)
    day.start_chunk(16, batcher_id="one that was killed")
    day.pass_by(5)

    status = day.status()

    assert [(row["id"], row["items"], row["seconds"]) for row in status["chunks"]] == [("chunk1", 16, 5)]
    assert (len(status["batchers"]), status["capacity"]) == (1, 4)


def test_money_says_what_was_spent_today_and_what_is_left(day: Day) -> None:
    day.heartbeat(executor="golem", budget={"day": "1", "total": "5.5"})
    day.heartbeat(id="b2", executor="golem", budget={"day": "0.5"})
    for id, settled_at in (("ag1", day.now), ("ag2", day.now - timedelta(days=2))):
        day.store.record_agreement(
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
        day.store.record_invoice(
            InvoiceRecord(
                id=f"of {id}",
                agreement_id=id,
                amount=Decimal("0.2"),
                state=BillState.ACCEPTED,
                received_at=settled_at,
                settled_at=settled_at,
            )
        )
    day.store.record_allocation(
        AllocationRecord(
            id="al1", batcher_id="b1", platform="erc20", address="0x1", amount=Decimal("0.7"), created_at=day.now
        )
    )

    money = day.status()["money"]

    assert (Decimal(money["today"]), Decimal(money["total"])) == (Decimal("0.2"), Decimal("0.4"))
    assert (Decimal(money["budget_day"]), Decimal(money["left_day"])) == (Decimal("0.5"), Decimal("0.3"))
    assert Decimal(money["left_total"]) == Decimal("5.1")
    assert [Decimal(each["amount"]) for each in money["allocations"]] == [Decimal("0.7")]


def test_a_kept_figure_is_found_anew_when_it_is_stale_or_forgotten(monkeypatch: Any) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("server.status.stale_cache.time.monotonic", lambda: now[0])
    now = [0.0]
    kept = StaleCache(lambda: next(clock), fresh_seconds=1, stale_seconds=5)

    assert (kept.get(), kept.get()) == (0, 0)
    now[0] = 5.0
    assert kept.get() == 1
    kept.invalidate()
    assert kept.get() == 2


@pytest.mark.parametrize(
    ("name", "indexes"),
    [
        ("requests:_QUEUED_MODELS", {"requests_queued"}),
        ("requests:_OLDEST_DUE", {"requests_queued"}),
        ("requests:_COUNT_DUE", {"requests_queued"}),
        ("requests:_CLAIM", {"requests_queued"}),
        ("chunks:_BACKLOG", {"requests_queued", "requests_claimed"}),
        ("stats:_MINUTES", {"chunks_finished"}),
        ("stats:_ANSWERED", {"requests_finished"}),
        ("stats:_FAILURES", {"requests_failed"}),
        ("stats:_FAILED_CHUNKS", {"chunks_failed"}),
        ("stats:_UNFINISHED_CHUNKS", {"chunks_under_way"}),
    ],
)
def test_what_is_asked_often_reads_an_index_that_stays_small(store: SqliteStore, name: str, indexes: set[str]) -> None:
    module, _, attribute = name.partition(":")
    statement = getattr(importlib.import_module(f"store.{module}"), attribute)
    values: Any = dict.fromkeys(re.findall(r":(\w+)", statement), 1) or [1] * statement.count("?")

    with store._readers.connection() as connection:
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", values)]

    assert {found for line in plan for found in re.findall(r"INDEX (\w+)", line)} == indexes, plan
    assert not [line for line in plan if re.fullmatch(r"SCAN (requests|chunks)", line)], plan


# Levers


def test_pausing_resuming_and_running_change_what_batchers_are_told(
    client: flask.testing.FlaskClient, store: SqliteStore, day: Day
) -> None:
    paused = client.post("/operator/pause", data={"reason": "new kernel"})
    pause = read_control_state(store).pause

    assert paused.status_code == 200 and paused.json is not None
    assert pause is not None
    assert paused.json["hold"] == {
        "mode": "paused",
        "by": "the operator",
        "since": day.now.strftime("%Y-%m-%dT%H:%M:%S.000Z"),
        "reason": "new kernel",
    }
    assert client.get("/operator/status").json["hold"]["notice"] == pause.notice  # type: ignore[index]

    assert client.post("/operator/drain").json["hold"]["mode"] == "draining"  # type: ignore[index]
    assert client.post("/operator/resume").json == {"success": True, "hold": None}
    assert read_control_state(store).pause is None
    token = client.post("/operator/run").json["token"]  # type: ignore[index]
    assert read_control_state(store).run_token == token


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
def test_a_lever_says_what_it_does_not_take(
    client: flask.testing.FlaskClient, day: Day, address: str, arguments: dict[str, Any], status: int, word: str
) -> None:
    record_offer(day)

    refused = client.post(address, **arguments)

    assert refused.status_code == status and refused.json is not None
    assert word in refused.json["reason"]


def record_offer(day: Day) -> None:
    day.store.record_offer(
        ADDRESS,
        name="alpha",
        start_price=Decimal("0.01"),
        price_per_cpu_second=Decimal("0.0001"),
        price_per_second=Decimal(0),
        now=day.now,
    )
    day.store.record_work(ADDRESS, model=MODEL, images=160, seconds=16, is_failure=False, now=day.now)


def test_a_provider_is_banned_for_a_while_or_for_good_and_let_in_again(
    client: flask.testing.FlaskClient, day: Day
) -> None:
    record_offer(day)

    banned = client.post("/operator/providers/alpha/ban", data={"seconds": "60", "reason": "too slow"})
    assert banned.json == {
        "success": True,
        "id": ADDRESS,
        "name": "alpha",
        "is_banned": True,
        "banned_until": (day.now + timedelta(seconds=60)).strftime("%Y-%m-%dT%H:%M:%S.000Z"),
        "ban_reason": "too slow",
    }
    (shown,) = client.get("/operator/status").json["providers"]  # type: ignore[index]
    assert (shown["is_banned"], shown["is_banned_by_operator"], shown["ban_reason"]) == (True, True, "too slow")
    assert shown["per_1000_images"] == "0.010000"

    assert client.post(f"/operator/providers/{ADDRESS}/unban").json["is_banned"] is False  # type: ignore[index]
    assert client.post(f"/operator/providers/{ADDRESS}/ban").json["banned_until"] is None  # type: ignore[index]
    assert set(day.store.banned(day.now + timedelta(days=9999))) == {ADDRESS}


def test_a_page_of_another_site_cannot_pull_a_lever(client: flask.testing.FlaskClient, store: SqliteStore) -> None:
    refused = client.post("/operator/pause", headers={"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"})

    assert refused.status_code == 403
    assert read_control_state(store).pause is None


@pytest.mark.parametrize("address", ["/operator/status", "/ui/operator", "/metrics"])
def test_with_keys_an_operator_is_asked_for_one(
    client: flask.testing.FlaskClient, store: SqliteStore, address: str
) -> None:
    from store.keys import KeyRecord, Scope, hash_key, make_key

    keys = {}
    for name, scopes in (("boss", {Scope.OPERATE}), ("sender", {Scope.SUBMIT})):
        id, keys[name] = make_key()
        store.add_key(
            KeyRecord(
                id=id, name=name, sha256=hash_key(keys[name]), scopes=frozenset(scopes), created_at=datetime.now(UTC)
            )
        )

    assert client.get(address).status_code == 401
    assert client.get(address, headers={"Authorization": f"Bearer {keys['sender']}"}).status_code == 403
    assert client.get(address, headers={"Authorization": f"Bearer {keys['boss']}"}).status_code == 200
    client.post("/operator/pause", headers={"Authorization": f"Bearer {keys['boss']}"})
    pause = read_control_state(store).pause
    assert pause is not None and pause.by == "boss"


# The page


@pytest.fixture
def busy(day: Day) -> Iterator[Day]:
    """A store in which there is something of everything."""
    day.heartbeat(notices={MODEL: "<b>The budget is used up.</b>"}, budget={"day": "1"})
    record_offer(day)
    day.add(6)
    claims = day.claim(5)
    day.pass_by(2)
    day.answer(claims[:3])
    day.store.fail(claims[3:4], code="broken_image", reason="<script>alert(1)</script>", now=day.now)
    day.start_chunk(16)
    yield day


def test_the_page_shows_everything_and_escapes_what_others_wrote(client: flask.testing.FlaskClient, busy: Day) -> None:
    shown = client.get("/ui/operator", headers={"Accept": "text/html"})

    assert shown.status_code == 200
    for words in (MODEL, "alpha", "broken_image", "Size and seconds", "here (1)", "/ui/requests/"):
        assert words in shown.text
    assert "<script>alert" not in shown.text and "<b>The budget" not in shown.text
    assert "'unsafe" not in shown.headers["Content-Security-Policy"]
    assert not re.search(r"<[^>]+ (style|on\w+)=", shown.text)
    assert "<style" not in shown.text


def test_each_chart_of_the_page_has_words_and_a_table(client: flask.testing.FlaskClient, busy: Day) -> None:
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


def test_the_page_of_an_empty_home_says_so(client: flask.testing.FlaskClient) -> None:
    html = client.get("/ui/operator", headers={"Accept": "text/html"}).text

    for words in ("No batcher is running", "Nothing waits", "Nothing failed", "Nobody has made an offer"):
        assert words in html


def test_a_button_of_the_page_leads_back_to_it_and_the_page_says_what_was_done(
    client: flask.testing.FlaskClient,
) -> None:
    done = client.post("/operator/drain", data={"reason": "an <update>"}, headers={"Accept": "text/html"})

    assert (done.status_code, done.headers["Location"]) == (303, "/ui/operator")
    html = client.get("/ui/operator", headers={"Accept": "text/html"}).text
    assert "being drained" in html and "an &lt;update&gt;" in html
    assert "Nothing is under way: batchers may be stopped" in html


def test_ticks_are_round_and_reach_the_largest_value() -> None:
    for most in (0.0003, 0.07, 1, 3, 7, 99, 100, 101, 12345, 4e9):
        ticks = nice_ticks(most)

        assert ticks[0] == 0 and ticks[-1] >= most * (1 - 1e-9) and 2 <= len(ticks) <= 6
    assert nice_ticks(0) == [0, 1]


def test_everything_in_a_chart_lies_inside_its_frame() -> None:
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


def test_the_commands_hold_work_and_let_it_go_on(command: Callable[..., Any], store: SqliteStore) -> None:
    paused = command("pause", "--reason", "the line is down")
    pause = read_control_state(store).pause

    assert paused.exit_code == 0 and pause is not None
    assert paused.output.strip() == pause.notice and "the line is down" in pause.notice
    assert command("resume").output == "work goes on\n"
    assert read_control_state(store).pause is None


def test_drain_waits_until_nothing_is_under_way(command: Callable[..., Any], day: Day) -> None:
    assert command("drain", "--wait").output.endswith("nothing is under way\n")
    day.add(2)
    day.claim()

    assert command("drain").output.endswith("2 requests are under way\n")
    waited = command("drain", "--wait", "--patience", "0")
    assert waited.exit_code == 1 and "2 requests are still under way" in str(waited.exception)


def test_run_says_whether_anybody_listens(command: Callable[..., Any], day: Day, store: SqliteStore) -> None:
    before = run_now(store, by="me", now=day.now)
    alone = command("run")
    day.heartbeat()

    assert alone.exit_code == 1 and "No batcher is running" in str(alone.exception)
    assert command("run").output == "1 batcher takes everything that waits\n"
    assert read_control_state(store).run_token != before
    command("pause")
    assert "mlg operate resume" in str(command("run").exception)


def test_status_is_a_table_or_json(command: Callable[..., Any], busy: Day) -> None:
    text, found = command("status").output, json.loads(command("status", "--json").output)

    assert MODEL in text and "1 broken_image" in text and "1, 4 chunks at once" in text
    assert found["queue"][0]["waiting"] == 1


def test_the_commands_are_lazy() -> None:
    source = (Path(__file__).parents[3] / "cli" / "operate.py").read_text()

    assert not re.search(r"^(import|from) (flask|rich|sqlite_utils)", source, re.M)
