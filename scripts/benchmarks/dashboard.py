"""A store with a million requests: the response times of the operator's dashboard, its data and the request lists."""

from __future__ import annotations

import json
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import httpx
from rich.console import Console

from scripts.benchmarks import processes
from server.api.query import to_cursor
from store.database import Transaction
from store.rows import to_text
from store.settings import HomeSettings
from store.states import RequestState
from store.store import Store
from store.transition import write_what_follows

MODELS = ("efficientnet_lite0", "resnet50", "vgg16", "densenet121", "nasnet_mobile", "xception")
OUTPUT = json.dumps([[f"n{n:08d}", f"label_{n}", round((20 - n) / 210, 6)] for n in range(20)], separators=(",", ":"))
#: Numbers of queued, claimed, failed and cancelled requests per thousand; the others are done.
QUEUED, CLAIMED, FAILED, CANCELLED = 100, 1, 15, 4
ITEMS = 16
#: One in this many chunks failed as a whole.
FAILED_CHUNKS = 200
CODES = ("broken_image", "timeout", "worker_died", "inference_failed")
PROVIDERS, AGREEMENTS = 200, 2000

_REQUEST = """
    INSERT INTO requests (id, service, model, image_sha256, image_bytes, state, token, created_at, due_at, claimed_at,
                          lease_ends_at, finished_at, chunk_id, provider, digest, seconds, output, code, reason)
    VALUES (?, 'classification', ?, ?, ?, ?, 1, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_ENDED = """
    SELECT number, id, model, created_at, finished_at, code, is_cached, batch_id, webhook FROM requests
    WHERE state = ? AND number BETWEEN ? AND ?
"""
_CHUNK = """
    INSERT INTO chunks (id, batcher_id, executor, provider, service, model, items, bytes_sent, bytes_received,
                        dispatched_at, finished_at, seconds, done, failed, cost, code, reason, agreement_id,
                        provider_id, answers, is_cost_final)
    VALUES (?, 'b', 'golem', ?, 'classification', ?, ?, 900000, 9000, ?, ?, 2.5, ?, ?, '0.0001', ?, ?, ?, ?, ?, ?)
"""
_PROVIDER = """
    INSERT INTO providers (id, name, first_seen_at, seen_at, start_price, price_per_cpu_second, price_per_second, done,
                           failed, images, score)
    VALUES (?, ?, ?, ?, '0.001', '0.00001', '0.00001', 300, 3, 4800, 0.9)
"""
_AGREEMENT = """
    INSERT INTO agreements (id, allocation_id, provider_id, provider_name, model, start_price, price_per_cpu_second,
                            price_per_second, created_at, ended_at, reason)
    VALUES (?, 'al', ?, ?, ?, '0.001', '0.00001', '0.00001', ?, ?, 'idle')
