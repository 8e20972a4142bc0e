"""Trainings: the tables `trainings` and `training_examples`.

The server adds, reads and cancels. A batcher looks for one whose features are there (`find_ready`) and starts a process
for it (`trainer/__main__.py`), which claims it, writes its progress, and ends it. That process holds a file lock, by
which others tell whether it still runs: one that was killed leaves a training that any batcher may start again
(`release_lost`). The token of a claim keeps an earlier process from writing.

A name belongs to the key that trained it first. It counts the finished trainings of a name, which are its versions, and
keeps the last MAX_VERSIONS of them.
"""

from __future__ import annotations

import builtins
import functools
import json
import sqlite3
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from provider_image.models.catalogue import normalise_name
from store.database import Database, Transaction
from store.processes.process_lock import ProcessLock
from store.rows import from_row, insert_sql, to_row, to_text
from store.trainings.files import INPUT, LEFTOVER_SECONDS, TrainingFiles
from store.trainings.records import (
    ANY_RIGHTS,
    NameTaken,
    TooManyModels,
    TooManyTrainings,
    TrainingEnded,
    TrainingExample,
    TrainingInProgress,
    TrainingRecord,
    TrainingRights,
    UnknownTraining,
)

#: Finished trainings of a name that are kept.
MAX_VERSIONS = 10
#: Trainings of one key that have not ended.
MAX_UNFINISHED = 8
#: A training fails when its process has ended so often before it had finished.
MAX_FAILURES = 3
#: Examples that one commit adds.
_EXAMPLES_PER_COMMIT = 500

_GET = "SELECT * FROM trainings WHERE id = ?"

_OF_NAME = "name_key = :name_key AND state IN ('waiting_for_features', 'fitting', 'done')"

_OTHERS_OF_NAME = f"""
    SELECT 1 FROM trainings WHERE {_OF_NAME}
    AND (name != :name OR (key_id IS NULL AND NOT :may_take) OR (key_id IS NOT NULL AND key_id IS NOT :key_id)) LIMIT 1
"""

_COUNT_UNFINISHED = """
    SELECT count(*) FROM trainings WHERE key_id IS ? AND state IN ('waiting_for_features', 'fitting')
"""

_COUNT_NAMES = """
    SELECT count(DISTINCT name_key) FROM trainings
    WHERE key_id IS :key_id AND name_key != :name_key AND state IN ('waiting_for_features', 'fitting', 'done')
"""

_ADD_EXAMPLE = """
    INSERT INTO training_examples (training_id, position, request_id, name, label, target)
    VALUES (:training_id, :position, :request_id, :name, :label, :target)
"""

_HAS_FEATURES = """
    (batch_id IS NULL OR NOT EXISTS (SELECT 1 FROM requests INDEXED BY requests_batch_progress
                                     WHERE batch_id = trainings.batch_id AND state IN ('queued', 'claimed')))
"""

_FIND_READY = f"""
    SELECT id FROM trainings WHERE state = 'waiting_for_features' AND {_HAS_FEATURES} ORDER BY number LIMIT 1
"""

_CLAIM = f"""
    UPDATE trainings SET state = 'fitting', token = token + 1, worker = :worker, started_at = :now, step = NULL
    WHERE id = :id AND state = 'waiting_for_features' AND {_HAS_FEATURES} RETURNING *
"""

_SET_STEP = "UPDATE trainings SET step = :step WHERE id = :id AND token = :token AND state = 'fitting'"

_FINISH = """
    UPDATE trainings
    SET state = 'done', step = NULL, worker = NULL, figures = :figures, files = :files, digest = :digest,
        ended_at = :now, code = NULL, reason = NULL,
        version = 1 + (SELECT coalesce(max(version), 0) FROM trainings AS others
                       WHERE others.name_key = trainings.name_key)
    WHERE id = :id AND token = :token AND state = 'fitting' RETURNING name_key, version
"""

