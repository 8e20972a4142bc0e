"""The programs that are measured: each is started in its own process group and ended with the benchmark."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


def mlg(*words: str) -> list[str]:
    """Return the command line of an mlg command."""
    return [sys.executable, "-m", "mlg", *words]


@contextlib.contextmanager
def running(command: list[str], log: Path, is_ready: Callable[[], bool], **env: str) -> Iterator[int]:
    """Run a program until the block ends; enter it when the program is ready. :return: its pid."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True, env={**os.environ, **env}
        )
    try:
        deadline = time.monotonic() + 30
        while not is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def serving(folder: Path, *command: str, **env: str) -> Iterator[str]:
    """Run a server, which gets the option --port and logs to a folder, until the block ends. :return: its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = f"http://127.0.0.1:{port}"
    with running([*command, "--port", str(port)], folder / "server.log", lambda: _answers(f"{base}/healthz"), **env):
        yield base


def serving_home(folder: Path, home: Path, **env: str) -> contextlib.AbstractContextManager[str]:
    """Run `mlg serve` on a home until the block ends."""
    return serving(folder, *mlg("serve", "--home", str(home)), **env)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def post_each(url: str, bodies: list[tuple[bytes, str]]) -> list[Any]:
    """Post bodies over one connection. A minimal client, because it shares the cores.

    :param bodies: each with its content type.
    :return: the answers.
    :raises RuntimeError: an answer is not 200 or 202.
    """
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.netloc, timeout=60)
    answers = []
    try:
        for body, content_type in bodies:
            connection.request("POST", address.path, body, {"Content-Type": content_type})
            response = connection.getresponse()
            text = response.read()
            if response.status not in (200, 202):
                raise RuntimeError(f"{response.status}: {text[:500].decode(errors='replace')}")
            answers.append(json.loads(text))
    finally:
        connection.close()
    return answers


def post(base: str, jpegs: list[bytes]) -> list[str]:
    """Post images to mlg over one connection. :return: ids."""
    bodies = [(jpeg, "image/jpeg") for jpeg in jpegs]
    return [answer["req_id"] for answer in post_each(f"{base}/requestPrediction/efficientnet_lite0", bodies)]