"""
_INVOICE = "INSERT INTO invoices VALUES (?, ?, '0.0123', 'accepted', ?, ?, NULL)"


def fill(home: Path, count: int) -> float:
    """Add the requests, chunks and invoices of one day to a new home. :return: seconds that it took."""
    started = time.perf_counter()
    store = Store(HomeSettings(home=home))
    store.migrate()
    store.close()
    now = datetime.now(UTC)
    begin = now - timedelta(hours=24)

    def at(n: int, later: float = 0.0) -> str:
        return to_text(begin + timedelta(seconds=min(86400.0, 86400.0 * n / count + later)))

    def requests() -> Iterator[tuple[Any, ...]]:
        waiting_from = count - count * (QUEUED + CLAIMED) // 1000
        for n in range(count):
            came, taken, ended = at(n), at(n, 5 + n % 40), at(n, 8 + n % 60)
            first = (f"{n:032x}", MODELS[n // ITEMS % len(MODELS)], f"{n:064x}", 20_000 + n * 7919 % 400_000)
            chunk = (f"c{n // ITEMS}", "provider")
            kind = n % 1000
            if n >= waiting_from + count * CLAIMED // 1000:
                yield (*first, "queued", came, came, *(None,) * 10)
            elif n >= waiting_from:
                yield (*first, "claimed", came, came, taken, at(count, 30), *(None,) * 8)
            elif kind < FAILED:
                failed = (None, None, CODES[kind % len(CODES)], "The image is cut short or damaged.")
                yield (*first, "failed", came, came, taken, None, ended, *chunk, None, *failed)
            elif kind < FAILED + CANCELLED:
                yield (*first, "cancelled", came, came, None, None, ended, *(None,) * 7)
            else:
                seconds = 0.02 + n * 104729 % 1000 / 20000
                yield (*first, "done", came, came, taken, None, ended, *chunk, "d" * 64, seconds, OUTPUT, None, None)

    def chunks() -> Iterator[tuple[Any, ...]]:
        for n in range(count * (1000 - QUEUED) // 1000 // ITEMS):
            who = f"0x{n % PROVIDERS:040x}"
            sent, ended = at(n * ITEMS, 6), at(n * ITEMS, 9)
            is_failed = n % FAILED_CHUNKS == 0
            counts = (0, ITEMS, "timeout", "It took too long.") if is_failed else (ITEMS, 0, None, None)
            answers = 0 if is_failed else ITEMS
            model = MODELS[n % len(MODELS)]
            bill = (f"a{n % AGREEMENTS}", who, answers, 1)
            yield (f"c{n}", f"provider-{n % PROVIDERS}", model, ITEMS, sent, ended, *counts, *bill)

    connection = sqlite3.connect(home / "mlg.db", isolation_level=None)
    # Durability is not needed.
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA cache_size = -400000")
    connection.execute("BEGIN IMMEDIATE")
    connection.executemany(_REQUEST, requests())
    connection.executemany(_CHUNK, chunks())
    moment = at(count // 2)
    connection.executemany(_PROVIDER, [(f"0x{n:040x}", f"provider-{n}", moment, moment) for n in range(PROVIDERS)])
    owners = [(n, f"0x{n % PROVIDERS:040x}", f"provider-{n % PROVIDERS}") for n in range(AGREEMENTS)]
    connection.executemany(
        _AGREEMENT, [(f"a{n}", who, name, MODELS[n % len(MODELS)], moment, moment) for n, who, name in owners]
    )
    connection.executemany(_INVOICE, [(f"i{n}", f"a{n}", moment, moment) for n in range(AGREEMENTS)])
    connection.execute("COMMIT")
    connection.close()
    follow(home, count)
    return time.perf_counter() - started


def follow(home: Path, count: int, slice_size: int = 10_000) -> None:
    """Write the changes and the totals of the requests that ended."""
    store = Store(HomeSettings(home=home))
    for first in range(1, count + 1, slice_size):

        def write(transaction: Transaction, first: int = first) -> None:
            for state in filter(lambda each: each.is_final, RequestState):
                rows = transaction.execute(_ENDED, (str(state), first, first + slice_size - 1)).fetchall()
                write_what_follows(transaction, state, rows, now=datetime.now(UTC))

        store.database.write(write)
    store.close()


def measure(call: Callable[[], httpx.Response], times: int) -> tuple[float, list[float]]:
    """Call repeatedly. :return: milliseconds of the first call, and of the others."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        call().raise_for_status()
        found.append((time.perf_counter() - started) * 1000)
        # Some requests are answered from the cache of the dashboard, some are not.
        time.sleep(0.03)
    return found[0], found[1:]


def print_timings(console: Console, name: str, first: float, others: list[float]) -> None:
    """Print one line."""
    slow = statistics.quantiles(others, n=100)[98]
    console.print(
        f"{name:44} first {first:7.1f} ms, median {statistics.median(others):6.1f} ms, 99 % within {slow:6.1f} ms"
    )


@click.command()
@click.option("--requests", "count", default=1_000_000, show_default=True, help="Number of requests.")
@click.option("--times", default=200, show_default=True, help="Requests to each path.")
@click.option("--depths", default="0,1000,500000,999000", show_default=True, help="Offsets of the request lists.")
def main(count: int, times: int, depths: str) -> None:
    """Measure the dashboard with many requests. Example: scripts/bench dashboard"""
    console = Console(width=160)
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as folder:
        work = Path(folder)
        seconds = fill(work / "home", count)
        size = (work / "home" / "mlg.db").stat().st_size / 1e6
        console.print(f"{count} requests put in within {seconds:.0f} s, {size:.0f} MB")
        port = processes.free_port()
        base = f"http://127.0.0.1:{port}"
        with (
            processes.running(
                processes.mlg("serve", "--home", str(work / "home"), "--port", str(port)),
                url=f"{base}/healthz",
                log=work / "log",
            ),
            httpx.Client(base_url=base, timeout=60, headers={"Accept": "application/json"}) as client,
        ):
            for name in ("/operator/status", "/metrics"):
                print_timings(console, f"GET {name}", *measure(lambda name=name: client.get(name), times))
            html = {"Accept": "text/html"}
            print_timings(
                console, "GET /ui/operator", *measure(lambda: client.get("/ui/operator", headers=html), times)
            )
            for depth in [int(word) for word in depths.split(",")]:
                cursor = {"cursor": to_cursor(count - depth)} if depth else {}
                print_timings(
                    console,
                    f"GET /requests, {depth} from the newest",
                    *measure(lambda cursor=cursor: client.get("/requests", params=cursor), times),
                )
