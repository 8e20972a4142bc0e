"""Gets the updates of Telegram, by long polling or as a webhook, and confirms them after they have been applied.

The library's own updater confirms an update when it has put it into a queue in memory, so one that is killed loses
those; here the commit comes first.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import telegram

from provider_image.errors import ConfigError
from telegram_bot.conversation import Conversation
from telegram_bot.settings import TelegramSettings
from telegram_bot.state import BotState

log = logging.getLogger(__name__)

#: The kinds of updates that are asked for.
KINDS = ("message", "callback_query", "my_chat_member")
#: How long Telegram holds a poll that has nothing to say, and what is added for the way.
_POLL_SECONDS, _WAY_SECONDS = 30, 10.0
_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 0.5, 30.0
#: Most bytes of an update at the webhook.
_MAX_BODY_BYTES = 1024 * 1024
#: Presses of buttons that wait to be acknowledged; more are dropped, as each only ends an animation.
_MAX_PRESSES = 100


class Receiver:
    """Applies updates.

    :param on_update: called with the chat of each.
    """

    def __init__(
        self,
        state: BotState,
        bot: telegram.Bot,
        conversation: Conversation,
        clock: Callable[[], float],
        *,
        on_update: Callable[[int], None],
    ) -> None:
        self._state = state
        self._bot = bot
        self._conversation = conversation
        self._clock = clock
        self._on_update = on_update
        self._presses: asyncio.Queue[str] = asyncio.Queue(_MAX_PRESSES)

    def apply(self, updates: Sequence[telegram.Update]) -> None:
        """Apply updates durably. One that cannot be applied is logged and left out: it would come again and again."""
        chats = []
        with self._state.transaction(flush=True):
            for update in updates:
                try:
                    with self._state.savepoint():
                        chats.append(self._conversation.handle(update))
                except sqlite3.Error:
                    raise  # nothing of this part is confirmed, so it comes again
                except Exception:
                    log.exception("an update cannot be applied", extra={"update": update.update_id})
                    self._state.add_update(update.update_id, self._clock())
        for update in updates:
            if update.callback_query is not None and not self._presses.full():
                self._presses.put_nowait(update.callback_query.id)
        for chat_id in chats:
            if chat_id is not None:
                self._on_update(chat_id)

    async def poll(self) -> None:
        """Fetch updates until cancelled. :raises telegram.error.InvalidToken: the token is not valid any more."""
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                updates = await self._bot.get_updates(
                    offset=self._state.next_update(),
                    timeout=_POLL_SECONDS,
                    read_timeout=_POLL_SECONDS + _WAY_SECONDS,
                    allowed_updates=KINDS,
                )
            except telegram.error.InvalidToken:
                raise
            except telegram.error.TelegramError as error:
                if isinstance(error, telegram.error.Conflict):
                    log.error("another program fetches the updates of this bot: %s", error)
                else:
                    log.warning("Telegram does not answer: %s", error)
                await asyncio.sleep(pause)
                pause = min(_MAX_PAUSE_SECONDS, pause * 2)
            else:
                pause = _FIRST_PAUSE_SECONDS
                self.apply(updates)

    async def acknowledge_presses(self) -> None:
        """Tell Telegram until cancelled which buttons were pressed; it forgets them after some seconds itself."""
        while True:
            id = await self._presses.get()
            try:
                await self._bot.answer_callback_query(id)
            except telegram.error.TelegramError as error:
                log.debug("a button is not acknowledged: %s", error)

    @asynccontextmanager
    async def listening(self, settings: TelegramSettings, url: str, secret: str) -> AsyncIterator[int]:
        """Listen for updates in an `async with` statement, which gets the port.

        :param url: the public address, whose path is used.
        :param secret: what Telegram has to send with each.
        """
        from aiohttp import web

        async def receive(request: web.Request) -> web.Response:
            given = request.headers.get("X-Telegram-Bot-Api-Secret-Token", "")
            if not hmac.compare_digest(given.encode(), secret.encode()):
                return web.Response(status=403)
            try:
                update = telegram.Update.de_json(json.loads(await request.read()), self._bot)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                log.warning("an update cannot be read: %r", error)
                return web.Response(status=400)
            self.apply([update])
            return web.Response()

        application = web.Application(client_max_size=_MAX_BODY_BYTES)
        application.router.add_post(urlsplit(url).path or "/", receive)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        try:
            site = web.TCPSite(runner, settings.webhook_host, settings.webhook_port)
            try:
                await site.start()
            except OSError as error:
                raise ConfigError(f"The webhook cannot listen there: {error.strerror}.") from error
            yield int(runner.addresses[0][1])
        finally:
            await runner.cleanup()


def new_secret() -> str:
    """Return a secret for a webhook."""
    return secrets.token_urlsafe(32)
