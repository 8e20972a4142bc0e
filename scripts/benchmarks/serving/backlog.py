"""A backlog of 100,000 requests: the time to claim and plan it, and to read a result meanwhile."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import httpx

from batcher.planner import plan
from scripts.benchmarks.support import processes, stored_requests
from scripts.benchmarks.support.measuring import milliseconds, timed, work_folder


def claim_and_plan(home: Path, limit: int) -> None:
    """Claim and plan once in this process and print the seconds, the peak megabytes and what was claimed."""
    now = datetime.now(UTC)
    with stored_requests.opened(home) as store:

        def work() -> None:
            found.extend(
                store.requests.claim(
                    models=stored_requests.MODELS,
                    limit=limit,
                    now=now,
                    lease_ends_at=now + timedelta(seconds=30),
                    oldest_before=now,
                )
            )
            chunks.extend(plan(found))

        found, chunks = [], []
        seconds = timed(work)
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    click.echo(
        f"claim and plan of {len(found)} requests in {len(chunks)} chunks: {seconds:.3f} s, peak {megabytes:.0f} MB"
    )


@click.command()
@click.option("--waiting", default=100_000, show_default=True, help="Number of queued requests.")
@click.option("--limit", default=None, type=int, help="Claims at once.  [default: all queued requests]")
@click.option("--home", default=None, hidden=True)
def main(waiting: int, limit: int | None, home: str | None) -> None:
    """Measure a large backlog. Example: scripts/bench backlog"""
    if home is not None:
        claim_and_plan(Path(home), limit or waiting)
        return
    with work_folder() as folder:
        stored_requests.add_day(folder / "home", waiting, queued=1000)
        with processes.serving_home(folder, folder / "home") as base, httpx.Client(base_url=base) as client:
            ids = iter(range(0, waiting, max(1, waiting // 200)))
            times = milliseconds(lambda: client.get(f"/readPrediction/{next(ids):032x}").raise_for_status(), 200)
        click.echo(
            f"readPrediction with {waiting} waiting: median {statistics.median(times):.1f} ms, "
            f"99th percentile {statistics.quantiles(times, n=100)[98]:.1f} ms, longest {max(times):.1f} ms"
        )
        for count in (256, limit or waiting):
            # In a process of its own, because of the peak memory.
            command = [sys.executable, "-m", "scripts.benchmarks", "backlog", "--home", str(folder / "home")]
            subprocess.run([*command, "--limit", str(count)], check=True)
