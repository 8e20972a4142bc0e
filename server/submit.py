"""What `mlg submit` does: send pictures to a server, several at a time, and collect the answers.

Called by `commands.py`. Everything goes through the HTTP API, so the server may be anywhere. What the server has
acknowledged stands in a journal (`submissions.py`); a run that was broken off sends only what is missing.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from provider_image.errors import ConfigError
from server.client import Client, Refused
from server.submissions import Submissions
from store.errors import StoreUnavailable

#: Files with these endings are taken from a folder; a file that is named is always taken.
SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"})
#: Uploads and reads in flight.
IN_FLIGHT = 8
#: How long one read asks the server to hold the answer.
HOLD_SECONDS = 5.0
#: Seconds between two reads of one request when the server does not hold it.
POLL_SECONDS = 0.25
#: Seconds between two looks for a Ctrl-C that was dropped.
_LOOK_SECONDS = 0.5
#: States in which nothing more happens by itself.
_FINAL = frozenset({"done", "failed", "cancelled"})
COLUMNS = ("file", "req_id", "status", "rank", "wnid", "label", "probability", "model", "cached", "reason", "code")


@dataclass(kw_only=True)
class Row:
    """What is known of one file; filled in as the run goes on."""

    #: The file as it was named or found.
    file: Path
    #: The server's id; None until it is acknowledged.
    req_id: str | None = None
    #: As the server says it; "waiting" before it was sent, "refused" when the server does not take it.
    status: str = "waiting"
    #: The server's whole answer.
    answer: dict[str, Any] | None = None
    #: Why it failed.
    reason: str | None = None
    code: str | None = None

    @property
    def is_failed(self) -> bool:
        """Tell whether there will be no answer."""
        return self.status in ("refused", "unreadable", "failed", "cancelled")


class Progress(Protocol):
    """What is told while the run goes on."""

    def sent(self, row: Row) -> None:
        """A file was acknowledged, found in the journal, or refused; called in the order of the files."""

    def answered(self, row: Row) -> None:
        """A file's answer is there."""


