"""The command `mlg load`: its plan, its times, its figures and its files; and once against a real server."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Coroutine
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import httpx
import pytest
from click.testing import CliRunner, Result

from cli.load.figures import evaluate, percentile
from cli.load.html_report import html_report
from cli.load.load import load
from cli.load.plan import MAX_IMAGE_BYTES, LoadImage, LoadPlan, check_host
from cli.load.runner import NOT_SENT, LoadSample, run_plan
from provider_image.errors import ConfigError, MlgError
from store.store import Store
from tests.conftest import MODEL, RunningServer
from tests.contracts.history import NOW

ACCEPTED = {"success": True, "req_id": "r", "status": "queued", "status_url": "/readPrediction/r"}
URL = "http://127.0.0.1:5000"
Handler = Callable[[httpx.Request], Coroutine[Any, Any, httpx.Response]]


def plan(**changes: Any) -> LoadPlan:
    image = LoadImage(path=Path("a.jpg"), body=b"x", content_type="multipart/form-data; boundary=b")
    facts = {"url": URL, "model": "m", "rate": 100.0, "ramp_seconds": 0.0, "seconds": 0.1, "images": [image], **changes}
    return LoadPlan(**facts)


async def send(made: LoadPlan, handler: Handler) -> list[LoadSample]:
    async with httpx.AsyncClient(base_url=made.url, transport=httpx.MockTransport(handler)) as http:
        return await run_plan(made, http)


async def accept(request: httpx.Request) -> httpx.Response:
    return httpx.Response(202, json=ACCEPTED)


# The plan


def test_the_rate_grows_evenly_and_then_stays() -> None:
    made = plan(rate=20.0, ramp_seconds=10.0, seconds=60.0)

    offsets = list(made.offsets())

    # 10 requests a second on average for 10 seconds, then 20 for 50 seconds.
    assert len(offsets) == made.count == 1100
    assert [sum(start <= each < start + 2 for each in offsets) for start in range(0, 10, 2)] == [4, 12, 20, 28, 36]
    assert offsets[100:102] == [10.0, 10.05]
    assert offsets == sorted(offsets)
    assert offsets[-1] < 60


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 0.0}, "--rate"),
        ({"rate": float("nan")}, "--rate"),
        ({"seconds": 1e9}, "--seconds"),
        ({"ramp_seconds": 2.0, "seconds": 1.0}, "--ramp"),
        ({"rate": 10_000.0, "seconds": 1000.0}, "too many"),
    ],
)
def test_an_impossible_plan_is_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(**changes).check()


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:5000", "http://localhost:1", "https://[::1]/mlg", "http://127.9.9.9"]
)
def test_this_machine_needs_no_confirmation(url: str) -> None:
    check_host(url, None)


@pytest.mark.parametrize(
    "url", ["http://example.org", "http://127.0.0.1.example.org", "http://10.0.0.1", "http://127.0.0.1x"]
)
def test_another_host_must_be_named_twice(url: str) -> None:
    host = str(httpx.URL(url).host)

    with pytest.raises(ConfigError, match=f"--allow-host {host}$"):
        check_host(url, None)
    with pytest.raises(ConfigError):
        check_host(url, "another.example.org")
    check_host(url, host)


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:5000",
        "ftp://127.0.0.1",
        "http://",
        "http://127.0.0.1:x",
        "http://a:b@127.0.0.1",
        "http://127.0.0.1/?x=1",
        "http://[::1",
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="not the address of a server"):
        check_host(url, None)


# Sending


async def test_a_latency_counts_from_the_planned_time() -> None:
    sent = 0

    async def block_once(request: httpx.Request) -> httpx.Response:
        nonlocal sent
        sent += 1
        if sent == 1:
            time.sleep(0.3)  # nothing is sent meanwhile, as by a machine that is too slow
        return httpx.Response(202, json=ACCEPTED)

    samples = await send(plan(), block_once)

    assert len(samples) == 10
    for one in samples[1:]:
        assert one.seconds is not None
        assert one.planned + one.late >= 0.3
        assert one.seconds >= one.late > 0.1


async def test_requests_are_sent_whether_the_earlier_ones_were_answered_or_not() -> None:
    waiting = 0
    all_sent = asyncio.Event()

    async def answer_at_the_end(request: httpx.Request) -> httpx.Response:
        nonlocal waiting
        waiting += 1
        if waiting == 10:
            all_sent.set()
        await all_sent.wait()
        return httpx.Response(202, json=ACCEPTED)

    samples = await send(plan(), answer_at_the_end)

    assert [one.code for one in samples] == [""] * 10


async def test_what_would_be_too_much_at_once_is_not_sent() -> None:
    seen: list[httpx.Request] = []

    async def never(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        await asyncio.Event().wait()
        raise AssertionError

    samples = await send(plan(max_in_flight=3, timeout_seconds=0.5), never)

    assert len(seen) == 3
    assert sorted(one.code for one in samples) == [NOT_SENT] * 7 + ["timeout"] * 3


async def test_a_load_that_is_stopped_keeps_what_it_has() -> None:
    samples: list[LoadSample] = []
    async with httpx.AsyncClient(base_url=URL, transport=httpx.MockTransport(accept)) as http:
        task = asyncio.create_task(run_plan(plan(seconds=3600.0), http, samples.append))
        while len(samples) < 3:
            await asyncio.sleep(0.001)
        task.cancel()

        assert await task == samples


async def test_each_failure_has_a_code() -> None:
    answers: list[httpx.Response | httpx.HTTPError] = [
        httpx.Response(503, json={"success": False, "code": "backlog_full"}),
        httpx.Response(502, text="<html>"),
        httpx.Response(500, json={"code": "\x1b[2J" + 99 * "x"}),
        httpx.Response(302, headers={"Location": "http://example.org/"}),
        httpx.Response(202, json=ACCEPTED),
        httpx.ConnectError("refused"),
    ]

    async def answer(request: httpx.Request) -> httpx.Response:
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    samples = await send(plan(seconds=0.06), answer)

    long = "500  [2J" + 32 * "x"
    assert [one.code for one in samples] == ["503 backlog_full", "502", long, "302", "", "no_connection"]
    assert [one.seconds is None for one in samples] == [True, True, True, True, False, True]


@pytest.mark.parametrize(("status", "code"), [("done", ""), ("failed", "broken_image"), ("expired", "expired")])
async def test_a_plan_that_waits_reads_until_the_end(status: str, code: str) -> None:
    reads = 0

    async def answer(request: httpx.Request) -> httpx.Response:
        nonlocal reads
        if request.method == "POST":
            return httpx.Response(202, json=ACCEPTED)
        reads += 1
        assert (request.url.path, request.url.params["wait"]) == ("/readPrediction/r", "5.0")
        final = {"status": status, **({"code": code} if code else {})}
        return httpx.Response(200, json=final if reads == 3 else {"status": "queued"})

    (sample,) = await send(plan(seconds=0.01, waits=True), answer)

    assert (sample.code, reads) == (code, 3)


async def test_an_address_of_another_server_is_not_read() -> None:
    async def answer(request: httpx.Request) -> httpx.Response:
        assert request.method == "POST"
        return httpx.Response(202, json={**ACCEPTED, "status_url": "http://example.org/readPrediction/r"})

    (sample,) = await send(plan(seconds=0.01, waits=True), answer)

    assert sample.code == "failed"


# Figures and files


def test_percentiles_are_values_that_were_measured() -> None:
    hundred = [float(value) for value in range(1, 101)]

    assert [percentile(hundred, percent) for percent in (0, 50, 90, 99, 100)] == [1, 50, 90, 99, 100]
    assert percentile([7.0], 99) == 7
    assert percentile([], 50) is None


def test_figures_count_failures_apart_from_latencies() -> None:
    samples = [LoadSample(index / 10, 0.0, 0.01 * (index + 1)) for index in range(20)]
    samples += [LoadSample(2.5, 0.0, None, "timeout"), LoadSample(2.6, 0.0, None, NOT_SENT)]

    figures = evaluate(plan(seconds=3.0), samples)

    assert (figures.planned, figures.sent, figures.failed) == (22, 21, 2)
    assert figures.failures == {"timeout": 1, NOT_SENT: 1}
    assert figures.latencies == (0.1, 0.18, 0.2)
    assert [(one.planned, one.failed) for one in figures.intervals] == [(10, 0), (10, 0), (2, 2)]
    assert sum(one.completed for one in figures.intervals) == 20
    assert figures.per_second == pytest.approx(20 / 2.6)


def test_a_long_load_has_a_limited_number_of_intervals() -> None:
    samples = [LoadSample(float(second), 0.0, 0.1) for second in range(3600)]

    intervals = evaluate(plan(seconds=3600.0), samples).intervals

    assert {one.seconds for one in intervals} == {30.0}
    assert sum(one.planned for one in intervals) == 3600


class Tags(HTMLParser):
    """The tags of a page that are not closed, and the addresses that it names."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "data", "action")]
        if tag not in ("meta", "line", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("count", [0, 1, 30])
def test_the_report_is_one_page_without_scripts_or_addresses(count: int) -> None:
    made = plan(model="<b>model", seconds=3.0)
    samples = [LoadSample(index / 10, 0.0, 0.01) for index in range(count)]
    samples += [LoadSample(0.5, 0.0, None, "<script>alert(1)</script>")]

    text = html_report(made, evaluate(made, samples), at=NOW, missed=["The limit <i>."])

    tags = Tags()
    tags.feed(text)
    assert (tags.open, tags.addresses) == ([], [])
    assert tags.found.count("svg") == 3
    assert not {"script", "b", "i", "link", "img"} & set(tags.found)
    assert "&lt;script&gt;alert(1)" in text
    assert "prefers-color-scheme: dark" in text
    assert "nan" not in text.lower()


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(load, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_plan_is_written_for_jmeter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLG_API_KEY", "mlg_secret")
    (tmp_path / "one, two.jpg").write_bytes(b"x")
    (tmp_path / "b.png").write_bytes(b"y")
    file = tmp_path / "plan.jmx"

    run("--images", str(tmp_path), "--jmx", str(file), "--plan-only", "--rate", "20", "http://127.0.0.1:5001/mlg")

    assert "mlg_secret" not in file.read_text()
    tests = ElementTree.parse(file).getroot()
    # JMeter's trees: an element, then the hashTree of what is below it.
    for tree in tests.iter("hashTree"):
        assert [child.tag == "hashTree" for child in tree] == [False, True] * (len(tree) // 2)
    # In the group's own tree, every request would take two lines of the list.
    upload = [child.tag for child in tests.findall(".//GenericController/../hashTree/*") if child.tag != "hashTree"]
    assert upload[-2:] == ["CSVDataSet", "HTTPSamplerProxy"]
    group = tests.find(".//GenericController/..")
    assert group is not None and not group.findall("CSVDataSet")
    texts = {each.get("name"): each.text for each in tests.iter("stringProp")}
    assert texts["OpenModelThreadGroup.schedule"] == (
        "rate(0/sec) even_arrivals(10 sec) rate(20/sec) even_arrivals(50 sec) rate(20/sec)"
    )
    assert (texts["HTTPSampler.domain"], texts["HTTPSampler.port"]) == ("127.0.0.1", "5001")
    assert texts["HTTPSampler.path"] == f"/mlg/requestPrediction/{MODEL}?fresh=1"
    assert (texts["File.path"], texts["File.paramname"]) == ("${image}", "image")
    assert texts["Header.value"] == "Bearer ${__P(mlg_api_key,)}"
    listed = Path(texts["filename"] or "").read_text()
    assert listed == f'{tmp_path}/b.png\n"{tmp_path}/one, two.jpg"\n'


def test_a_server_that_does_not_answer_gets_no_load(tmp_path: Path, photos: dict[str, bytes]) -> None:
    (tmp_path / "a.jpg").write_bytes(photos["chelsea"])
    empty = tmp_path / "empty"
    empty.mkdir()

    with pytest.raises(MlgError, match="does not answer"):
        run("--images", str(tmp_path), "http://127.0.0.1:1")
    with pytest.raises(ConfigError, match="--allow-host"):
        run("--images", str(tmp_path), "http://192.0.2.1")
    with pytest.raises(ConfigError, match="its folder does not exist"):
        run("--images", str(tmp_path), "--html", str(tmp_path / "none" / "report.html"), URL)
    with pytest.raises(ConfigError, match="no image in"):
        run("--images", str(empty), URL)
    with (tmp_path / "large.jpg").open("wb") as file:
        file.truncate(MAX_IMAGE_BYTES + 1)
    with pytest.raises(ConfigError, match="choose a smaller folder"):
        run("--images", str(tmp_path / "large.jpg"), URL)


def test_a_real_server_is_measured_and_limits_decide_the_exit_status(
    server: RunningServer, store: Store, tmp_path: Path, photos: dict[str, bytes]
) -> None:
    folder, html = tmp_path / "photos", tmp_path / "report.html"
    folder.mkdir()
    for name in ("chelsea", "rocket"):
        (folder / f"{name}.jpg").write_bytes(photos[name])
    often = ("--images", str(folder), "--rate", "20", "--ramp", "0", "--seconds", "1", server.base)

    good = run("--json", "--max-errors", "0", "--max-p99", "60000", "--html", str(html), *often)
    slow = run("--max-p99", "0.001", *often)
    wrong = run("--model", "no_such_model", "--max-errors", "5", *often)

    found = json.loads(good.stdout)
    assert (good.exit_code, found["planned"], found["sent"], found["failed"]) == (0, 20, 20, 0)
    assert 0 < found["p50_seconds"] <= found["p90_seconds"] <= found["p99_seconds"] <= found["max_seconds"]
    assert "<svg" in html.read_text()
    assert slow.exit_code == 1
    assert re.search(r"99th percentile may be 0.001 ms; it is [\d.]+ ms", slow.stderr)
    assert re.search(r"^p99 +[\d.]+ m?s *$", slow.stdout, re.MULTILINE)
    assert wrong.exit_code == 1
    assert "404 unknown_model" in wrong.stdout
    assert "100.00 % did" in wrong.stderr
    assert {request.model for request in store.requests.list()} == {MODEL}
    assert len(store.requests.list()) == 40


def test_the_help_has_an_example() -> None:
    assert isinstance(load, click.Command)
    assert "Example:" in run("--help").stdout
