"""`mlg up`: the time to start, to stop and to end after a kill, and the load while it is idle."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import click

from scripts.benchmarks.support.measuring import rounds_option, timed
from tests.process_tree import cpu_seconds, descendants, is_alive
from tests.system import System

IDLE_SECONDS = 10.0


def idle_load(batcher: int) -> tuple[float, float]:
    """Watch an idle batcher. :return: cores, and megabytes of peak memory."""
    before = cpu_seconds(batcher)
    time.sleep(IDLE_SECONDS)
    (peak,) = (line for line in Path(f"/proc/{batcher}/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return (cpu_seconds(batcher) - before) / IDLE_SECONDS, int(peak.split()[1]) / 1024


def kill(system: System) -> None:
    """Kill the supervisor and wait until none of its processes is left."""
    pids = descendants(system.process.pid)
    system.stop(9)
    while any(map(is_alive, pids)):
        time.sleep(0.005)


@click.command()
@rounds_option(5)
def main(rounds: int) -> None:
    """Measure start and stop. Example: scripts/bench startup"""
    seen: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="mlg-bench-") as folder:
        for turn in range(rounds):
            home = Path(folder, f"home-{turn}")
            systems: list[System] = []
            seconds = timed(lambda home=home, systems=systems: systems.append(System(home)))  # type: ignore[misc]
            seen["from the start until it is up, on a new home"].append(seconds)
            time.sleep(1)
            seen["from Ctrl-C to the end"].append(timed(lambda systems=systems: systems[0].stop(2)))  # type: ignore[misc]

            system = System(home)
            time.sleep(1)
            if turn == 0:
                cores, megabytes = idle_load(system.pids("batch")[0])
            seconds = timed(lambda system=system: kill(system))  # type: ignore[misc]
            seen["from kill -9 of the supervisor to the end of all processes"].append(seconds)
    for what, figures in seen.items():
        click.echo(f"{what}: median {statistics.median(figures):.2f} s ({min(figures):.2f} to {max(figures):.2f})")
    click.echo(f"idle batcher, polling twenty times per second: {cores:.1%} of a core, {megabytes:.0f} MB at most")