def find_files(paths: Iterable[Path]) -> list[Path]:
    """List the files that are named, and the images in the folders that are named, in a stable order, each once.

    :raises ConfigError: a path is not there, or there is no image at all.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            inside = (Path(folder) / name for folder, _, names in os.walk(path) for name in names)
            found.update(dict.fromkeys(sorted(file for file in inside if file.suffix.lower() in SUFFIXES)))
        elif path.exists():
            found[path] = None
        else:
            raise ConfigError(f"There is no file or folder {path}.")
    if not found:
        raise ConfigError(f"No image files there. From folders these are taken: {' '.join(sorted(SUFFIXES))}")
    return list(found)


def send_all(rows: Sequence[Row], client: Client, journal: Submissions, *, top: int, progress: Progress) -> None:
    """Send what the server has not acknowledged yet.

    :raises MlgError: the server is away, or takes no picture for this model; what was sent so far is in the journal.
    """
    # Equal files that are in flight at the same time are sent once.
    locks = [threading.Lock() for _ in range(64)]

    def send(row: Row) -> Row:
        try:
            data = row.file.read_bytes()
        except OSError as error:
            row.status, row.reason, row.code = "unreadable", f"cannot be read: {error.strerror}", "unreadable"
            return row
        sha256 = hashlib.sha256(data).hexdigest()
        with locks[int(sha256[:8], 16) % len(locks)]:
            try:
                known = journal.find(sha256)
                if known is None or not _is_known(row, known, client, top):
                    known = client.send(data, os.fsencode(row.file.name).decode("utf-8", "replace"))
                    journal.add(sha256, known)
                    row.status = "queued"
            except Refused as error:
                row.status, row.reason, row.code = "refused", error.reason, error.code
                return row
        row.req_id = known
        return row

    finished: set[int] = set()
    told = 0
    for index, _ in in_parallel(send, rows, client.stopping):
        finished.add(index)
        while told in finished:
            progress.sent(rows[told])
            told += 1


def wait_for_all(rows: Sequence[Row], client: Client, *, top: int, progress: Progress) -> None:
    """Wait for the answers of all that were acknowledged. :raises MlgError: the server is away."""

    def read(row: Row) -> Row:
        assert row.req_id is not None
        while row.status not in _FINAL:
            began = time.monotonic()
            try:
                _take(row, client.read(row.req_id, top=top, hold_seconds=HOLD_SECONDS))
            except Refused as error:
                row.status, row.reason, row.code = "failed", error.reason, error.code
            if row.status not in _FINAL and time.monotonic() - began < HOLD_SECONDS / 2:
                client.stopping.wait(POLL_SECONDS)
        return row

    for _, row in in_parallel(read, [row for row in rows if row.req_id is not None], client.stopping):
        progress.answered(row)


def in_parallel(
    work: Callable[[Row], Row], items: Sequence[Row], stopping: threading.Event
) -> Iterator[tuple[int, Row]]:
    """Run work on each row, IN_FLIGHT at a time, and yield (index, result) as they finish; the first error ends it.

    The threads are daemons: on Ctrl-C nobody waits for their answers from the network.

    :param stopping: set on Ctrl-C. Looked at as well because Python drops a KeyboardInterrupt where it cannot raise it,
        for example in the finaliser of some object.
    :raises KeyboardInterrupt:
    """
    todo: queue.SimpleQueue[tuple[int, Row]] = queue.SimpleQueue()
    for entry in enumerate(items):
        todo.put(entry)
    finished: queue.SimpleQueue[tuple[int, Row] | Exception] = queue.SimpleQueue()
    is_over = threading.Event()

    def loop() -> None:
        while not is_over.is_set():
            try:
                index, item = todo.get_nowait()
            except queue.Empty:
                return
            try:
                finished.put((index, work(item)))
            except Exception as error:  # noqa: BLE001 - the caller's thread raises it
                finished.put(error)
                return

    for _ in range(min(IN_FLIGHT, len(items))):
        threading.Thread(target=loop, name="submit", daemon=True).start()
    try:
        for _ in items:
            outcome = _next(finished, stopping)
            if isinstance(outcome, Exception):
                raise outcome
            yield outcome
    finally:
        is_over.set()


def _next(
    finished: queue.SimpleQueue[tuple[int, Row] | Exception], stopping: threading.Event
) -> tuple[int, Row] | Exception:
    while True:
        try:
            return finished.get(timeout=_LOOK_SECONDS)
        except queue.Empty:
            if stopping.is_set():
                raise KeyboardInterrupt from None


def write_rows(rows: Sequence[Row], out: Path) -> None:
    """Write what is known as .jsonl or .csv; the file is there whole or not at all. :raises StoreUnavailable:"""
    text = io.StringIO(newline="")
    if out.suffix.lower() == ".csv":
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerows(_csv_rows(row))
    else:
        for row in rows:
            text.write(json.dumps(_json_row(row)) + "\n")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            # Names that are not UTF-8 come back as the bytes they were.
            file.write(text.getvalue().encode("utf-8", "surrogateescape"))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StoreUnavailable(f"{out} cannot be written: {error.strerror}.") from error


def check_out(out: Path) -> None:
    """Refuse a results file that could not be written at the end. :raises ConfigError:"""
    if out.suffix.lower() not in (".jsonl", ".csv"):
        raise ConfigError(f"--out takes a name that ends in .jsonl or .csv, not {out.name!r}.")
    if out.is_dir() or not out.absolute().parent.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise ConfigError(f"--out: {out} cannot be written.")


def _is_known(row: Row, req_id: str, client: Client, top: int) -> bool:
    """Ask whether the server still knows an id of an earlier run, and take its answer if it has one."""
    try:
        _take(row, client.read(req_id, top=top))
    except Refused as error:
        if error.code == "unknown_request":
            return False
        raise
    return True


def _take(row: Row, answer: dict[str, Any]) -> None:
    row.answer = answer
    row.status = str(answer.get("status"))
    row.reason, row.code = answer.get("reason"), answer.get("code")


def _json_row(row: Row) -> dict[str, Any]:
    answer = row.answer or {}
    return {
        "file": str(row.file),
        "req_id": row.req_id,
        "status": row.status,
        "preds": answer.get("preds"),
        "reason": row.reason,
        "code": row.code,
        **{name: answer.get(name) for name in ("model", "cached", "digest", "provider", "seconds", "finished_at")},
    }


def _csv_rows(row: Row) -> Iterator[dict[str, Any]]:
    full = _json_row(row)
    shared = {name: full[name] for name in COLUMNS if name in full}
    preds = full["preds"] if isinstance(full["preds"], list) and full["preds"] else [None]
    for rank, pred in enumerate(preds, start=1):
        is_label = isinstance(pred, list) and len(pred) == 3
        labels = dict(zip(("wnid", "label", "probability"), pred, strict=True)) if is_label else {}
        yield {**shared, **labels, "rank": rank if is_label else None}
