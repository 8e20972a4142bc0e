"""A backlog of 100,000 requests: the time to claim and plan it, and to read a result meanwhile."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import httpx
from rich.console import Console

from batcher.planner import plan
from scripts.benchmarks import processes
from store import new_id
from store.rows import to_text
from store.settings import HomeSettings
from store.store import Store

MODELS = ("efficientnet_lite0", "resnet50", "vgg16", "densenet121", "nasnet_mobile")

_FILL = """
    INSERT INTO requests (id, service, model, image_sha256, image_bytes, state, created_at, due_at)
    VALUES (?, 'classification', ?, ?, 115000, 'queued', ?, ?)
"""


def fill(home: Path, count: int) -> list[str]:
    """Add queued requests without images to a new home. :return: some of their ids."""
    store = Store(HomeSettings(home=home))
    store.migrate()
    ids = [new_id() for _ in range(count)]
    now = to_text(datetime.now(UTC) - timedelta(hours=1))
    rows = [(id, MODELS[n % len(MODELS)], f"{n:064x}", now, now) for n, id in enumerate(ids)]

    def write(transaction: object) -> None:
        transaction.connection.executemany(_FILL, rows)  # type: ignore[attr-defined]

    store.database.write(write)
    store.close()
    return ids[:: count // 200]


def claim_and_plan(home: Path, limit: int) -> None:
    """Claim and plan once in this process and print the seconds and the peak megabytes."""
    store = Store(HomeSettings(home=home))
    now = datetime.now(UTC)
    started = time.perf_counter()
    claims = store.requests.claim(
        models=MODELS, limit=limit, now=now, lease_ends_at=now + timedelta(seconds=30), oldest_before=now
    )
    chunks = plan(claims)
    seconds = time.perf_counter() - started
    store.close()
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, len(claims), len(chunks))


@click.command()
@click.option("--waiting", default=100_000, show_default=True, help="Number of queued requests.")
@click.option("--limit", default=None, type=int, help="Claims at once.  [default: all queued requests]")
@click.option("--home", default=None, hidden=True)
def main(waiting: int, limit: int | None, home: str | None) -> None:
    """Measure a large backlog. Example: scripts/bench backlog"""
    if home is not None:
        claim_and_plan(Path(home), limit or waiting)
        return
    console = Console()
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as folder:
        work = Path(folder)
        ids = fill(work / "home", waiting)
        port = processes.free_port()
        base = f"http://127.0.0.1:{port}"
        with processes.running(
            processes.mlg("serve", "--home", str(work / "home"), "--port", str(port)),
            url=f"{base}/healthz",
            log=work / "log",
        ):
            times = []
            with httpx.Client(base_url=base) as client:
                for id in ids:
                    started = time.perf_counter()
                    client.get(f"/readPrediction/{id}").raise_for_status()
                    times.append((time.perf_counter() - started) * 1000)
        console.print(
            f"readPrediction with {waiting} waiting: median {statistics.median(times):.1f} ms, "
            f"99th percentile {statistics.quantiles(times, n=100)[98]:.1f} ms, longest {max(times):.1f} ms"
        )
        for count in (256, limit or waiting):
            printed = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "scripts.benchmarks",
                    "backlog",
                    "--home",
                    str(work / "home"),
                    "--limit",
                    str(count),
                ],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()
            seconds, megabytes, claims, chunks = (float(word) for word in printed)
            console.print(
                f"claim and plan of {claims:.0f} requests in {chunks:.0f} chunks: "
                f"{seconds:.3f} s, peak {megabytes:.0f} MB"
            )
