"""Uploads per second while event streams are open, and without them, alternately."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.console import Console

from scripts.benchmarks import golem, photos, processes
from scripts.benchmarks.uploads import LUA, measure
from store.settings import HomeSettings
from store.store import Store


@contextlib.contextmanager
def streams(port: int, id: str, count: int) -> Iterator[None]:
    """Keep streams open; all have sent their response headers when the block begins."""
    sockets = []
    try:
        for _ in range(count):
            stream = socket.create_connection(("127.0.0.1", port), timeout=30)
            sockets.append(stream)
            stream.sendall(f"GET /events?ids={id} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
        for stream in sockets:
            head = stream.recv(4096)
            if b" 200 " not in head.split(b"\r\n", 1)[0]:
                raise RuntimeError(head.decode(errors="replace"))
        yield
    finally:
        for stream in sockets:
            stream.close()


@click.command()
@click.option("--streams", "count", default=200, show_default=True, help="Number of streams.")
@click.option("--rounds", default=3, show_default=True, help="Rounds of each; the median is reported.")
@click.option("--seconds", default=5, show_default=True, help="Length of one measurement.")
def main(count: int, rounds: int, seconds: int) -> None:
    """Measure uploads while event streams are open. Example: scripts/bench sse --streams 200"""
    if shutil.which("wrk") is None:
        raise click.ClickException("wrk is missing. Install it (Debian: apt-get install wrk).")
    seen: dict[int, list[float]] = {0: [], count: []}
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as folder:
        work = Path(folder)
        jpeg = photos.photo_jpegs()[2]
        (work / "image.jpg").write_bytes(jpeg)
        lua = work / "uploads.lua"
        lua.write_text(LUA.format(jpeg=work / "image.jpg", mark=photos.UNIQUE_BYTES))
        for turn in range(rounds):
            for number in seen:
                port = processes.free_port()
                home = work / f"home-{turn}-{number}"
                golem.fill(home, [jpeg])
                store = Store(HomeSettings(home=home, busy_seconds=5))
                (request,) = store.requests.list()
                store.close()
                os.sync()
                time.sleep(5)
                url = f"http://127.0.0.1:{port}/healthz"
                with processes.running(
                    processes.mlg("serve", "--home", str(home), "--port", str(port)), url=url, log=work / "log"
                ):
                    measure(port, lua, "form", f"warm{turn}", 1)
                    with streams(port, request.id, number):
                        rate, _ = measure(port, lua, "form", f"{turn}-{number}", seconds)
                        with urllib.request.urlopen(url, timeout=10):
                            seen[number].append(rate)
    without, beside = (statistics.median(rates) for rates in seen.values())
    console = Console()
    console.print(f"{datetime.now(UTC):%Y-%m-%d}: {without:.0f} uploads/s alone, {beside:.0f} beside {count} streams")
    console.print(f"{beside / without:.0%} of the rate")
