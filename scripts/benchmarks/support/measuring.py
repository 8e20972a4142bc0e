"""What the benchmarks share: repeated timing, medians, rates and tables."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import click

from provider_image.cores import available_cores

_Result = TypeVar("_Result")


def rounds_option(default: int) -> Callable[[Any], Any]:
    """Make the option --rounds."""
    return click.option("--rounds", default=default, show_default=True, help="Rounds; the median is reported.")


def seconds_option(default: float) -> Callable[[Any], Any]:
    """Make the option --seconds."""
    return click.option("--seconds", default=default, show_default=True, help="Length of one measurement.")


@contextlib.contextmanager
def work_folder() -> Iterator[Path]:
    """Make a temporary folder. It is not in /tmp, which may be in memory: durable writes are measured."""
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as folder:
        yield Path(folder)


def in_turns(rounds: int, ways: Mapping[Any, Callable[[int], _Result]]) -> dict[Any, list[_Result]]:
    """Run every way once a round, with the round's number: what else the machine does then affects all alike."""
    seen: dict[Any, list[_Result]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name, way in ways.items():
            seen[name].append(way(turn))
    return seen


def medians(rows: Iterable[Iterable[float]]) -> list[float]:
    """Return the median of each column."""
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def milliseconds(work: Callable[[], object], times: int, *, pause_seconds: float = 0.0) -> list[float]:
    """Time calls, one after the other."""
    found = []
    for _ in range(times):
        found.append(1000 * timed(work))
        time.sleep(pause_seconds)
    return found


def rate(turn: Callable[[], int], seconds: float) -> float:
    """Repeat what returns a number of images for at least some seconds. :return: images per second."""
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        done += turn()
    return done / (time.perf_counter() - started)


def parallel_rate(work: Callable[[Any], object], items: list[Any], seconds: float) -> float:
    """Work on items on all cores, again and again. :return: items per second."""
    cores = available_cores()
    work(items[0])

    def repeat(first: int) -> int:
        done = 0
        while time.perf_counter() < end:
            work(items[(first + done) % len(items)])
            done += 1
        return done

    started = time.perf_counter()
    end = started + seconds
    with ThreadPoolExecutor(cores) as pool:
        done = sum(pool.map(repeat, range(cores)))
    return done / (time.perf_counter() - started)


def print_table(title: str, head: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table in Markdown, as docs/measurements.md has them."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    click.echo("\n".join([f"\n{title}\n", *(f"| {' | '.join(map(str, line))} |" for line in lines), ""]))
