"""Shows the messages of the state in Telegram: one call at a time for each chat, in the order of the changes.

A message is sent once and then edited. An answer is only ever edited into a message that exists: an edit may be
repeated after a crash and shows the same, while a message that is sent again would be there twice.
"""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import telegram

from mlg_client import ClientError, Refused
from telegram_bot.accounts import Accounts
from telegram_bot.rendering import MAX_CAPTION, MAX_TEXT, shorten
from telegram_bot.state import BotState, Content, Message
from telegram_bot.texts import DEFAULT_LANGUAGE, say

log = logging.getLogger(__name__)

#: Chats that are served at once.
_AT_ONCE = 16
#: Files that are in memory at once.
_FILES_AT_ONCE = 4
_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 0.5, 30.0
#: How long a call may still take when the bot is stopped.
_STOP_SECONDS = 5.0
#: So many chats in a row that Telegram wants to be left alone: then it means the bot, not a chat.
_FLOODED_CHATS = 3
#: Shown until an answer is edited in.
_PLACEHOLDER = "…"
#: What Telegram answers to an edit of a message that shows the same already, and of one that cannot be edited.
_SAME = "message is not modified"
_GONE = ("message to edit not found", "message can't be edited", "message_id_invalid", "message not found")
#: ... and to a message for a chat that there is not any more.
_NO_CHAT = ("chat not found", "user not found", "peer_id_invalid", "input_user_deactivated")


class Pace:
    """Spaces calls, so that at most so many begin in a second."""

    def __init__(self, per_second: float) -> None:
        self._interval = 1.0 / per_second
        self._next_at = 0.0

    async def wait(self) -> None:
        """Wait until the next call may begin."""
        now = time.monotonic()
        begins_at = max(now, self._next_at)
        self._next_at = begins_at + self._interval
        if begins_at > now:
            await asyncio.sleep(begins_at - now)

    def pause(self, seconds: float) -> None:
        """Begin no call for some time."""
        self._next_at = max(self._next_at, time.monotonic() + seconds)


