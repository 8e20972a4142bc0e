"""Parser of server-sent events (WHATWG HTML, 9.2.6)."""

from __future__ import annotations

import json
from typing import Any


class Event:
    """One event, built from the lines of a stream."""

    def __init__(self) -> None:
        #: Position in the stream after the event; None if it has none.
        self.id: str | None = None
        self._data: list[str] = []

    @property
    def data(self) -> dict[str, Any]:
        """The JSON object in the event; empty if there is none."""
        try:
            data = json.loads("\n".join(self._data))
        except ValueError:
            return {}
        return data if isinstance(data, dict) else {}

    def add(self, line: str) -> bool:
        """Add a line. :return: True when the event is complete."""
        if not line:
            return bool(self._data)
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "id" and "\0" not in value:
            self.id = value
        return False
