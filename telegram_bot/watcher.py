"""Waits for answers: streams of events of the server, each for a part of the requests.

The streams are those of `mlg_client`, which reconnects and polls where a server has no events. A request that comes
newly joins the stream with the fewest, which is then opened again; so the number of streams stays small.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from mlg_client import ClientError, Request
from telegram_bot.accounts import Accounts

log = logging.getLogger(__name__)

#: Requests of one stream: as many as `mlg_client` names in one address.
STREAM_SIZE = 150
#: New requests that arrive within this time are added together, and how long a stream stays open at least.
_GATHER_SECONDS, _MIN_OPEN_SECONDS = 0.1, 0.3
#: Streams of one account; fewer than its connections, so that uploads have some. Answers to what is in no stream are
#: found when `jobs.py` looks how long they still take.
_MAX_STREAMS = 80
_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 0.5, 30.0


class _Stream:
    """The requests of one stream."""

    def __init__(self, account: int) -> None:
        self.account = account
        self.waiting: set[str] = set()
        self.changed = asyncio.Event()


class Watcher:
    """Watches the requests of all accounts.

    :param record: called with each request when it is final.
    """

    def __init__(self, accounts: Accounts, record: Callable[[Request], None]) -> None:
        self._accounts = accounts
        self._record = record
        self._streams: dict[_Stream, asyncio.Task[None]] = {}
        self._slots: dict[int, asyncio.Semaphore] = {}

    def add(self, account: int, request_id: str) -> None:
        """Watch a request. :param account: the user whose key can read it; 0 is the bot's."""
        mine = [stream for stream in self._streams if stream.account == account]
        if any(request_id in stream.waiting for stream in mine):
            return
        with_room = [stream for stream in mine if len(stream.waiting) < STREAM_SIZE]
        stream = min(with_room, key=lambda stream: len(stream.waiting), default=None)
        if stream is None:
            stream = _Stream(account)
            self._streams[stream] = asyncio.create_task(self._watch(stream))
        stream.waiting.add(request_id)
        stream.changed.set()

    async def close(self) -> None:
        """Stop watching."""
        tasks = list(self._streams.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, stream: _Stream) -> None:
        """Watch the requests of a stream until there are none."""
        pause = _FIRST_PAUSE_SECONDS
        slots = self._slots.setdefault(stream.account, asyncio.Semaphore(_MAX_STREAMS))
        await slots.acquire()
        try:
            while stream.waiting:
                await asyncio.sleep(_GATHER_SECONDS)
                stream.changed.clear()
                listening = asyncio.create_task(self._listen(stream))
                changing = asyncio.create_task(self._changed(stream))
                try:
                    await asyncio.wait((listening, changing), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for task in (listening, changing):
                        task.cancel()
                    await asyncio.gather(listening, changing, return_exceptions=True)
                error = None if listening.cancelled() else listening.exception()
                if error is None:
                    pause = _FIRST_PAUSE_SECONDS
                    continue
                if isinstance(error, ClientError):
                    log.warning("cannot wait for answers: %s", error.reason, extra={"code": error.code})
                else:
                    log.error("cannot wait for answers", exc_info=error)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await stream.changed.wait()
                pause = min(_MAX_PAUSE_SECONDS, pause * 2)
        finally:
            slots.release()
            self._streams.pop(stream, None)

    async def _changed(self, stream: _Stream) -> None:
        # Events get through also while photos arrive all the time.
        await asyncio.sleep(_MIN_OPEN_SECONDS)
        await stream.changed.wait()

    async def _listen(self, stream: _Stream) -> None:
        client = self._accounts.client(stream.account)
        requests = [Request(id=id, status="queued", model="") for id in sorted(stream.waiting)]
        async with contextlib.aclosing(client.as_completed(requests)) as ended:
            async for request in ended:
                try:
                    self._record(request)
                except Exception:
                    # The others of the stream must not wait for it.
                    log.exception("an answer cannot be recorded", extra={"request": request.id})
                stream.waiting.discard(request.id)
                if request.code == "unknown_request":
                    # The server does not stream requests of which one is unknown.
                    return
