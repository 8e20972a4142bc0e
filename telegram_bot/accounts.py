"""The users of the bot as clients of the server: whose API key a call has, and how many photos one may send.

A user whose key is in the users' file is served with that key, and the server's own quota and rate of that key apply.
All others share the bot's key, so the bot counts their photos itself.
"""

from __future__ import annotations

import asyncio

from mlg_client import AsyncClient
from telegram_bot.settings import Secret, TelegramSettings, Users

#: How long a call of the client retries; the bot itself then tries again later.
_RETRY_SECONDS = 3.0
#: Connections of one key: streams of answers, uploads and reads.
_CONNECTIONS = 100


class Accounts:
    """The clients, one for each API key, made when they are needed."""

    def __init__(self, settings: TelegramSettings, users: Users) -> None:
        self._settings = settings
        self._users = users
        self._clients: dict[str | None, AsyncClient] = {}

    def is_allowed(self, user_id: int) -> bool:
        """Tell whether a user may use the bot."""
        return self._users.is_allowed(user_id)

    def quota(self, user_id: int) -> int | None:
        """Return how many photos a day the bot takes from a user; None where the server counts, or nobody."""
        return None if self._users.keys.get(user_id) is not None else self._settings.quota or None

    def account(self, user_id: int) -> int:
        """Return what tells apart whose requests a call can read: a user with an own key, or 0 for all others."""
        return user_id if self._users.keys.get(user_id) is not None else 0

    def client(self, user_id: int) -> AsyncClient:
        """Return the client with the key of a user; 0 is the bot's own."""
        key: Secret | None = self._users.keys.get(user_id) or self._settings.api_key
        text = None if key is None else key.reveal()
        if text not in self._clients:
            self._clients[text] = AsyncClient(
                self._settings.server_url,
                text or "",
                retry_timeout_seconds=_RETRY_SECONDS,
                connections=_CONNECTIONS,
                user_agent="mlg_telegram",
            )
        return self._clients[text]

    async def close(self) -> None:
        """Close the connections."""
        await asyncio.gather(*(client.close() for client in self._clients.values()))
