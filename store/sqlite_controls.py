"""The controls on SQLite: one row each.

A base of `SqliteStore`, which gives it the writer and the readers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from store.controls import Control
from store.database import ReaderPool, Transaction, Writer
from store.records import from_text, to_text

_SET = """
    INSERT INTO controls (name, value, changed_at, changed_by) VALUES (:name, :value, :now, :by)
    ON CONFLICT (name) DO UPDATE
    SET value = excluded.value, changed_at = excluded.changed_at, changed_by = excluded.changed_by
    RETURNING name, value, changed_at, changed_by
"""

_ALL = "SELECT name, value, changed_at, changed_by FROM controls ORDER BY name"


class SqliteControls:
    """What the operator says, in the table `controls`."""

    _writer: Writer
    _readers: ReaderPool

    def set_control(self, name: str, value: Mapping[str, Any], *, by: str, now: datetime) -> Control:
        """See Controls.set_control."""
        row = {"name": name, "value": json.dumps(dict(value), ensure_ascii=False), "now": to_text(now), "by": by}

        def write(transaction: Transaction) -> Control:
            (changed,) = transaction.execute(_SET, row).fetchall()
            return _control(changed)

        control: Control = self._writer.run(write)
        return control

    def controls(self) -> dict[str, Control]:
        """See Controls.controls."""
        with self._readers.connection() as connection:
            rows = connection.execute(_ALL).fetchall()
        return {row["name"]: _control(row) for row in rows}


def _control(row: Any) -> Control:
    return Control(
        name=row["name"],
        value=json.loads(row["value"]),
        changed_at=from_text(row["changed_at"]),
        changed_by=row["changed_by"],
    )
