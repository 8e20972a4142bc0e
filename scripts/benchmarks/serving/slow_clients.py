"""How a server answers while one client without a key keeps hundreds of connections that it never finishes.

All connections are on this machine. One that the server closes is opened again after a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import multiprocessing
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import click

from scripts.benchmarks.support import photos
from scripts.benchmarks.support.measuring import print_table, seconds_option, work_folder
from scripts.benchmarks.support.processes import serving_home
from store.clients.keys import KeyRecord, Scope, hash_key, make_key
from store.settings import HomeSettings
from store.store import Store

#: What a client sends first, and what it goes on sending: one byte a second, or all that the server takes.
_HOST = b" HTTP/1.1\r\nHost: 127.0.0.1\r\n"
_JSON = b"Content-Type: application/json\r\n"
_FORM = b"Content-Type: multipart/form-data; boundary=a\r\nIdempotency-Key: k\r\n"
ATTACKS: dict[str, tuple[bytes, bool]] = {
    "headers, a byte a second": (b"POST /login" + _HOST + b"X-Slow: ", False),
    "a login, a byte a second": (b"POST /login" + _HOST + _JSON + b"Content-Length: 8000\r\n\r\n{", False),
    "a login in chunks without an end": (
        b"POST /login" + _HOST + _JSON + b"Transfer-Encoding: chunked\r\n\r\n1f40\r\n{", False,
    ),
    "a logout under an idempotency key, 2 GB": (
        b"POST /logout" + _HOST + _FORM + b"Content-Length: 2000000000\r\n\r\n", True,
    ),
    "an upload, 2 GB": (
        b"POST /requestPredictions/efficientnet_lite0" + _HOST + b"Content-Length: 2000000000\r\n\r\n", True,
    ),
}  # fmt: skip
#: Pause of a client after its connection was closed, and between two measured requests.
_RECONNECT_SECONDS, _PAUSE_SECONDS = 1.0, 0.05
#: A request without an answer is given up after this time, and counted with it.
_GIVE_UP_SECONDS = 30.0


async def _stall(host: str, port: int, begin: bytes, is_fast: bool) -> None:
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(host, port)
            answered = asyncio.create_task(reader.read())  # ends when the server closes the connection
            try:
                writer.write(begin)
                while not answered.done():
                    writer.write(b"a" * (65_536 if is_fast else 1))
                    await writer.drain()
                    await asyncio.sleep(0 if is_fast else 1.0)
            finally:
                answered.cancel()
                writer.close()
        await asyncio.sleep(_RECONNECT_SECONDS)


def _stall_all(host: str, port: int, attacks: list[tuple[bytes, bool]]) -> None:
    async def run() -> None:
        await asyncio.gather(*(_stall(host, port, *attack) for attack in attacks))

    asyncio.run(run())


@contextlib.contextmanager
def _attacked(base: str, attacks: list[tuple[bytes, bool]]) -> Iterator[None]:
    """Keep connections open until the block ends, one for each attack."""
    address = urlsplit(base)
    process = multiprocessing.Process(target=_stall_all, args=(address.hostname, address.port, attacks), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _latencies(base: str, key: str, jpeg: bytes, seconds: float) -> dict[str, list[float]]:
    """Send requests in turn, each over a new connection. :return: milliseconds of each kind."""
    found: dict[str, list[float]] = {"healthz": [], "upload": []}
    end, number = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        for name, times in found.items():
            number += 1
            connection = http.client.HTTPConnection(urlsplit(base).netloc, timeout=_GIVE_UP_SECONDS)
            began = time.perf_counter()
            try:
                if name == "healthz":
                    connection.request("GET", "/healthz")
                else:
                    headers = {"X-API-Key": key, "Content-Type": "image/jpeg", "Idempotency-Key": f"{began}"}
                    body = photos.make_unique(jpeg, number)
                    connection.request("POST", "/requestPrediction/efficientnet_lite0", body, headers)
                response = connection.getresponse()
                response.read()
                if response.status not in (200, 202):
                    raise RuntimeError(f"{name}: status {response.status}")
                times.append(1000 * (time.perf_counter() - began))
            except (OSError, http.client.HTTPException):
                times.append(1000 * _GIVE_UP_SECONDS)
            finally:
                connection.close()
            time.sleep(_PAUSE_SECONDS)
    return found


def _add_key(home: Path) -> str:
    id, key = make_key()
    store = Store(HomeSettings(home=home))
    store.migrate()
    scopes = frozenset({Scope.SUBMIT})
    store.keys.add(KeyRecord(id=id, name="bench", sha256=hash_key(key), scopes=scopes, created_at=datetime.now(UTC)))
    store.close()
    return key


@click.command()
@click.option("--connections", default=400, show_default=True, help="Connections of the client without a key.")
@seconds_option(10.0)
def main(connections: int, seconds: float) -> None:
    """Measure requests beside slow clients. Example: scripts/bench slow_clients --seconds 5"""
    jpeg = photos.photo_jpegs()[2]
    mixed = list(itertools.islice(itertools.cycle(ATTACKS.values()), connections))
    ways: dict[str, list[tuple[bytes, bool]]] = {
        "none": [],
        **{name: [attack] * connections for name, attack in ATTACKS.items()},
        "all in turn": mixed,
    }
    rows = []
    with work_folder() as folder:
        key = _add_key(folder / "home")
        with serving_home(folder, folder / "home") as base:
            for name, attacks in ways.items():
                with _attacked(base, attacks) if attacks else contextlib.nullcontext():
                    time.sleep(2 * _RECONNECT_SECONDS if attacks else 0)  # until all are connected
                    measured = _latencies(base, key, jpeg, seconds)
                for kind, times in measured.items():
                    times.sort()
                    figures = (times[len(times) // 2], times[int(0.99 * len(times))], times[-1])
                    rows.append((name, kind, len(times), *(f"{figure:.0f}" for figure in figures)))
    print_table(
        f"{connections} connections without a key, 113 KB JPEGs with a key",
        ("they send", "request", "requests", "median ms", "p99 ms", "longest ms"),
        rows,
    )
