"""Faults of a provider in an activity: failing commands and corrupted output files.

Used by `exe_unit.py` before each deploy, and before and after each run. The faults wrong-digest and swap-results leave
the results file well-formed, so that only a check of its content detects them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from devnet.scenario import Fault, FaultSchedule
from provider_image.archive import add, add_json, atomic_zip
from provider_image.errors import MalformedResults
from provider_image.schemas import check_results

log = logging.getLogger(__name__)

#: Kinds that replace a run.
FAULTS_BEFORE_RUN = ("die", "vanish-http", "hang", "exit-nonzero")
#: Kinds that corrupt the files that a run has written.
FAULTS_AFTER_RUN = ("swap-results", "wrong-digest", "garbage", "truncate", "oversize")
#: Size of an oversized file; most of it is a hole.
OVERSIZE_BYTES = 200_000_000
#: Number of correct results files that are saved for the fault swap-results.
_MAX_SAVED_RESULTS = 4
_MAX_GARBAGE_BYTES = 1024 * 1024


class FaultInjector:
    """Injects the faults of one provider. All providers save correct results files in one folder, by hard links."""

    def __init__(self, provider_name: str, faults: FaultSchedule, saved_results: Path) -> None:
        self._provider_name, self._saved_results = provider_name, saved_results
        self._fault = functools.partial(faults.triggers, provider_name)

    def first(self, *kinds: str) -> Fault | None:
        """Return the first fault that occurs now. It ends the search, so the other kinds do not count an occasion."""
        return next(filter(None, map(self._fault, kinds)), None)

    def corrupt(self, files: Iterable[Path]) -> None:
        """Corrupt the files that a run has written if a fault occurs; save correct results files otherwise."""
        fault = self.first(*FAULTS_AFTER_RUN)
        for file in files:
            if fault is None:
                self._save_results(file)
            else:
                log.info("%s: %s of %s", self._provider_name, fault.kind, file.name)
                self._corrupt(file, fault.kind)

    def _corrupt(self, file: Path, kind: str) -> None:
        data = file.read_bytes()
        if kind == "garbage":
            _replace(file, os.urandom(min(max(len(data), 1), _MAX_GARBAGE_BYTES)))
        elif kind == "truncate":
            _replace(file, data[: len(data) // 2])
        elif kind == "oversize":
            _replace(file, data)
            os.truncate(file, OVERSIZE_BYTES)
        elif kind == "wrong-digest":
            _rewrite_results(file, digest=hashlib.sha256(b"another model").hexdigest())
        else:
            self._swap(file)

    def _save_results(self, file: Path) -> None:
        document = _read_results(file)
        if document is None:
            return
        self._saved_results.mkdir(exist_ok=True)
        saved = self._saved_results / f"{document['chunk_id']}.zip"
        saved.unlink(missing_ok=True)
        # A hard link is enough, because files are replaced and never changed.
        os.link(file, saved)
        by_age = sorted(self._saved_results.glob("*.zip"), key=lambda path: path.stat().st_mtime_ns)
        for path in by_age[:-_MAX_SAVED_RESULTS]:
            path.unlink(missing_ok=True)

    def _swap(self, file: Path) -> None:
        """Replace results by those of another chunk; if there are none, change the chunk's id in them."""
        document = _read_results(file)
        chunk_id = document["chunk_id"] if document is not None else ""
        for other in self._saved_results.glob("*.zip"):
            if other.stem != chunk_id:
                _replace(file, other.read_bytes())
                return
        _rewrite_results(file, chunk_id=hashlib.sha256(chunk_id.encode()).hexdigest()[:32])


def _read_results(file: Path) -> dict[str, Any] | None:
    """Return results.json of a results file; None if the file is not one."""
    try:
        with zipfile.ZipFile(file) as archive:
            document: dict[str, Any] = json.loads(archive.read("results.json"))
        check_results(document)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, MalformedResults):
        return None
    return document


def _rewrite_results(file: Path, **changes: str) -> None:
    """Change fields of results.json in a results file; other files stay as they are."""
    document = _read_results(file)
    if document is None:
        return
    with zipfile.ZipFile(file) as archive:
        others = {name: archive.read(name) for name in archive.namelist() if name != "results.json"}
    with atomic_zip(file) as archive:
        for name, data in others.items():
            add(archive, name, data)
        add_json(archive, "results.json", {**document, **changes}, MalformedResults)


def _replace(file: Path, data: bytes) -> None:
    """Write a new file in the place of one; hard links keep the old one."""
    file.unlink()
    file.write_bytes(data)
