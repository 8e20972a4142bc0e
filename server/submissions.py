"""The journal of `mlg submit`: which pictures a server has acknowledged, so that a broken run can go on.

One file for each (url, model) in `home/submissions/`, one line of JSON for each picture, on the disk before the next
step. Keyed by the picture's bytes, not its name: files may be moved between two runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from types import TracebackType

from store.errors import StoreUnavailable


class Submissions:
    """The acknowledged pictures of one server and model; a context manager."""

    def __init__(self, home: Path, url: str, model: str) -> None:
        key = hashlib.sha256(f"{url}\n{model}".encode()).hexdigest()[:16]
        self.path = home / "submissions" / f"{key}.jsonl"
        self._lock = threading.Lock()
        self._ids: dict[str, str] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
            self._file = self.path.open("ab+")
            self._read()
            if self._file.tell() == 0:
                self._write({"url": url, "model": model})
        except OSError as error:
            raise StoreUnavailable(f"The journal {self.path} cannot be written: {error.strerror}.") from error

    def __enter__(self) -> Submissions:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def find(self, sha256: str) -> str | None:
        """Return the id under which the server acknowledged these bytes, None if it did not."""
        with self._lock:
            return self._ids.get(sha256)

    def add(self, sha256: str, req_id: str) -> None:
        """Note an acknowledgement; durable on return. :raises StoreUnavailable:"""
        with self._lock:
            try:
                self._write({"sha256": sha256, "req_id": req_id})
            except OSError as error:
                raise StoreUnavailable(f"The journal {self.path} cannot be written: {error.strerror}.") from error
            self._ids[sha256] = req_id

    def _read(self) -> None:
        self._file.seek(0)
        text = self._file.read()
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self._ids[entry["sha256"]] = entry["req_id"]
            except (ValueError, KeyError, TypeError):
                continue  # the heading, or a line that was torn when the process was killed
        if text and not text.endswith(b"\n"):
            self._file.write(b"\n")  # so that the next line does not continue the torn one

    def _write(self, entry: dict[str, str]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
