"""`mlg up`: the time to start, to stop and to end after a kill, and the load while it is idle."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console

from scripts.benchmarks import processes

IDLE_SECONDS = 10.0


def _descendants(pid: int) -> list[int]:
    """List the processes below one."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found: list[int] = []
    level = {pid}
    while level := {child for child, parent in parents.items() if parent in level}:
        found += sorted(level)
    return found


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _batcher(pids: list[int]) -> int:
    return next(pid for pid in pids if "\0batch\0" in Path(f"/proc/{pid}/cmdline").read_text())


def _start(home: Path) -> tuple[subprocess.Popen[str], float]:
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "mlg", "up", "--home", str(home), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    if "is up" not in process.stdout.readline():
        raise RuntimeError("mlg up did not start")
    return process, time.perf_counter() - started


@click.command()
@click.option("--rounds", default=5, show_default=True, help="Starts of each kind; the median is reported.")
def main(rounds: int) -> None:
    """Measure start and stop. Example: scripts/bench startup"""
    seen: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="mlg-bench-") as folder:
        for turn in range(rounds):
            process, seconds = _start(Path(folder) / f"home-{turn}")
            seen.setdefault("from the start until it is up, on a new home", []).append(seconds)
            time.sleep(1)
            started = time.perf_counter()
            process.send_signal(signal.SIGINT)
            process.wait()
            seen.setdefault("from Ctrl-C to the end", []).append(time.perf_counter() - started)

            process, _ = _start(Path(folder) / f"home-{turn}")
            time.sleep(1)
            pids = _descendants(process.pid)
            if turn == 0:
                batcher = _batcher(pids)
                before = _processor_seconds(batcher)
                time.sleep(IDLE_SECONDS)
                share = (_processor_seconds(batcher) - before) / IDLE_SECONDS
                megabytes = processes.resident_megabytes(batcher)
            started = time.perf_counter()
            process.kill()
            process.wait()
            while any(map(_is_alive, pids)):
                time.sleep(0.005)
            seen.setdefault("from kill -9 of the supervisor to the end of all processes", []).append(
                time.perf_counter() - started
            )
    console = Console()
    for what, figures in seen.items():
        console.print(f"{what}: median {statistics.median(figures):.2f} s ({min(figures):.2f} to {max(figures):.2f})")
    console.print(f"idle batcher, polling twenty times per second: {share:.1%} of a core, {megabytes:.0f} MB at most")
