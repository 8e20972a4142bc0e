"""What a provider that misbehaves does to an activity: which faults strike a command, and spoilt results files.

Used by `exe_unit.py`, which asks before each deploy and around each run. Results files that are spoilt stay well
formed where a lie is meant and not an accident, so that only whoever compares what they say notices.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.archive import add, add_json, atomic_zip
from provider_image.errors import MalformedResults
from provider_image.schemas import check_results

if TYPE_CHECKING:
    from devnet.faults import Faults
    from devnet.scenario import Fault

log = logging.getLogger(__name__)

#: Instead of a run, the first that strikes; not even asked about the others then.
FAULTS_BEFORE_RUN = ("die", "vanish-http", "hang", "exit-nonzero")
#: Done to the files that a run has written.
FAULTS_AFTER_RUN = ("swap-results", "wrong-digest", "garbage", "truncate", "oversize")
#: What an oversized file has; only on paper, because the rest is a hole.
OVERSIZE_BYTES = 200_000_000
#: Answers that are remembered, to be given again where they do not belong.
_MAX_SAVED_ANSWERS = 4
_MAX_GARBAGE_BYTES = 1024 * 1024


class FaultInjector:
    """The faults of one provider, as far as its activities have them.

    :param provider_name: the provider's name.
    :param answers: a folder in which all providers remember what they answered; must be on the activities' disk.
    """

    def __init__(self, provider_name: str, faults: Faults, answers: Path) -> None:
        self._provider_name, self._faults, self._answers = provider_name, faults, answers

    def deploy_fails(self) -> bool:
        """Tell whether this deploy fails."""
        return self._faults.triggers(self._provider_name, "fail-deploy") is not None

    def fault_before_run(self) -> Fault | None:
        """Return what happens instead of this run, if anything."""
        return self._first_triggered(FAULTS_BEFORE_RUN)

    def corrupt(self, files: Iterable[Path]) -> None:
        """Do to the files that a run has written what is due; remember them otherwise."""
        fault = self._first_triggered(FAULTS_AFTER_RUN)
        for file in files:
            if fault is None:
                self._save_answer(file)
            else:
                log.info("%s: %s of %s", self._provider_name, fault.kind, file.name)
                _CORRUPTIONS.get(fault.kind, self._swap)(file)

    def _first_triggered(self, kinds: Iterable[str]) -> Fault | None:
        for kind in kinds:
            fault = self._faults.triggers(self._provider_name, kind)
            if fault is not None:
                return fault
        return None

    def _save_answer(self, file: Path) -> None:
        document = _read_results(file)
        if document is None:
            return
        self._answers.mkdir(exist_ok=True)
        saved = self._answers / f"{document['chunk_id']}.zip"
        saved.unlink(missing_ok=True)
        # The file will be replaced and never changed, so a second name for it keeps it without a copy.
        os.link(file, saved)
        by_age = sorted(self._answers.glob("*.zip"), key=lambda path: path.stat().st_mtime_ns)
        for path in by_age[:-_MAX_SAVED_ANSWERS]:
            path.unlink(missing_ok=True)

    def _swap(self, file: Path) -> None:
        """Put another chunk's answers in the place of these; if there are none, say that these are another's."""
        document = _read_results(file)
        chunk_id = document["chunk_id"] if document is not None else ""
        for other in self._answers.glob("*.zip"):
            if other.stem != chunk_id:
                _replace(file, other.read_bytes())
                return
        _rewrite_results(file, chunk_id=hashlib.sha256(chunk_id.encode()).hexdigest()[:32])


def _read_results(file: Path) -> dict[str, Any] | None:
    """Read a file's results.json; None if it is no results file."""
    try:
        with zipfile.ZipFile(file) as archive:
            document: dict[str, Any] = json.loads(archive.read("results.json"))
        check_results(document)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, MalformedResults):
        return None
    return document


def _rewrite_results(file: Path, **changes: str) -> None:
    """Say something else in a results file; nothing happens to other files."""
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
    """Write a file anew: under its other names, if it has any, the old one stays."""
    file.unlink()
    file.write_bytes(data)


def _garbage(file: Path) -> None:
    _replace(file, os.urandom(min(max(file.stat().st_size, 1), _MAX_GARBAGE_BYTES)))


def _truncate(file: Path) -> None:
    data = file.read_bytes()
    _replace(file, data[: len(data) // 2])


def _oversize(file: Path) -> None:
    _replace(file, file.read_bytes())
    os.truncate(file, OVERSIZE_BYTES)


def _wrong_digest(file: Path) -> None:
    _rewrite_results(file, digest=hashlib.sha256(b"another model").hexdigest())


_CORRUPTIONS: dict[str, Callable[[Path], None]] = {
    "garbage": _garbage,
    "truncate": _truncate,
    "oversize": _oversize,
    "wrong-digest": _wrong_digest,
}
