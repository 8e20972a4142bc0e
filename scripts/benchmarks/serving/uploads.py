"""Uploads per second, their tail, and what they cost in processor time, driven by wrk with images that all differ.

In turns the naive server and `mlg serve` with one process and with several, or `mlg serve` of another checkout and of
this one, or `mlg serve` alone and beside open event streams.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import click

from scripts.benchmarks.support import photos
from scripts.benchmarks.support.measuring import (
    in_turns,
    medians,
    print_table,
    rounds_option,
    seconds_option,
    work_folder,
)
from scripts.benchmarks.support.processes import post, serving
from tests.process_tree import cpu_seconds, descendants

#: What wrk sends: images that all differ.
LUA = """
local file = io.open("{jpeg}", "rb"); local jpeg = file:read("*a"); file:close()
local head, tail = jpeg:sub(1, 6), jpeg:sub(7 + {mark})
local n, boundary = 0, "----mlg-measures-uploads"
function init(args) form, seed = args[1] == "form", args[2] end
function request()
  n = n + 1
  local body = head .. string.format("%-16s%016d", seed, n) .. tail
  local type = "image/jpeg"
  if form then
    type = "multipart/form-data; boundary=" .. boundary
    body = "--" .. boundary .. '\\r\\nContent-Disposition: form-data; name="image"; filename="a.jpg"\\r\\n' ..
      "Content-Type: image/jpeg\\r\\n\\r\\n" .. body .. "\\r\\n--" .. boundary .. "--\\r\\n"
  end
  return wrk.format("POST", "/requestPrediction/efficientnet_lite0", {{["Content-Type"] = type}}, body)
end
"""
_NAIVE = [sys.executable, "-m", "scripts.benchmarks.peer_servers.naive_server"]
#: -P: what PYTHONPATH names comes before the current folder.
_MLG = [sys.executable, "-P", "-m", "mlg", "serve", "--home"]
#: Pause between two measurements.
SETTLE_SECONDS = 5
_UNITS = {"us": 0.001, "ms": 1.0, "s": 1000.0}
#: Uploads per second, their 99th percentile, and the processor time of the server for each, both in milliseconds.
Figures = tuple[float, float, float]


def _processor_seconds() -> float:
    """Add up what the programs that this one has started have computed; while it is called, these are servers only."""
    return sum(map(cpu_seconds, descendants(os.getpid())))


def drive(base: str, lua: Path, kind: str, seed: str, seconds: float) -> Figures:
    """Drive the one server that runs."""
    used = _processor_seconds()
    options = ["-t1", "-c16", f"-d{round(seconds)}s", "--latency", "-s", str(lua)]
    command = ["wrk", *options, base, "--", kind, seed]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 60).stdout
    if "Non-2xx" in printed:
        raise RuntimeError(printed)
    used = _processor_seconds() - used
    rate = re.search(r"Requests/sec:\s+([\d.]+)", printed)
    tail = re.search(r"99%\s+([\d.]+)(us|ms|s)", printed)
    count = re.search(r"(\d+) requests in", printed)
    assert rate is not None and tail is not None and count is not None, printed
    return float(rate[1]), float(tail[1]) * _UNITS[tail[2]], 1000 * used / int(count[1])


@contextlib.contextmanager
def streams(base: str, count: int, jpeg: bytes) -> Iterator[None]:
    """Keep streams open; all have sent their response headers when the block begins."""
    address = urlsplit(base)
    (id,) = post(base, [jpeg]) if count else ("",)
    with contextlib.ExitStack() as stack:
        sockets = [socket.create_connection((address.hostname, address.port), timeout=30) for _ in range(count)]
        for stream in sockets:
            stack.callback(stream.close)
            stream.sendall(f"GET /events?ids={id} HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode())
        for stream in sockets:
            head = stream.recv(4096)
            if b" 200 " not in head.split(b"\r\n", 1)[0]:
                raise RuntimeError(head.decode(errors="replace"))
        yield


@click.command()
@rounds_option(3)
@seconds_option(5.0)
@click.option("--processes", default=2, show_default=True, help="Measure mlg serve with so many processes too.")
@click.option("--streams", "stream_count", default=0, help="Compare with this many open event streams instead.")
@click.option(
    "--against", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Compare with another checkout."
)
def main(rounds: int, seconds: float, processes: int, stream_count: int, against: Path | None) -> None:
    """Measure uploads. Example: scripts/bench uploads --rounds 5"""
    if shutil.which("wrk") is None:
        raise click.ClickException("wrk is missing. Install it (Debian: apt-get install wrk).")
    jpeg = photos.photo_jpegs()[2]
    with work_folder() as folder:
        (folder / "image.jpg").write_bytes(jpeg)
        lua = folder / "uploads.lua"
        lua.write_text(LUA.format(jpeg=folder / "image.jpg", mark=photos.UNIQUE_BYTES))

        def way(kind: str, command: list[str], count: int = 0, **env: str) -> Callable[[int], Figures]:
            def measure(turn: int) -> Figures:
                home = tempfile.mkdtemp(dir=folder)  # deleted at the end: deleting would slow the next one down
                # Pending writes of the previous server, here or on the host, must not slow this one down.
                os.sync()
                time.sleep(SETTLE_SECONDS)
                with serving(folder, *command, f"{home}/home", **env) as base:
                    drive(base, lua, kind, f"warm{turn}", 1)
                    with streams(base, count, jpeg):
                        return drive(base, lua, kind, f"{kind}{turn}", seconds)

            return measure

        if stream_count:
            counts = {"alone": 0, f"beside {stream_count} streams": stream_count}
            ways = {("form", name): way("form", _MLG, count) for name, count in counts.items()}
        elif against is not None:
            checkouts = {str(against): against.resolve(), "this checkout": Path.cwd()}
            ways = {
                (kind, name): way(kind, _MLG, PYTHONPATH=str(checkout))
                for kind in ("form", "raw")
                for name, checkout in checkouts.items()
            }
        else:
            several = {"MLG_SERVER_PROCESSES": str(processes)}
            ways = {
                (kind, name): way(kind, command, **env)
                for kind in ("form", "raw")
                for name, command, env in (
                    ("naive", _NAIVE, {}),
                    ("mlg", _MLG, {}),
                    (f"mlg, {processes} processes", _MLG, several),
                )
            }
        runs = in_turns(rounds, ways)
    median = {key: medians(figures) for key, figures in runs.items()}
    rows = []
    for (kind, name), figures in median.items():
        first = next(key for key in runs if key[0] == kind)
        # Of two runs of one round, as what else the machine does differs from round to round.
        ratios = medians(
            [mine / its for mine, its in zip(*pair, strict=True)]
            for pair in zip(runs[kind, name], runs[first], strict=True)
        )
        rows.append(
            (
                kind,
                name,
                *(f"{figure:.{digits}f}" for figure, digits in zip(figures, (0, 1, 2), strict=True)),
                *(f"{ratio:.2f}" for ratio in ratios),
            )
        )
    figures_of = ("uploads/s", "p99 ms", "processor ms")
    print_table(
        "113 KB JPEGs, 16 connections, medians",
        ("body", "server", *figures_of, *(f"{name} against the first" for name in ("rate", "p99", "processor"))),
        rows,
    )
