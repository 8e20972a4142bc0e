"""A store with a million requests: the response times of the operator's dashboard, its data and the request lists."""

from __future__ import annotations

import statistics

import click
import httpx

from scripts.benchmarks.support import processes, stored_requests
from scripts.benchmarks.support.measuring import milliseconds, print_table, timed, work_folder
from server.auth.cursors import Cursors


@click.command()
@click.option("--requests", "count", default=1_000_000, show_default=True, help="Number of requests.")
@click.option("--times", default=200, show_default=True, help="Requests to each path.")
@click.option("--depths", default="0,1000,500000,999000", show_default=True, help="Offsets of the request lists.")
def main(count: int, times: int, depths: str) -> None:
    """Measure the dashboard with many requests. Example: scripts/bench dashboard"""
    calls: dict[str, tuple[str, dict[str, str]]] = {
        "GET /operator/status": ("/operator/status", {}),
        "GET /metrics": ("/metrics", {}),
        "GET /ui/operator": ("/ui/operator", {}),
    }
    rows = []
    with work_folder() as folder:
        seconds = timed(lambda: stored_requests.add_day(folder / "home", count, queued=100))
        cursors = Cursors(folder / "home").codec("requests", None)
        for depth in map(int, depths.split(",")):
            cursor = {"cursor": cursors.write(count - depth)} if depth else {}
            calls[f"GET /requests, {depth} from the newest"] = ("/requests", cursor)
        size = (folder / "home" / "mlg.db").stat().st_size / 1e6
        with processes.serving_home(folder, folder / "home") as base, httpx.Client(base_url=base, timeout=60) as client:
            for name, (path, query) in calls.items():
                accepted = {"Accept": "text/html" if path.startswith("/ui/") else "application/json"}

                def call(path: str = path, query: dict[str, str] = query, headers: dict[str, str] = accepted) -> None:
                    client.get(path, params=query, headers=headers).raise_for_status()

                # Some requests are answered from the cache of the dashboard, some are not.
                first, *others = milliseconds(call, times, pause_seconds=0.03)
                slow = statistics.quantiles(others, n=100)[98]
                rows.append([name, *(f"{each:.1f}" for each in (first, statistics.median(others), slow))])
    title = f"{count} requests, put in within {seconds:.0f} s, {size:.0f} MB"
    print_table(title, ("call", "first ms", "median ms", "99 % within ms"), rows)
