"""The provider's door: brings a chunk to the warm process of its place, starting one if there is none.

Called by `mlg-provider run`. Every provider, borrowed or rented, is used through it. A process is only shared by runs
with the same models, precision, threads and code: those make its place.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.cores import available_cores
from provider_image.errors import WorkerDied, error_from_reply
from provider_image.runtime_paths import make_private_folder, socket_path, user_runtime_folder

if TYPE_CHECKING:
    import subprocess

#: A warm process must listen within this time after it was started; importing takes a tenth of a second.
_START_TIMEOUT_SECONDS = 30.0
#: Another process may have won the race for the place; it gets this long to listen.
_RACE_TIMEOUT_SECONDS = 5.0
_PACKAGE = Path(__file__).resolve().parent
#: Processes started here. They outlive this one; keeping the objects keeps Python from warning of that.
_processes: list[subprocess.Popen[bytes]] = []


def server_folder(runtime_root: Path | None, models: Path, threads: int | None, precision: str) -> Path:
    """Return the place of the warm process that fits: a folder whose name tells all that must be equal.

    :param runtime_root: where places are; None takes this user's folder for sockets.
    """
    code = [(str(path), path.stat().st_mtime_ns) for path in sorted(_PACKAGE.rglob("*.py"))]
    facts = [str(models.absolute()), threads or available_cores(), precision, sys.executable, sys.version, code]
    return (
        runtime_root or user_runtime_folder()
    ) / f"warm-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"


def run(
    chunk: Path,
    results: Path,
    *,
    models: Path,
    runtime_root: Path | None = None,
    threads: int | None = None,
    precision: str = "f32",
    keep_warm_seconds: float = 300.0,
) -> float:
    """Have a chunk worked on by a warm process.

    :param runtime_root: where places are; see `server_folder`.
    :param keep_warm_seconds: a process that is started here ends after this long without work.
    :return: seconds that it took there, waiting for other chunks not counted.
    :raises WorkerDied: the process could not be started, or ended in mid-chunk.
    :raises MlgError: what the chunk as a whole failed of.
    """
    folder = server_folder(runtime_root, models, threads, precision)
    make_private_folder(folder.parent)
    make_private_folder(folder)
    options = ["--models", str(models.absolute()), "--threads", str(threads or available_cores())]
    options += ["--precision", precision, "--idle-seconds", f"{keep_warm_seconds:g}"]
    with _connect_or_start(folder, options) as connection:
        job = {"chunk": str(chunk.absolute()), "results": str(results.absolute())}
        reply = _send_job(connection, json.dumps(job).encode() + b"\n")
    if reply.get("ok") is not True:
        raise error_from_reply(reply)
    return float(reply["seconds"])


def _connect_or_start(folder: Path, options: list[str]) -> socket.socket:
    process, deadline = None, time.monotonic() + _START_TIMEOUT_SECONDS
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(socket_path(folder)))
            return connection
        except (FileNotFoundError, ConnectionRefusedError):  # none, or a dead one's socket
            connection.close()
        if process is None:
            process = _start(folder, options)
        elif process.poll() is not None:
            deadline = min(deadline, time.monotonic() + _RACE_TIMEOUT_SECONDS)
        if time.monotonic() > deadline:
            raise WorkerDied(f"The warm process did not start. {_last_line(folder / 'log')}".strip())
        time.sleep(0.01)


def _start(folder: Path, options: list[str]) -> subprocess.Popen[bytes]:
    """Start a process of its own session that has none of our streams, so that it can outlive us."""
    import subprocess  # most runs find a warm process, and do not pay for this

    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "provider_image", "serve", "--place", str(folder), *options],
            cwd=_PACKAGE.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "PYTHONSAFEPATH": ""},  # the package is found by the working folder
        )
    _processes.append(process)
    return process


def _send_job(connection: socket.socket, line: bytes) -> dict[str, Any]:
    received = b""
    try:
        connection.sendall(line)
        while not received.endswith(b"\n"):
            data = connection.recv(65536)
            if not data:
                raise WorkerDied("The warm process ended before it had written the results. Run the chunk again.")
            received += data
    except OSError as error:
        raise WorkerDied(f"The warm process ended before it had written the results: {error}") from error
    reply: dict[str, Any] = json.loads(received)
    return reply


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""
