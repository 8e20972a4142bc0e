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
_MAX_GARBAGE_BYTES = 1024 * 1024


class FaultInjector:
    """Injects the faults of one provider."""

    def __init__(self, provider_name: str, faults: FaultSchedule) -> None:
        self._provider_name = provider_name
        self._fault = functools.partial(faults.triggers, provider_name)

    def first(self, *kinds: str) -> Fault | None:
        """Return the first fault that occurs now. It ends the search, so the other kinds do not count an occasion."""
        return next(filter(None, map(self._fault, kinds)), None)

    def corrupt(self, files: Iterable[Path]) -> None:
        """Corrupt the files that a run has written, if a fault occurs."""
        fault = self.first(*FAULTS_AFTER_RUN)
        if fault is not None:
            for file in files:
                log.info("%s: %s of %s", self._provider_name, fault.kind, file.name)
                _corrupt(file, fault.kind)


def _corrupt(file: Path, kind: str) -> None:
    size = file.stat().st_size
    if kind == "garbage":
        file.write_bytes(os.urandom(min(max(size, 1), _MAX_GARBAGE_BYTES)))
    elif kind == "truncate":
        os.truncate(file, size // 2)
    elif kind == "oversize":
        os.truncate(file, OVERSIZE_BYTES)
    elif kind == "wrong-digest":
        _rewrite_results(file, digest=hashlib.sha256(b"another model").hexdigest())
    else:
        _rewrite_results(file, chunk_id=hashlib.sha256(b"another chunk").hexdigest()[:32])


def _rewrite_results(file: Path, **changes: str) -> None:
    """Change fields of results.json in a results file; other files stay as they are."""
    try:
        with zipfile.ZipFile(file) as archive:
            others = {name: archive.read(name) for name in archive.namelist() if name != "results.json"}
            document = json.loads(archive.read("results.json"))
        check_results(document)
    except (KeyError, ValueError, zipfile.BadZipFile, MalformedResults):
        return  # it is not a results file
    with atomic_zip(file) as archive:
        for name, data in others.items():
            add(archive, name, data)
        add_json(archive, "results.json", {**document, **changes}, MalformedResults)
