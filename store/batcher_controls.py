"""What an operator can tell the batchers: hold, drain, go on, take everything now.

The views and commands of the operator write it, batchers read it; this is the only place that knows how it stands in
the store's controls. It must not wait for batchers: they look by themselves, twice a second.
"""

from __future__ import annotations

import enum
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime

from store.controls import Control, Controls

#: Names of the controls.
PAUSE = "hold"
RUN_NOW = "run_now"
#: Characters of a reason or of a name that are kept.
MAX_TEXT_CHARACTERS = 200


class Mode(enum.StrEnum):
    """How work is held. In both nothing new is claimed, and what is under way is finished."""

    #: For a while; batchers stay as they are.
    PAUSED = "paused"
    #: Before an end: an operator waits until nothing is under way and then stops or updates the batchers.
    DRAINING = "draining"


@dataclass(frozen=True, kw_only=True)
class Pause:
    """That work is held, and by whom."""

    mode: Mode
    #: Who did it, in words for people.
    by: str
    since: datetime
    #: Why, in the operator's words; None if nothing was said.
    reason: str | None = None

    @property
    def notice(self) -> str:
        """Say so in a sentence to those whose requests wait."""
        since = self.since.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        word = "paused" if self.mode is Mode.PAUSED else "being brought to an end"
        why = f": {self.reason}" if self.reason else ""
        return (
            f"Work is {word} since {since} (by {self.by}{why}). What is under way is finished; all else is kept and "
            "waits until the operator lets work go on."
        )


@dataclass(frozen=True, kw_only=True)
class ControlState:
    """All that batchers are told."""

    #: None when they may work.
    pause: Pause | None = None
    #: Changes each time when everything is to be taken now; None if that was never said.
    run_token: str | None = None


def read_control_state(controls: Controls) -> ControlState:
    """Read what batchers are told. :raises StoreError:"""
    found = controls.controls()
    run = found.get(RUN_NOW)
    token = None if run is None else run.value.get("token")
    return ControlState(pause=_to_pause(found.get(PAUSE)), run_token=token if isinstance(token, str) else None)


def pause(controls: Controls, mode: Mode, *, by: str, now: datetime, reason: str | None = None) -> Pause:
    """Have nothing new claimed from now on."""
    said = _clean(reason or "") or None
    control = controls.set_control(PAUSE, {"mode": str(mode), "reason": said}, by=_clean(by) or "somebody", now=now)
    return Pause(mode=mode, by=control.changed_by, since=control.changed_at, reason=said)


def resume(controls: Controls, *, by: str, now: datetime) -> None:
    """Let work go on."""
    controls.set_control(PAUSE, {"mode": None, "reason": None}, by=_clean(by) or "somebody", now=now)


def run_now(controls: Controls, *, by: str, now: datetime) -> str:
    """Have every batcher take everything that waits, due or not. :return: the token that says so."""
    token = secrets.token_hex(8)
    controls.set_control(RUN_NOW, {"token": token}, by=_clean(by) or "somebody", now=now)
    return token


def _to_pause(control: Control | None) -> Pause | None:
    if control is None or control.value.get("mode") not in set(Mode):
        return None
    reason = control.value.get("reason")
    return Pause(
        mode=Mode(control.value["mode"]),
        by=control.changed_by,
        since=control.changed_at,
        reason=reason if isinstance(reason, str) else None,
    )


def _clean(text: str) -> str:
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())[:MAX_TEXT_CHARACTERS]
