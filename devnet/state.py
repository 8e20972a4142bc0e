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

    :param path: written soon after `schedule_save`, once for several calls. If None, only `save` keeps the state, in
        memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._text: str | None = None
        self._snapshot: Callable[[], dict[str, Any]] | None = None
        self._is_save_scheduled = False

    def load(self) -> dict[str, Any] | None:
        """Return the last saved state, None if there is none.

        :raises ConfigError: the file is not a state file of this version.
        """
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

    def attach(self, snapshot: Callable[[], dict[str, Any]]) -> None:
        """Set the source of the state to save from now on."""
        self._snapshot = snapshot

    def schedule_save(self) -> None:
        """Save soon, because something changed."""
        if self._path is not None and not self._is_save_scheduled and self._snapshot is not None:
            self._is_save_scheduled = True
            asyncio.get_running_loop().call_soon(self.save)

    def save(self) -> None:
        """Save now."""
        self._is_save_scheduled = False
        if self._snapshot is None:
            return
        self._text = json.dumps({"version": VERSION, **self._snapshot()})
        if self._path is not None:
            partial = self._path.with_name(self._path.name + ".part")
            partial.write_text(self._text, encoding="utf-8")
            partial.replace(self._path)

    def detach(self) -> None:
        """Save nothing any more: the daemon is down."""
        self._snapshot = None
