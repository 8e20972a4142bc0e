"""The journal of `mlg submit`: which images a server has acknowledged, so that an interrupted run can be continued.

One file of JSON lines for each (url, model) in `home/submissions/`; each step is durable before the next begins.
Acknowledged images are identified by the hash of their bytes, so files may be moved between two runs. A batch is
recorded with its idempotency key before it is sent, so that a run that was interrupted before the answer can send the
same batch again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from store.errors import StoreUnavailable


@dataclass(frozen=True, kw_only=True)
class SentBatch:
    """Images that are sent together under one idempotency key."""

    key: str
    #: sha256 of an image -> absolute path of its file, in the order of sending.
    files: Mapping[str, str]


class SubmitJournal:
    """The acknowledged images of one server and model; a context manager.

    :raises StoreUnavailable: the file cannot be read or written; every method that writes raises it too.
    """

    def __init__(self, home: Path, url: str, model: str) -> None:
        name = sha256(f"{url}\n{model}".encode()).hexdigest()[:16]
        self.path = home / "submissions" / f"{name}.jsonl"
        #: The last batch, if no answer to it was recorded.
        self.unfinished: SentBatch | None = None
        self._ids: dict[str, str] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
            self._file = self.path.open("ab+")
            self._read()
        except OSError as error:
            raise self._unwritable(error) from error
        if self._file.tell() == 0:
            self._write([{"url": url, "model": model}])

    def __enter__(self) -> SubmitJournal:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def find(self, sha256: str) -> str | None:
        """Return the request id that the server gave to these bytes; None if it has not acknowledged them."""
        return self._ids.get(sha256)

    def begin(self, batch: SentBatch) -> None:
        """Record a batch that is about to be sent; durable on return."""
        self._write([{"key": batch.key, "files": dict(batch.files)}])

    def finish(self, batch: SentBatch, ids: Mapping[str, str]) -> None:
        """Record what the server acknowledged of a batch; durable on return. :param ids: sha256 -> request id."""
        acknowledged = [{"sha256": sha256, "req_id": req_id} for sha256, req_id in ids.items()]
        self._write([*acknowledged, {"finished": batch.key}])
        self._ids.update(ids)

    def _read(self) -> None:
        self._file.seek(0)
        text = self._file.read()
        for line in text.splitlines():
            try:
                self._add(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # the header, or a line that is incomplete because the process was killed
        if text and not text.endswith(b"\n"):
            self._file.write(b"\n")  # so that the next entry starts on a line of its own

    def _add(self, entry: dict[str, Any]) -> None:
        if "files" in entry:
            self.unfinished = SentBatch(key=entry["key"], files=dict(entry["files"]))
        elif "finished" in entry:
            self.unfinished = None
        else:
            self._ids[entry["sha256"]] = entry["req_id"]

    def _write(self, entries: Iterable[Mapping[str, Any]]) -> None:
        try:
            self._file.write(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> StoreUnavailable:
        return StoreUnavailable(f"The journal {self.path} cannot be written: {error.strerror}.")
