"""The journal of `mlg submit`: which images a server has acknowledged, so that a broken run can go on.

One file for each (url, model) in `home/submissions/`, lines of JSON, on the disk before the next step. Acknowledged
images are keyed by their bytes, not their names: files may be moved between two runs. A batch is noted before it is
sent, with its idempotency key, so that a run that broke before the answer can have the very same batch answered again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

from store.errors import StoreUnavailable


@dataclass(frozen=True, kw_only=True)
class SentBatch:
    """Images that are sent together under one idempotency key."""

    key: str
    #: sha256 of an image -> its file, as an absolute path, in the order of sending.
    files: Mapping[str, str]


class SubmitJournal:
    """The acknowledged images of one server and model; a context manager. :raises StoreUnavailable:"""

    def __init__(self, home: Path, url: str, model: str) -> None:
        name = sha256(f"{url}\n{model}".encode()).hexdigest()[:16]
        self.path = home / "submissions" / f"{name}.jsonl"
        #: The batch that was sent last, if its answer was not noted.
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def find(self, sha256: str) -> str | None:
        """Return the id under which the server acknowledged these bytes, None if it did not."""
        return self._ids.get(sha256)

    def begin(self, batch: SentBatch) -> None:
        """Note a batch that is about to be sent; durable on return. :raises StoreUnavailable:"""
        self._write([{"key": batch.key, "files": dict(batch.files)}])

    def finish(self, batch: SentBatch, ids: Mapping[str, str]) -> None:
        """Note what the server acknowledged of a batch; durable on return.

        :param ids: sha256 -> request id.
        :raises StoreUnavailable:
        """
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
                continue  # the heading, or a line that was torn when the process was killed
        if text and not text.endswith(b"\n"):
            self._file.write(b"\n")  # so that the next line does not continue the torn one

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
