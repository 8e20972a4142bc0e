"""A whole system, run as a user runs it: `mlg up` on a free port."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from tests.process_tree import command_line, descendants, ends_with_tests
from tests.timing import DEADLINE_SECONDS, wait_until

ROOT = Path(__file__).parents[1]
MODEL = "efficientnet_lite0"
#: What the starter model answers for scikit-image's photos: label, probability.
RIGHT = {"chelsea": ("tiger_cat", 0.408), "coffee": ("espresso", 0.951), "rocket": ("missile", 0.240)}


class System:
    """A running `mlg up`, which ends with the tests even if they are killed.

    :param arguments: options of `mlg up`.
    :param variables: environment variables.
    """

    def __init__(self, home: Path, *arguments: str, **variables: str) -> None:
        self.home = home
        self.log = home.parent / "up.log"
        self._out = home.parent / "up.out"
        with self.log.open("ab") as log, self._out.open("wb") as out:
            self.process = subprocess.Popen(
                ends_with_tests(sys.executable, "-m", "mlg", "up", "--home", str(home), "--port", "0", *arguments),
                cwd=ROOT,
                stdout=out,
                stderr=log,
                env={**os.environ, **variables},
                start_new_session=True,
            )
        self.base = wait_until(self._address)

    def _address(self) -> str | None:
        assert self.process.poll() is None, self.log.read_text()
        found = re.search(r"http://[\d.]+:\d+", self._out.read_text())
        return found[0] if found else None

    def post(self, data: bytes, model: str = MODEL, query: str = "") -> dict[str, Any]:
        """Send an image; return the server's answer."""
        request = urllib.request.Request(
            f"{self.base}/requestPrediction/{model}{query}", data=data, headers={"Content-Type": "image/jpeg"}
        )
        with urllib.request.urlopen(request, timeout=DEADLINE_SECONDS) as response:
            assert response.status == 202
            answer: dict[str, Any] = json.load(response)
        return answer

    def read(self, id: str, query: str = "?wait=30") -> dict[str, Any]:
        """Read a request, which may be held until it is answered."""
        with urllib.request.urlopen(f"{self.base}/readPrediction/{id}{query}", timeout=DEADLINE_SECONDS) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def query(self, sql: str) -> list[Any]:
        """Read from the database."""
        with contextlib.closing(sqlite3.connect(self.home / "mlg.db", timeout=DEADLINE_SECONDS)) as connection:
            return connection.execute(sql).fetchall()

    def execute(self, script: str) -> None:
        """Change the database."""
        with contextlib.closing(sqlite3.connect(self.home / "mlg.db", timeout=DEADLINE_SECONDS)) as connection:
            connection.executescript(script)

    def pids(self, *words: str) -> list[int]:
        """Find processes of this system whose command line holds all the words."""
        return [pid for pid in descendants(self.process.pid) if all(word in command_line(pid) for word in words)]

    def stop(self, how: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(DEADLINE_SECONDS)

    def answer(self, id: str) -> dict[str, Any]:
        """Wait until a request is answered, however long that takes; return the answer."""
        while (found := self.read(id))["status"] in ("queued", "claimed"):
            pass
        return found


def variant(jpeg: bytes, number: int) -> bytes:
    """The same image with other bytes: a JPEG comment in front."""
    return jpeg[:2] + b"\xff\xfe\x00\x0a" + f"{number:08d}".encode() + jpeg[2:]
