"""Uploads per second, driven by wrk with images that all differ.

Alternately `mlg serve` and the naive server, or `mlg serve` alone and beside open event streams.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import click

from scripts.benchmarks import photos, processes
from scripts.benchmarks.measuring import in_turns, medians, print_table, rounds_option, seconds_option, work_folder
from scripts.benchmarks.processes import post

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
#: Pause between two measurements.
SETTLE_SECONDS = 5
_UNITS = {"us": 0.001, "ms": 1.0, "s": 1000.0}


def drive(base: str, lua: Path, kind: str, seed: str, seconds: float) -> tuple[float, float]:
    """Drive one server. :return: uploads per second, 99th percentile in milliseconds."""
    options = ["-t1", "-c16", f"-d{round(seconds)}s", "--latency", "-s", str(lua)]
    command = ["wrk", *options, base, "--", kind, seed]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 60).stdout
    if "Non-2xx" in printed:
        raise RuntimeError(printed)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", printed)
    tail = re.search(r"99%\s+([\d.]+)(us|ms|s)", printed)
    assert rate is not None and tail is not None, printed
    return float(rate[1]), float(tail[1]) * _UNITS[tail[2]]


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
@click.option("--processes", "server_processes", default=None, help="MLG_SERVER_PROCESSES for mlg serve.")
@click.option("--streams", "stream_count", default=0, help="Compare with this many open event streams instead.")
def main(rounds: int, seconds: float, server_processes: str | None, stream_count: int) -> None:
    """Measure uploads. Example: scripts/bench uploads --rounds 5"""
    if shutil.which("wrk") is None:
        raise click.ClickException("wrk is missing. Install it (Debian: apt-get install wrk).")
    env = {"MLG_SERVER_PROCESSES": server_processes} if server_processes else {}
    jpeg = photos.photo_jpegs()[2]
    naive = [sys.executable, "-m", "scripts.benchmarks.naive_server"]
    with work_folder() as folder:
        (folder / "image.jpg").write_bytes(jpeg)
        lua = folder / "uploads.lua"
        lua.write_text(LUA.format(jpeg=folder / "image.jpg", mark=photos.UNIQUE_BYTES))

        def way(server: str, kind: str, count: int = 0) -> Callable[[int], tuple[float, float]]:
            def measure(turn: int) -> tuple[float, float]:
                home = folder / f"{server}-{kind}-{count}-{turn}"
                home.mkdir()
                # Pending writes of the previous server, here or on the host, must not slow this one down.
                os.sync()
                time.sleep(SETTLE_SECONDS)
                serving = (
                    processes.serving(folder, *naive, str(home / "naive.db"))
                    if server == "naive"
                    else processes.serving_home(folder, home, **env)
                )
                with serving as base:
                    drive(base, lua, kind, f"warm{turn}", 1)
                    with streams(base, count, jpeg):
                        return drive(base, lua, kind, f"{kind}{turn}", seconds)

            return measure

        if stream_count:
            ways = {("mlg, form", name): way("mlg", "form", count) for name, count in
                    (("alone", 0), (f"beside {stream_count} streams", stream_count))}  # fmt: skip
        else:
            ways = {(kind, server): way(server, kind) for kind in ("form", "raw") for server in ("naive", "mlg")}
        median = {key: medians(runs) for key, runs in in_turns(rounds, ways).items()}
    first = dict(reversed([(what, figures) for (what, _), figures in median.items()]))
    print_table(
        "113 KB JPEGs, 16 connections, medians",
        ("body", "server", "uploads/s", "p99 ms", "rate against the first", "p99 against the first"),
        [
            (what, name, f"{rate:.0f}", f"{tail:.1f}", f"{rate / first[what][0]:.2f}", f"{tail / first[what][1]:.2f}")
            for (what, name), (rate, tail) in median.items()
        ],
    )
