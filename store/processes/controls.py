"""Controls: what an operator tells all batchers of a home: pause, drain, resume, claim everything now.

The operator's views and commands write them, every batcher reads them about twice a second; a write does not wait for
batchers. A control is a row of the table `controls`, not a queue: a new value replaces the old one, and a batcher that
did not read in between never sees the old one.
"""

from __future__ import annotations

import builtins
import enum
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from store.database import Database, Transaction
from store.rows import from_row, to_text

#: Names of the controls.
PAUSE = "hold"
RUN_NOW = "run_now"
#: Characters of a reason or name that are kept.
MAX_TEXT_CHARACTERS = 200

_SET = """
    INSERT INTO controls (name, value, changed_at, changed_by) VALUES (:name, :value, :now, :by)
    ON CONFLICT (name) DO UPDATE
    SET value = excluded.value, changed_at = excluded.changed_at, changed_by = excluded.changed_by
    RETURNING name, value, changed_at, changed_by
"""

_ALL = "SELECT name, value, changed_at, changed_by FROM controls ORDER BY name"


@dataclass(frozen=True, kw_only=True)
class Control:
    """One value, and who set it."""

    name: str
    value: Mapping[str, Any]
    changed_at: datetime
    changed_by: str


class Mode(enum.StrEnum):
    """How work is paused. In both modes nothing new is claimed, and chunks in progress are finished."""

    #: Temporarily; batchers keep running.
    PAUSED = "paused"
    #: Before a stop: an operator waits until nothing is in progress and then stops or updates the batchers.
    DRAINING = "draining"


@dataclass(frozen=True, kw_only=True)
class Pause:
    """Why and since when work is paused, and by whom."""

    mode: Mode
    by: str
    since: datetime
    reason: str | None = None

    @property
    def notice(self) -> str:
        """A sentence for clients whose requests wait."""
        since = self.since.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        word = "paused" if self.mode is Mode.PAUSED else "being drained"
        why = f": {self.reason}" if self.reason else ""
        return (
            f"Work is {word} since {since} (by {self.by}{why}). Requests in progress are finished; all others are kept "
            "and wait until the operator resumes work."
        )


@dataclass(frozen=True, kw_only=True)
class ControlState:
    """The current values of all controls."""

    #: None when they may work.
    pause: Pause | None = None
    #: Changes each time when batchers are to claim everything now; None before the first time.
    run_token: str | None = None


class Controls:
    """The named values."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def state(self) -> ControlState:
        """Read the current values. :raises StoreError:"""
        found = {control.name: control for control in self.list()}
        token = found[RUN_NOW].value.get("token") if RUN_NOW in found else None
        pause = _to_pause(found[PAUSE]) if PAUSE in found else None
        return ControlState(pause=pause, run_token=token if isinstance(token, str) else None)

    def pause(self, mode: Mode, *, by: str, now: datetime, reason: str | None = None) -> Pause:
        """Stop all batchers from claiming anything new."""
        value = {"mode": str(mode), "reason": _clean(reason or "") or None}
        pause = _to_pause(self.set(PAUSE, value, by=by, now=now))
        assert pause is not None
        return pause

    def resume(self, *, by: str, now: datetime) -> None:
        """Let batchers claim again."""
        self.set(PAUSE, {"mode": None, "reason": None}, by=by, now=now)

    def run_now(self, *, by: str, now: datetime) -> str:
        """Have every batcher claim everything that is queued, due or not. :return: the new token."""
        token = secrets.token_hex(8)
        self.set(RUN_NOW, {"token": token}, by=by, now=now)
        return token

    def set(self, name: str, value: Mapping[str, Any], *, by: str, now: datetime) -> Control:
        """Replace the value of a control; return when it is durable."""
        row = {
            "name": name,
            "value": json.dumps(value, ensure_ascii=False),
            "now": to_text(now),
            "by": _clean(by) or "somebody",
        }

        def write(transaction: Transaction) -> Control:
            (changed,) = transaction.execute(_SET, row).fetchall()
            return from_row(Control, changed)

        return self._database.write(write)

    def list(self) -> builtins.list[Control]:
        """List all controls that were ever set, at one moment."""
        return self._database.records(Control, _ALL)


def _to_pause(control: Control) -> Pause | None:
    mode, reason = control.value.get("mode"), control.value.get("reason")
    if mode not in set(Mode):
        return None
    reason = reason if isinstance(reason, str) else None
    return Pause(mode=Mode(mode), by=control.changed_by, since=control.changed_at, reason=reason)


def _clean(text: str) -> str:
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())[:MAX_TEXT_CHARACTERS]
