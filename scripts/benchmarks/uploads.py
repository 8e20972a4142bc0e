"""Uploads per second: `mlg serve` and the naive server alternately, driven by wrk with images that all differ."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from scripts.benchmarks import photos, processes

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


def measure(port: int, lua: Path, kind: str, seed: str, seconds: int) -> tuple[float, float]:
    """Drive one server. :return: uploads per second, 99th percentile in milliseconds."""
    printed = subprocess.run(
        [
            "wrk",
            "-t1",
            "-c16",
            f"-d{seconds}s",
            "--latency",
            "-s",
            str(lua),
            f"http://127.0.0.1:{port}",
            "--",
            kind,
            seed,
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=seconds + 60,
    ).stdout
    if "Non-2xx" in printed:
        raise RuntimeError(printed)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", printed)
    tail = re.search(r"99%\s+([\d.]+)(us|ms|s)", printed)
    assert rate is not None and tail is not None, printed
    return float(rate[1]), float(tail[1]) * _UNITS[tail[2]]


@click.command()
@click.option("--rounds", default=3, show_default=True, help="Rounds of each; the median is reported.")
@click.option("--seconds", default=5, show_default=True, help="Length of one measurement.")
@click.option("--processes", "server_processes", default=None, help="MLG_SERVER_PROCESSES for mlg serve.")
def main(rounds: int, seconds: int, server_processes: str | None) -> None:
    """Measure uploads. Example: scripts/bench uploads --rounds 5"""
    if shutil.which("wrk") is None:
        raise click.ClickException("wrk is missing. Install it (Debian: apt-get install wrk).")
    seen: dict[tuple[str, str], list[tuple[float, float]]] = {}
    # Not in /tmp, which may be in memory: durable writes are measured.
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as folder:
        work = Path(folder)
        (work / "image.jpg").write_bytes(photos.photo_jpegs()[2])
        lua = work / "uploads.lua"
        lua.write_text(LUA.format(jpeg=work / "image.jpg", mark=photos.UNIQUE_BYTES))
        env = {"MLG_SERVER_PROCESSES": server_processes} if server_processes else {}
        for turn in range(rounds):
            for kind in ("form", "raw"):
                for server in ("naive", "mlg"):
                    port = processes.free_port()
                    home = work / f"{server}-{kind}-{turn}"
                    home.mkdir()
                    command = (
                        [sys.executable, "-m", "scripts.benchmarks.naive_server", str(port), str(home / "naive.db")]
                        if server == "naive"
                        else processes.mlg("serve", "--home", str(home), "--port", str(port))
                    )
                    url = f"http://127.0.0.1:{port}/healthz"
                    # Pending writes of the previous server, here or on the host, must not slow this one down.
                    os.sync()
                    time.sleep(SETTLE_SECONDS)
                    with processes.running(command, url=url, log=work / "log", env=env):
                        measure(port, lua, kind, f"warm{kind}{turn}", 1)
                        found = measure(port, lua, kind, f"{kind}{turn}", seconds)
                    seen.setdefault((server, kind), []).append(found)
    table = Table("server", "body", "uploads/s", "p99 ms", title="113 KB JPEGs, 16 connections, medians")
    median = {key: [statistics.median(column) for column in zip(*runs, strict=True)] for key, runs in seen.items()}
    for (server, kind), (rate, tail) in median.items():
        table.add_row(server, {"form": "multipart", "raw": "raw"}[kind], f"{rate:.0f}", f"{tail:.1f}")
    console = Console()
    console.print(table)
    for kind in ("form", "raw"):
        rate = median["mlg", kind][0] / median["naive", kind][0]
        tail = median["mlg", kind][1] / median["naive", kind][1]
        console.print(f"{kind}: {rate:.2f} times the naive server's rate, p99 {tail:.2f} of its")
