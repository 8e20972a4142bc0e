"""The controls: what an operator tells all batchers of a home, in a few named values.

Written by the operator's views and commands through `store/batcher_controls.py`, which knows what the values mean; read
by every batcher, several times in a few seconds. A control is not a queue: a new value replaces the old one, and
whoever was not looking in between never learns of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class Control:
    """One value, and who gave it."""

    #: What it is called.
    name: str
    #: What it says; JSON.
    value: Mapping[str, Any]
    changed_at: datetime
    #: Who changed it, in words for people.
    changed_by: str


class Controls(Protocol):
    """What the operator says."""

    def set_control(self, name: str, value: Mapping[str, Any], *, by: str, now: datetime) -> Control:
        """Replace a control's value; returns when it is durable."""

    def controls(self) -> dict[str, Control]:
        """Read all controls that were ever set: name -> control. They agree with each other at one moment."""
