"""What the daemon keeps over a restart: one JSON document, in memory or in a file."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from provider_image.errors import ConfigError

#: Version of the document's format; other versions are rejected.
VERSION = 1


class StateStore:
    """Saves and loads the daemon's state.

    :param path: written soon after `changed`, once for several calls. If None, only `close` keeps the state, in memory.
    :param snapshot: returns the state to save.
    """

    def __init__(self, path: Path | None, snapshot: Callable[[], dict[str, Any]]) -> None:
        self._path = path
        self._snapshot = snapshot
        self._text: str | None = None
        self._is_open = self._is_save_scheduled = False

    def load(self) -> dict[str, Any] | None:
        """Return the last saved state, None if there is none. :raises ConfigError: the file is not such a state."""
        text = self._text
        if self._path is not None and self._path.exists():
            text = self._path.read_text(encoding="utf-8")
        if text is None:
            return None
        try:
            document = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{self._path} is not the state file of a devnet: {error}") from error
        if not isinstance(document, dict) or document.get("version") != VERSION:
            raise ConfigError(f"{self._path} is not the state file of a devnet of this version.")
        return document

    def open(self) -> None:
        """Save every change from now on."""
        self._is_open = True

    def changed(self) -> None:
        """Save soon, because something changed."""
        if self._path is not None and self._is_open and not self._is_save_scheduled:
            self._is_save_scheduled = True
            asyncio.get_running_loop().call_soon(self._save)

    def close(self) -> None:
        """Save for the last time: the daemon ends."""
        self._save()
        self._is_open = False

    def _save(self) -> None:
        self._is_save_scheduled = False
        if not self._is_open:
            return
        self._text = json.dumps({"version": VERSION, **self._snapshot()})
        if self._path is not None:
            partial = self._path.with_name(self._path.name + ".part")
            partial.write_text(self._text, encoding="utf-8")
            partial.replace(self._path)
