"""The client of the warm process: sends it a chunk, and starts the process if none is running.

Called by `mlg-provider run`, which is how chunks reach a provider. Only runs with the same models, precision, threads,
Python and code share a process: its folder is named after a hash of these. Started for every chunk, so it imports
little.
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
from provider_image.environment import without_secrets
from provider_image.errors import ChunkTimeout, WorkerDied, error_from_reply
from provider_image.runtime_paths import make_private_folder, socket_path, user_runtime_folder
from provider_image.schemas import MAX_CHUNK_SECONDS

if TYPE_CHECKING:
    import subprocess

#: A warm process must listen within this time after its start; imports take a tenth of a second.
_START_TIMEOUT_SECONDS = 30.0
#: If another process was started at the same time and got the lock, it has this long to listen.
_RACE_TIMEOUT_SECONDS = 5.0
_PACKAGE = Path(__file__).resolve().parent
#: Processes that were started here. They outlive this one; Python would warn if their objects were dropped.
_processes: list[subprocess.Popen[bytes]] = []


def server_folder(runtime_root: Path | None, models: Path, threads: int | None, precision: str) -> Path:
    """Return the folder of the warm process for these options; its name is a hash of all that must be equal.

    :param runtime_root: parent of these folders; None takes this user's folder for sockets.
    """
    code = [(str(path), path.stat().st_mtime_ns) for path in sorted(_PACKAGE.rglob("*.py"))]
    facts = [str(models.absolute()), threads or available_cores(), precision, sys.executable, sys.version, code]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return (runtime_root or user_runtime_folder()) / f"warm-{digest[:16]}"


def run(
    chunk: Path,
    results: Path,
    *,
    models: Path,
    runtime_root: Path | None = None,
    threads: int | None = None,
    precision: str = "f32",
    keep_warm_seconds: float = 300.0,
    limit_seconds: float = MAX_CHUNK_SECONDS,
) -> float:
    """Process a chunk in a warm process.

    :param runtime_root: see `server_folder`.
    :param keep_warm_seconds: a process that is started here exits after this long without work.
    :param limit_seconds: the process ends if the chunk takes longer, without the time that it waited for others.
    :return: seconds that the chunk took, likewise.
    :raises WorkerDied: the process could not be started, or exited during the chunk.
    :raises ChunkTimeout: the chunk took too long.
    :raises MlgError: the error of the chunk as a whole.
    """
    folder = server_folder(runtime_root, models, threads, precision)
    if runtime_root is None:
        make_private_folder(folder.parent)
    make_private_folder(folder)
    make_private_folder(socket_path(folder).parent)  # elsewhere if the path is long
    options = ["--models", str(models.absolute()), "--threads", str(threads or available_cores())]
    options += ["--precision", precision, "--idle-seconds", f"{keep_warm_seconds:g}"]
    with _connect_or_start(folder, options) as connection:
        job = {"chunk": str(chunk.absolute()), "results": str(results.absolute()), "limit_seconds": limit_seconds}
        started = time.monotonic()
        try:
            reply = _send_job(connection, json.dumps(job).encode() + b"\n")
        except WorkerDied as error:
            if time.monotonic() - started < limit_seconds:
                raise
            raise ChunkTimeout(
                f"The chunk took longer than {limit_seconds:g} s, so its warm process was ended."
            ) from error
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
        except (FileNotFoundError, ConnectionRefusedError):  # no process, or the socket of one that was killed
            connection.close()
        if process is None:
            process = _start(folder, options)
        elif process.poll() is not None:
            deadline = min(deadline, time.monotonic() + _RACE_TIMEOUT_SECONDS)
        if time.monotonic() > deadline:
            raise WorkerDied(f"The warm process did not start. {_last_line(folder / 'log')}".strip())
        time.sleep(0.01)


def _start(folder: Path, options: list[str]) -> subprocess.Popen[bytes]:
    """Start a process in a new session and with none of our streams, so that it can outlive us."""
    import subprocess  # imported here because most runs find a warm process

    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "provider_image", "serve", "--place", str(folder), "--pipes", *options],
            cwd=_PACKAGE.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
            env={**without_secrets(os.environ), "PYTHONSAFEPATH": ""},  # the package is found by the working folder
        )
    _processes.append(process)
    return process


def _send_job(connection: socket.socket, line: bytes) -> dict[str, Any]:
    try:
        connection.sendall(line)
        with connection.makefile("rb") as replies:
            received = replies.readline()
    except OSError as error:
        raise WorkerDied(f"The warm process ended before it had written the results: {error}") from error
    if not received.endswith(b"\n"):
        raise WorkerDied("The warm process ended before it had written the results. Run the chunk again.")
    reply: dict[str, Any] = json.loads(received)
    return reply


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""
