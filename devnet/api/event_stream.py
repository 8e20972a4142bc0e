"""Answers that are told bit by bit: server-sent events.

Made by `api_activity`; a module of its own because `api`, which writes every answer down, asks for what was sent.
"""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web


class EventStream(web.StreamResponse):
    """One answer, to be prepared before the first event."""

    def __init__(self) -> None:
        super().__init__(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        #: Everything until now; a batch is finite and tells little.
        self.sent = bytearray()
        self._number = 0

    async def send(self, kind: str, event: dict[str, Any]) -> None:
        """Send an event as JSON."""
        text = f"event: {kind}\ndata: {json.dumps(event)}\nid: {self._number}\n\n".encode()
        self._number += 1
        self.sent += text
        await self.write(text)
