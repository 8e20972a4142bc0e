"""What a restarted daemon still knows: one JSON document, in memory or in a file."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from provider_image.errors import ConfigError

#: Of the document's form; a daemon refuses another's.
VERSION = 1


class StateStore:
    """Keeps what `snapshot` returns.

    With a file it is written soon after every `schedule_save`, once for many; without one only by `save`.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._text: str | None = None
        self._snapshot: Callable[[], dict[str, Any]] | None = None
        self._is_save_scheduled = False

    def load(self) -> dict[str, Any] | None:
        """Return what was saved last, None if nothing was.

        :raises ConfigError: the file is not ours.
        """
        text = self._text
        if self._path is not None and self._path.exists():
            text = self._path.read_text(encoding="utf-8")
        if text is None:
            return None
        try:
            document = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{self._path} is not a devnet's state: {error}") from error
        if not isinstance(document, dict) or document.get("version") != VERSION:
            raise ConfigError(f"{self._path} is not the state of a devnet of this version.")
        return document

    def attach(self, snapshot: Callable[[], dict[str, Any]]) -> None:
        """Say what is to be kept from now on."""
        self._snapshot = snapshot

    def schedule_save(self) -> None:
        """Something changed."""
        if self._path is not None and not self._is_save_scheduled and self._snapshot is not None:
            self._is_save_scheduled = True
            asyncio.get_running_loop().call_soon(self.save)

    def save(self) -> None:
        """Keep it now."""
        self._is_save_scheduled = False
        if self._snapshot is None:
            return
        self._text = json.dumps({"version": VERSION, **self._snapshot()})
        if self._path is not None:
            partial = self._path.with_name(self._path.name + ".part")
            partial.write_text(self._text, encoding="utf-8")
            partial.replace(self._path)

    def detach(self) -> None:
        """Change no more: the daemon is down."""
        self._snapshot = None