class Publisher:
    """Sends and edits messages until the state has none left to show."""

    def __init__(
        self, state: BotState, bot: telegram.Bot, accounts: Accounts, clock: Callable[[], float], pace: Pace
    ) -> None:
        self._state = state
        self._bot = bot
        self._accounts = accounts
        self._clock = clock
        self._pace = pace
        self._chats: asyncio.Queue[int] = asyncio.Queue()
        #: Chats in the queue, being served or waiting for the end of a pause.
        self._busy: set[int] = set()
        self._failures: dict[int, int] = {}
        self._flooded: set[int] = set()
        #: Messages that were sent again because they were gone.
        self._resent: set[int] = set()
        self._files = asyncio.Semaphore(_FILES_AT_ONCE)

    def wake(self, chat_id: int) -> None:
        """Show what has to be shown in a chat."""
        if chat_id not in self._busy:
            self._busy.add(chat_id)
            self._chats.put_nowait(chat_id)

    async def run(self) -> None:
        """Publish until cancelled."""
        for chat_id in self._state.chats_to_publish():
            self.wake(chat_id)
        async with asyncio.TaskGroup() as group:
            for _ in range(_AT_ONCE):
                group.create_task(self._work())

    async def _work(self) -> None:
        while True:
            chat_id = await self._chats.get()
            pause = 0.0
            while not pause and (message := self._state.next_message(chat_id)) is not None:
                call = asyncio.create_task(self._try(message))
                try:
                    pause = await asyncio.shield(call)
                except asyncio.CancelledError:
                    # A message whose number is not recorded would be sent again.
                    await asyncio.wait((call,), timeout=_STOP_SECONDS)
                    raise
            if pause:
                asyncio.get_running_loop().call_later(pause, self._chats.put_nowait, chat_id)
            else:
                self._busy.discard(chat_id)

    async def _try(self, message: Message) -> float:
        """Publish a message. :return: after how many seconds to try the chat again; 0 goes on."""
        chat_id = message.chat_id
        try:
            await self._publish(message)
        except telegram.error.RetryAfter as error:
            seconds = flood_seconds(error)
            self._flooded.add(chat_id)
            if len(self._flooded) >= _FLOODED_CHATS:
                self._pace.pause(seconds)
                self._flooded.clear()
            log.info("Telegram limits a chat", extra={"seconds": seconds})
            return max(seconds, 0.1)
        except telegram.error.Forbidden as error:
            log.info("a chat is closed to the bot: %s", error)
            self._state.block_chat(chat_id, self._clock())
        except telegram.error.BadRequest as error:
            if any(text in error.message.lower() for text in _NO_CHAT):
                self._state.block_chat(chat_id, self._clock())
            else:
                # Repeating it cannot help, and the chat's other messages must not wait for it.
                log.error("Telegram refuses a message: %s", error, extra={"row": message.id})
                self._state.set_shown(message)
        except (telegram.error.TelegramError, ClientError) as error:
            failures = self._failures[chat_id] = self._failures.get(chat_id, 0) + 1
            log.warning("a message is not shown yet: %s", error, extra={"row": message.id})
            return min(_MAX_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * float(2 ** min(failures - 1, 16)))
        except Exception:
            log.exception("a message cannot be shown", extra={"row": message.id})
            return _MAX_PAUSE_SECONDS
        else:
            self._flooded.clear()
        self._failures.pop(chat_id, None)
        return 0.0

    async def _publish(self, message: Message) -> None:
        content = message.content
        if message.message_id is None:
            await self._pace.wait()
            sent = await self._bot.send_message(
                message.chat_id,
                _PLACEHOLDER if content.is_answer else shorten(content.text, MAX_TEXT),
                reply_markup=None if content.is_answer else _keyboard(content),
                reply_parameters=None
                if message.reply_to is None
                else telegram.ReplyParameters(message.reply_to, allow_sending_without_reply=True),
                link_preview_options=telegram.LinkPreviewOptions(is_disabled=True),
            )
            self._state.set_sent(message, sent.message_id)
            if not content.is_answer:
                self._state.set_shown(message)
            return
        try:
            if message.content.file is None:
                await self._edit_text(message, message.message_id)
            else:
                async with self._files:
                    await self._edit_file(message, message.message_id, *message.content.file)
        except telegram.error.BadRequest as error:
            text = error.message.lower()
            if any(gone in text for gone in _GONE) and message.id not in self._resent:
                # The user has deleted it. A second time would mean that it cannot be edited at all.
                self._resent.add(message.id)
                self._state.set_sent(message, None)
                return
            if _SAME not in text:
                raise
        self._state.set_shown(message)

    async def _edit_text(self, message: Message, message_id: int) -> None:
        await self._pace.wait()
        await self._bot.edit_message_text(
            shorten(message.content.text, MAX_TEXT),
            chat_id=message.chat_id,
            message_id=message_id,
            reply_markup=_keyboard(message.content),
            link_preview_options=telegram.LinkPreviewOptions(is_disabled=True),
        )

    async def _edit_file(self, message: Message, message_id: int, request_id: str, name: str, media_type: str) -> None:
        content = message.content
        try:
            data = await self._accounts.client(message.chat_id).file(request_id, name)
        except Refused as error:
            log.info("a file of an answer is gone: %s", error.reason, extra={"request": request_id})
            chat = self._state.chat(message.chat_id)
            lost = say(chat.language if chat else DEFAULT_LANGUAGE, "answer_lost")
            self._state.replace_content(message, replace(content, file=None, text=f"{content.text}\n\n{lost}"))
            return
        caption, file_name = shorten(content.text, MAX_CAPTION), f"{name}.{_suffix(media_type)}"
        is_photo = media_type in ("image/jpeg", "image/png", "image/webp")
        for kind in (telegram.InputMediaPhoto, telegram.InputMediaDocument)[0 if is_photo else 1 :]:
            await self._pace.wait()
            try:
                await self._bot.edit_message_media(
                    kind(io.BytesIO(data), caption=caption, filename=file_name),
                    chat_id=message.chat_id,
                    message_id=message_id,
                    reply_markup=_keyboard(content),
                )
                return
            except telegram.error.BadRequest as error:
                # As a photo Telegram takes up to 10 MB and no extreme shapes; as a file all that it can store.
                is_about_photo = kind is telegram.InputMediaPhoto
                if not is_about_photo or any(known in error.message.lower() for known in (*_GONE, *_NO_CHAT, _SAME)):
                    raise
                log.info("sent as a file, not as a photo: %s", error)


def flood_seconds(error: telegram.error.RetryAfter) -> float:
    """Return how long Telegram wants to be left alone."""
    pause = error.retry_after
    return pause.total_seconds() if isinstance(pause, timedelta) else float(pause)


def _keyboard(content: Content) -> telegram.InlineKeyboardMarkup | None:
    if not content.buttons:
        return None
    rows = [
        [telegram.InlineKeyboardButton(label, callback_data=data) for label, data in row] for row in content.buttons
    ]
    return telegram.InlineKeyboardMarkup(rows)


def _suffix(media_type: str) -> str:
    suffixes = {"image/jpeg": "jpg", "application/octet-stream": "bin", "text/plain": "txt"}
    return suffixes.get(media_type, media_type.rpartition("/")[2])
