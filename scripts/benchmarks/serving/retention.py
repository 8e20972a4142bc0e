"""Uploads to a store with a million requests, while it is quiet, and while old data is deleted and webhooks are sent.

The receiver of the webhooks and the process that deletes run beside the server, on the same cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import click

from scripts.benchmarks.support import photos, processes, stored_requests
from scripts.benchmarks.support.measuring import (
    in_turns,
    print_table,
    rounds_option,
    seconds_option,
    timed,
    work_folder,
)
from store.clients.webhooks import host_of
from store.rows import to_text

#: Connections that upload.
CONNECTIONS = 4
#: API keys among which the webhooks are divided.
OWNERS = 50

_DELIVERY = """
    INSERT INTO webhook_deliveries (id, owner, host, url, event, subject, state, created_at, next_at)
    VALUES (?, ?, ?, ?, 'request.done', ?, 'done', ?, ?)
"""


def fill(home: Path, count: int, *, webhooks: int, purged: int, url: str) -> None:
    """Make a home with a day's requests; the images of the oldest are deleted, webhooks wait for the next year."""
    stored_requests.add_day(home, count, queued=10)
    now = datetime.now(UTC)
    later = to_text(now + timedelta(days=365))
    with contextlib.closing(sqlite3.connect(home / "mlg.db")) as connection, connection:
        connection.execute(
            "UPDATE requests SET image_deleted_at = finished_at WHERE number <= ? AND finished_at IS NOT NULL",
            (purged,),
        )
        rows = (
            (f"msg_{n}", f"key{n % OWNERS:09}", host_of(url), url, f"{n:032x}", to_text(now), later)
            for n in range(webhooks)
        )
        connection.executemany(_DELIVERY, rows)


def set_due(home: Path, at: datetime) -> None:
    """Let the pending webhooks be due at a time."""
    with contextlib.closing(sqlite3.connect(home / "mlg.db", timeout=60)) as connection, connection:
        connection.execute("UPDATE webhook_deliveries SET next_at = ? WHERE next_at IS NOT NULL", (to_text(at),))


def purge(home: Path) -> None:
    """Delete images and requests of a part of the day, until the process is ended."""
    begin = datetime.now(UTC) - timedelta(hours=24)
    with stored_requests.opened(home) as store:
        store.retention.purge(
            images_before=begin + timedelta(hours=16), results_before=begin + timedelta(hours=2), now=datetime.now(UTC)
        )


def receive() -> None:
    """Answer every request with 204, and print the port first."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0]))
            writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
            await writer.drain()
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        click.echo(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


@contextlib.contextmanager
def helper(*options: str) -> Iterator[subprocess.Popen[str]]:
    """Run a part of this benchmark in a process of its own until the block ends."""
    command = [sys.executable, "-m", "scripts.benchmarks", "retention", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def upload(base: str, jpeg: bytes, numbers: Iterator[int], seconds: float) -> list[float]:
    """Upload one after the other over each connection. :return: milliseconds of each upload."""
    found: list[float] = []

    def run() -> None:
        connection = http.client.HTTPConnection(urlsplit(base).netloc, timeout=60)
        while time.monotonic() < end:
            image, started = photos.make_unique(jpeg, next(numbers)), time.monotonic()
            connection.request("POST", "/requestPrediction/efficientnet_lite0", image, {"Content-Type": "image/jpeg"})
            response = connection.getresponse()
            body = response.read()
            if response.status != 202:
                raise RuntimeError(body.decode())
            found.append(1000 * (time.monotonic() - started))
        connection.close()

    end = time.monotonic() + seconds
    threads = [threading.Thread(target=run) for _ in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def count_delivered(home: Path) -> int:
    """Count the webhooks that were delivered."""
    with contextlib.closing(sqlite3.connect(home / "mlg.db")) as connection:
        sql = "SELECT count(*) FROM webhook_deliveries WHERE delivered_at IS NOT NULL"
        return int(connection.execute(sql).fetchone()[0])


@click.command()
@click.option("--requests", "count", default=1_000_000, show_default=True, help="Number of requests.")
@click.option("--webhooks", default=200_000, show_default=True, help="Number of webhooks that are due.")
@click.option("--purged", default=200_000, show_default=True, help="Requests whose images are deleted already.")
@rounds_option(3)
@seconds_option(15.0)
@click.option("--home", default=None, hidden=True)
@click.option("--receive", "is_receiver", is_flag=True, hidden=True)
def main(
    count: int, webhooks: int, purged: int, rounds: int, seconds: float, home: str | None, is_receiver: bool
) -> None:
    """Measure uploads beside retention and webhooks. Example: scripts/bench retention --rounds 1"""
    if is_receiver:
        receive()
    if home is not None:
        purge(Path(home))
        return
    jpeg, numbers = photos.photo_jpegs()[2], itertools.count()
    with work_folder() as folder, helper("--receive") as receiver:
        assert receiver.stdout is not None
        path = folder / "home"
        url = f"http://127.0.0.1:{int(receiver.stdout.readline())}/"
        filled = timed(lambda: fill(path, count, webhooks=webhooks, purged=purged, url=url))
        click.echo(f"{count} requests put in within {filled:.0f} s")
        with processes.serving_home(folder, path, MLG_WEBHOOKS_PRIVATE="1") as base:

            def measure(is_due: bool, has_retention: bool) -> Callable[[int], list[float]]:
                def run(turn: int) -> list[float]:
                    set_due(path, datetime.now(UTC) + timedelta(days=0 if is_due else 365))
                    with helper("--home", str(path)) if has_retention else contextlib.nullcontext():
                        upload(base, jpeg, numbers, 2)
                        return upload(base, jpeg, numbers, seconds)

                return run

            ways = {
                "quiet": measure(False, False),
                "retention": measure(False, True),
                "delivery": measure(True, False),
                "both": measure(True, True),
            }
            found = in_turns(rounds, ways)
        click.echo(f"{count_delivered(path)} webhooks delivered meanwhile")
    rows = []
    for name, runs in found.items():
        uploads, tails = [len(run) / seconds for run in runs], [statistics.quantiles(run, n=100)[98] for run in runs]
        figures = (statistics.median(uploads), statistics.median(itertools.chain(*runs)), statistics.median(tails))
        rows.append([name, *(f"{figure:.1f}" for figure in figures), f"{max(itertools.chain(*runs)):.0f}"])
    print_table(
        f"{count} requests, {CONNECTIONS} connections, medians of {rounds} rounds",
        ("store", "uploads/s", "median ms", "99 % within ms", "longest ms"),
        rows,
    )