_FAIL = """
    UPDATE trainings
    SET state = 'failed', step = NULL, worker = NULL, code = :code, reason = :reason, ended_at = :now
    WHERE id = :id AND token = :token AND state = 'fitting'
"""

_FITTING = "SELECT id, token, worker FROM trainings WHERE state = 'fitting'"

_RELEASE = """
    UPDATE trainings SET state = 'waiting_for_features', step = NULL, worker = NULL
    WHERE id = :id AND token = :token AND state = 'fitting'
"""

_CANCEL = """
    UPDATE trainings SET state = 'cancelled', step = NULL, worker = NULL, ended_at = :now
    WHERE id = :id AND state IN ('waiting_for_features', 'fitting')
"""

_TOO_OLD = f"""
    SELECT id FROM trainings WHERE name_key = ? AND state = 'done' ORDER BY number DESC LIMIT -1 OFFSET {MAX_VERSIONS}
"""

_EXPIRED = "SELECT id FROM trainings WHERE state IN ('failed', 'cancelled') AND ended_at < ?"


def _to_record(row: Any) -> TrainingRecord:
    figures, files = (json.loads(row[name] or "{}") for name in ("figures", "files"))
    return from_row(TrainingRecord, row, figures=figures, files=files)


class Trainings:
    """The trainings, their examples and files."""

    def __init__(self, database: Database, folder: Path) -> None:
        self._database = database
        self._process = ProcessLock(database.path.parent / "locks")
        self.files = TrainingFiles(folder)

    def close(self) -> None:
        """Give back what this process has claimed."""
        self._process.release()

    def add(
        self,
        training: TrainingRecord,
        examples: Sequence[TrainingExample] = (),
        *,
        table: bytes | None = None,
        rights: TrainingRights = ANY_RIGHTS,
    ) -> TrainingRecord:
        """Add a training; return when it is durable.

        :param examples: of images; the requests for their features must have been added.
        :param table: the table or the texts.
        :raises NameTaken: :raises TooManyTrainings: :raises TooManyModels: :raises StoreError: nothing is left behind.
        """
        name_key = normalise_name(training.name)
        row = to_row(training, name_key=name_key, examples=training.examples or len(examples))
        del row["number"]

        def write(transaction: Transaction) -> TrainingRecord:
            self._check(transaction.connection, training, rights)
            transaction.execute(f"INSERT INTO {insert_sql('trainings', row)}", row)
            return _to_record(transaction.execute(_GET, (training.id,)).fetchone())

        try:
            if table is not None:
                self.files.write(training.id, INPUT, table)
            for start in range(0, len(examples), _EXAMPLES_PER_COMMIT):
                part = [to_row(one, training_id=training.id) for one in examples[start : start + _EXAMPLES_PER_COMMIT]]
                self._database.write(functools.partial(_add_examples, part))
            return self._database.write(write)
        except BaseException:
            self._forget(training.id)
            raise

    def check(self, training: TrainingRecord, rights: TrainingRights) -> None:
        """Check whether a training could be added, as `add` does, before its examples are.

        :raises NameTaken: :raises TooManyTrainings: :raises TooManyModels:
        """
        with self._database.read() as connection:
            self._check(connection, training, rights)

    @staticmethod
    def _check(connection: sqlite3.Connection, training: TrainingRecord, rights: TrainingRights) -> None:
        values = {
            **_name_values(training.name),
            "name": training.name,
            "key_id": training.key_id,
            "may_take": rights.is_operator,
        }
        if connection.execute(_OTHERS_OF_NAME, values).fetchone() is not None:
            raise NameTaken()
        if connection.execute(_COUNT_UNFINISHED, (training.key_id,)).fetchone()[0] >= MAX_UNFINISHED:
            raise TooManyTrainings()
        most = rights.max_models
        if most is not None and connection.execute(_COUNT_NAMES, values).fetchone()[0] >= most:
            raise TooManyModels()

    def get(self, id: str) -> TrainingRecord:
        """Read one training. :raises UnknownTraining:"""
        row = self._database.row(_GET, (id,))
        if row is None:
            raise UnknownTraining()
        return _to_record(row)

    def list(
        self, *, key_id: str | None = None, before: int | None = None, limit: int = 50
    ) -> builtins.list[TrainingRecord]:
        """List trainings, newest first.

        :param key_id: only those of this key.
        :param before: only lower numbers.
        """
        conditions = ["1", *(["key_id = :key_id"] if key_id is not None else [])]
        conditions += ["number < :before"] if before is not None else []
        rows = self._database.rows(
            f"SELECT * FROM trainings WHERE {' AND '.join(conditions)} ORDER BY number DESC LIMIT :limit",
            {"key_id": key_id, "before": before, "limit": limit},
        )
        return [_to_record(row) for row in rows]

    def is_trained(self, name: str) -> bool:
        """Tell whether a model of this name was trained, or is being trained."""
        return self._database.row(f"SELECT 1 FROM trainings WHERE {_OF_NAME} LIMIT 1", _name_values(name)) is not None

    def names(self) -> builtins.list[str]:
        """List the names of the models that were trained."""
        return [
            name
            for (name,) in self._database.rows("SELECT DISTINCT name FROM trainings WHERE state = 'done' ORDER BY name")
        ]

    def versions(self, name: str) -> builtins.list[TrainingRecord]:
        """List the finished trainings of a name, newest first."""
        rows = self._database.rows(
            "SELECT * FROM trainings WHERE name_key = :name_key AND state = 'done' ORDER BY number DESC",
            _name_values(name),
        )
        return [_to_record(row) for row in rows]

    def examples(self, id: str) -> builtins.list[TrainingExample]:
        """List the examples of a training, in order."""
        return self._database.records(
            TrainingExample, "SELECT * FROM training_examples WHERE training_id = ? ORDER BY position", (id,)
        )

    # For the processes that fit

    def find_ready(self) -> str | None:
        """Return the id of the oldest training that can be fitted; None if there is none."""
        row = self._database.row(_FIND_READY)
        return None if row is None else str(row[0])

    def claim(self, id: str, *, now: datetime) -> TrainingRecord | None:
        """Claim a training for as long as this process runs.

        :return: None if it cannot be fitted, for example because another process was first.
        """
        worker = self._process.acquire()

        def write(transaction: Transaction) -> TrainingRecord | None:
            row = transaction.execute(_CLAIM, {"id": id, "worker": worker, "now": to_text(now)}).fetchone()
            return None if row is None else _to_record(row)

        return self._database.write(write)

    def set_step(self, training: TrainingRecord, step: str) -> bool:
        """Record what the process does now. :return: False: the claim ended, or the training was cancelled."""
        return bool(self._database.execute(_SET_STEP, {**_claim_of(training), "step": step}))

    def finish(
        self,
        training: TrainingRecord,
        *,
        digest: str,
        figures: Mapping[str, Any],
        files: Mapping[str, str],
        now: datetime,
    ) -> bool:
        """Record the result of a claimed training, and delete the oldest versions of its name. :return: as `set_step`.

        :param files: name of each file, which was written -> its media type.
        """
        values = {
            **_claim_of(training),
            "digest": digest,
            "figures": json.dumps(figures, ensure_ascii=False),
            "files": json.dumps(dict(files)),
            "now": to_text(now),
        }

        def write(transaction: Transaction) -> builtins.list[str] | None:
            row = transaction.execute(_FINISH, values).fetchone()
            return None if row is None else [id for (id,) in transaction.execute(_TOO_OLD, (row["name_key"],))]

        too_old = self._database.write(write)
        if too_old is not None:
            self.files.remove_input(training.id)
            for id in too_old:
                self._forget(id)
        return too_old is not None

    def fail(self, training: TrainingRecord, *, code: str, reason: str, now: datetime) -> bool:
        """Record that a claimed training has failed. :return: as `set_step`."""
        values = {**_claim_of(training), "code": code, "reason": reason, "now": to_text(now)}
        is_changed = bool(self._database.execute(_FAIL, values))
        if is_changed:
            self.files.remove_input(training.id)
        return is_changed

    def release_lost(self) -> builtins.list[str]:
        """Give back the trainings whose processes have ended. :return: their ids."""
        lost = [row for row in self._database.rows(_FITTING) if not self._process.is_alive(row["worker"])]
        for row in lost:
            self._database.execute(_RELEASE, {"id": row["id"], "token": row["token"]})
        return [row["id"] for row in lost]

    def count_failure(self, id: str, *, reason: str, now: datetime, is_last: bool = False) -> None:
        """Count that the process of a training ended by itself before it had finished; the last time, it fails.

        :param reason: what happened and what to do, if it is the last time.
        :param is_last: another process would end in the same way.
        """

        def write(transaction: Transaction) -> None:
            values = {"id": id, "reason": reason, "now": to_text(now), "most": 0 if is_last else MAX_FAILURES}
            transaction.execute("UPDATE trainings SET failures = failures + 1 WHERE id = :id", values)
            transaction.execute(
                "UPDATE trainings SET state = 'failed', step = NULL, worker = NULL, code = 'trainer_died', "
                "reason = :reason, ended_at = :now WHERE id = :id AND failures >= :most "
                "AND state IN ('waiting_for_features', 'fitting')",
                values,
            )

        self._database.write(write)

    # Ending

    def cancel(self, id: str, *, now: datetime) -> TrainingRecord:
        """Cancel a training that has not ended. :raises UnknownTraining: :raises TrainingEnded:"""

        def write(transaction: Transaction) -> TrainingRecord:
            is_changed = transaction.execute(_CANCEL, {"id": id, "now": to_text(now)}).rowcount
            row = transaction.execute(_GET, (id,)).fetchone()
            if row is None:
                raise UnknownTraining()
            if not is_changed:
                raise TrainingEnded()
            return _to_record(row)

        cancelled = self._database.write(write)
        self.files.remove_input(id)
        return cancelled

    def remove(self, id: str) -> None:
        """Delete a training that has ended, with its files; the model stays.

        :raises UnknownTraining: :raises TrainingInProgress:
        """
        if not self.get(id).state.is_final:
            raise TrainingInProgress()
        self._forget(id)

    def purge(self, *, before: datetime) -> int:
        """Delete the trainings that failed or were cancelled before a time, and what killed processes left.

        :return: how many folders were left.
        """
        for (id,) in self._database.rows(_EXPIRED, (to_text(before),)):
            self._forget(id)
        known = {id for (id,) in self._database.rows("SELECT id FROM trainings")}
        with self._database.read() as connection:
            orphans = [
                id
                for (id,) in connection.execute("SELECT DISTINCT training_id FROM training_examples")
                if id not in known and _age_seconds(id) > LEFTOVER_SECONDS
            ]
        for id in orphans:
            self._forget(id)
        return self.files.sweep(known.__contains__)

    def _forget(self, id: str) -> None:
        def write(transaction: Transaction) -> None:
            transaction.execute("DELETE FROM trainings WHERE id = ?", (id,))
            transaction.execute("DELETE FROM training_examples WHERE training_id = ?", (id,))

        self._database.write(write)
        self.files.remove(id)


def _add_examples(rows: Sequence[Mapping[str, Any]], transaction: Transaction) -> None:
    transaction.execute_many(_ADD_EXAMPLE, rows)


def _name_values(name: str) -> dict[str, str]:
    return {"name_key": normalise_name(name)}


def _claim_of(training: TrainingRecord) -> dict[str, Any]:
    return {"id": training.id, "token": training.token}


def _age_seconds(id: str) -> float:
    """Return the age of an id, which begins with its time; see `store.new_id`."""
    return time.time() - int(id[:12], 16) / 1000
