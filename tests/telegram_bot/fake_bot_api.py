"""A small Bot API on loopback, for the real library: users who write and press buttons, and faults that can be ordered.

It keeps every chat as a user would see it: messages by number, each with its text, buttons and file.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

TOKEN = "123456:AAfake-token_of-the-tests_000000000"


@dataclass
class Shown:
    """A message of the bot, as its user sees it."""

    text: str
    buttons: list[tuple[str, str]] = field(default_factory=list)
    file: bytes | None = None
    kind: str = "text"
    reply_to: int | None = None
    #: Time of the last change.
    at: float = 0.0


@dataclass
class Fault:
    """A refusal of calls: of one method, for one chat if it is given, so many times."""

    method: str
    status: int
    description: str
    times: int = 1
    chat_id: int | None = None
    retry_after: int | None = None
    #: Text of the message that is refused.
    contains: str = ""
    #: Whether the call takes effect, although the caller does not learn it.
    takes_effect: bool = False


class FakeBotApi:
    """The service; `base` is its address while it runs."""

    def __init__(self) -> None:
        self.base = ""
        self.faults: list[Fault] = []
        #: (method, chat id) of every call, in order.
        self.calls: list[tuple[str, int | None]] = []
        #: Chat id -> number -> message.
        self.chats: dict[int, dict[int, Shown]] = defaultdict(dict)
        self.webhook: dict[str, str] = {}
        #: Updates that are not confirmed.
        self.pending: list[dict[str, Any]] = []
        self.accepts_token = True
        self._files: dict[str, bytes] = {}
        self._numbers = itertools.count(1000)
        self._update_ids = itertools.count(500)
        self._arrived = asyncio.Event()

    # What users do

    def photo(self, chat_id: int, data: bytes, **more: Any) -> int:
        """Send a photo. :return: the message's number."""
        file_id = f"file{len(self._files)}"
        self._files[file_id] = data
        size = {"file_id": file_id, "file_unique_id": file_id, "width": 4, "height": 3, "file_size": len(data)}
        return self.message(chat_id, photo=[size], **more)

    def document(self, chat_id: int, data: bytes, mime_type: str, file_size: int | None = None, **more: Any) -> int:
        """Send a file."""
        file_id = f"file{len(self._files)}"
        self._files[file_id] = data
        size = len(data) if file_size is None else file_size
        document = {"file_id": file_id, "file_unique_id": file_id, "mime_type": mime_type, "file_size": size}
        return self.message(chat_id, document=document, **more)

    def message(self, chat_id: int, language: str = "en", chat_type: str = "private", **content: Any) -> int:
        """Send a message."""
        number = next(self._numbers)
        user_id = chat_id if chat_type == "private" else 1
        self.update(
            message={
                "message_id": number,
                "date": int(time.time()),
                "chat": {"id": chat_id, "type": chat_type},
                "from": {"id": user_id, "is_bot": False, "first_name": "A", "language_code": language},
                **content,
            }
        )
        return number

    def press(self, chat_id: int, number: int, label: str) -> None:
        """Press the button of a message whose label begins so."""
        message = self.chats[chat_id][number]
        data = next(data for shown, data in message.buttons if shown.startswith(label))
        self.press_data(chat_id, number, data)

    def press_data(self, chat_id: int, number: int, data: str) -> None:
        """Press a button by its data."""
        chat = {"id": chat_id, "type": "private"}
        self.update(
            callback_query={
                "id": str(next(self._numbers)),
                "from": {"id": chat_id, "is_bot": False, "first_name": "A", "language_code": "en"},
                "chat_instance": "1",
                "message": {"message_id": number, "date": 1, "chat": chat},
                "data": data,
            }
        )

    def update(self, **content: Any) -> dict[str, Any]:
        """Add an update of any kind."""
        update = {"update_id": next(self._update_ids), **content}
        self.pending.append(update)
        self._arrived.set()
        return update

    def last(self, chat_id: int) -> Shown:
        """Return the newest message of the bot in a chat."""
        return self.chats[chat_id][max(self.chats[chat_id])]

    def texts(self, chat_id: int) -> list[str]:
        """List the texts of the bot's messages in a chat, in the order of the chat."""
        return [self.chats[chat_id][number].text for number in sorted(self.chats[chat_id])]

    # The service

    @asynccontextmanager
    async def running(self, port: int = 0) -> AsyncIterator[FakeBotApi]:
        """Serve on a free port of loopback until the block ends."""
        application = web.Application(client_max_size=64 * 1024 * 1024)
        application.router.add_post("/bot{token}/{method}", self._call)
        application.router.add_get("/file/bot{token}/{path}", self._file)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        self.base = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            self._arrived.set()
            await runner.cleanup()

    async def _file(self, request: web.Request) -> web.Response:
        return web.Response(body=self._files[request.match_info["path"]])

    async def _call(self, request: web.Request) -> web.Response:
        method, fields = request.match_info["method"], dict(await request.post())
        chat_id = int(str(fields["chat_id"])) if "chat_id" in fields else None
        self.calls.append((method, chat_id))
        if request.match_info["token"] != TOKEN or not self.accepts_token:
            return _error(401, "Unauthorized")
        fault = self._fault(method, chat_id, str(fields.get("text", "")))
        if fault is not None and not fault.takes_effect:
            return _error(fault.status, fault.description, fault.retry_after)
        act: Callable[..., Any] = getattr(self, f"_{method}", lambda fields: True)
        try:
            result = act(fields)
            if asyncio.iscoroutine(result):
                result = await result
        except LookupError:
            return _error(400, "Bad Request: message to edit not found")
        except ValueError as error:
            return _error(400, f"Bad Request: {error}")
        if fault is not None:
            return _error(fault.status, fault.description)
        return web.json_response({"ok": True, "result": result})

    def _fault(self, method: str, chat_id: int | None, text: str) -> Fault | None:
        for fault in self.faults:
            is_meant = fault.method in (method, "*") and fault.chat_id in (None, chat_id) and fault.contains in text
            if is_meant and fault.times > 0:
                fault.times -= 1
                return fault
        return None

    def _getMe(self, fields: Any) -> Any:
        return {"id": 1, "is_bot": True, "first_name": "mlg", "username": "mlg_bot"}

    async def _getUpdates(self, fields: Any) -> Any:
        offset, deadline = int(fields.get("offset", 0)), time.monotonic() + float(fields.get("timeout", 0))
        self.pending = [update for update in self.pending if update["update_id"] >= offset]
        while not self.pending and time.monotonic() < deadline:
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(1.0, deadline - time.monotonic())):
                    await self._arrived.wait()
        return self.pending[: int(fields.get("limit", 100))]

    def _setWebhook(self, fields: Any) -> Any:
        self.webhook = {name: str(value) for name, value in fields.items()}
        return True

    def _getFile(self, fields: Any) -> Any:
        file_id = str(fields["file_id"])
        if file_id not in self._files:
            raise ValueError("wrong file_id")
        return {"file_id": file_id, "file_unique_id": file_id, "file_path": file_id}

    def _sendMessage(self, fields: Any) -> Any:
        number, chat_id = next(self._numbers), int(fields["chat_id"])
        reply = json.loads(fields["reply_parameters"])["message_id"] if "reply_parameters" in fields else None
        self.chats[chat_id][number] = Shown(str(fields["text"]), _buttons(fields), reply_to=reply, at=time.time())
        return self._message(chat_id, number)

    def _editMessageText(self, fields: Any) -> Any:
        chat_id, number = int(fields["chat_id"]), int(fields["message_id"])
        message = self.chats[chat_id][number]
        text, buttons = str(fields["text"]), _buttons(fields)
        if (message.text, message.buttons, message.file) == (text, buttons, None):
            raise ValueError("message is not modified: specified new message content is the same")
        message.text, message.buttons, message.at = text, buttons, time.time()
        return self._message(chat_id, number)

    def _editMessageMedia(self, fields: Any) -> Any:
        chat_id, number = int(fields["chat_id"]), int(fields["message_id"])
        message, media = self.chats[chat_id][number], json.loads(fields["media"])
        message.file = fields[media["media"].removeprefix("attach://")].file.read()
        message.kind, message.text = media["type"], media.get("caption", "")
        message.buttons, message.at = _buttons(fields), time.time()
        return self._message(chat_id, number)

    def _message(self, chat_id: int, number: int) -> dict[str, Any]:
        return {"message_id": number, "date": 1, "chat": {"id": chat_id, "type": "private"}}


def _buttons(fields: Any) -> list[tuple[str, str]]:
    rows = json.loads(fields.get("reply_markup", "{}")).get("inline_keyboard", [])
    return [(button["text"], button["callback_data"]) for row in rows for button in row]


def _error(status: int, description: str, retry_after: int | None = None) -> web.Response:
    parameters = {} if retry_after is None else {"parameters": {"retry_after": retry_after}}
    return web.json_response(
        {"ok": False, "error_code": status, "description": description, **parameters}, status=status
    )
