"""What large bodies take of the memory of one server process, shared fairly by the clients.

- The bodies that requests have read, and the files that they send, until a request is done: `RequestMemory`.
- Large responses until their clients have read them: `Downloads`, which `server/process.py` uses. They are sent piece
  by piece, each by a thread. Given away in one piece, each would stay in memory for as long as its client likes.

The bodies of batches are on disk.
"""

from __future__ import annotations

from collections.abc import Callable

import flask

from provider_image.errors import MlgError
from server.auth.guard import current_key_id
from server.auth.limits import FairSlots

#: Bytes that the requests of one process hold; more where single bodies may be very large.
REQUEST_BYTES = 256 * 1024 * 1024
#: All large responses that one process sends at once: their bytes, and how many they are at most.
DOWNLOAD_BYTES, MAX_DOWNLOADS = 256 * 1024 * 1024, 64
#: Responses up to this size are given away in one piece.
SMALL_BYTES = 256 * 1024
_PIECE_BYTES = 128 * 1024
_EXTENSION = "mlg_memory"


class RequestMemory:
    """The bytes that the requests of an application hold.

    :param largest_bytes: the largest body that one request holds.
    """

    def __init__(self, app: flask.Flask, *, largest_bytes: int) -> None:
        self._bytes = FairSlots(max(REQUEST_BYTES, 4 * largest_bytes))
        app.extensions[_EXTENSION] = self
        app.teardown_request(self._release)

    def hold(self, count: int, error: MlgError) -> None:
        """Hold bytes until the end of the request. :raises MlgError: `error`; its client holds too many."""
        client = current_key_id()
        if not self._bytes.acquire(client, count):
            raise error
        flask.g.setdefault("held_bytes", []).append((client, count))

    def _release(self, _: BaseException | None) -> None:
        for client, count in flask.g.pop("held_bytes", ()):
            self._bytes.release(client, count)


def hold_bytes(count: int, error: MlgError) -> None:
    """Hold bytes until the end of the current request, see `RequestMemory.hold`."""
    memory: RequestMemory = flask.current_app.extensions[_EXTENSION]
    memory.hold(count, error)


class Download:
    """The body of a large response, piece by piece. Gives back its part of the memory however it ends."""

    def __init__(self, body: bytes, on_close: Callable[[], None]) -> None:
        self._body = body
        self._sent = 0
        self._on_close: Callable[[], None] | None = on_close

    def __iter__(self) -> Download:
        return self

    def __next__(self) -> bytes:
        piece = self._body[self._sent : self._sent + _PIECE_BYTES]
        self._sent += len(piece)
        if not piece:
            raise StopIteration
        return piece

    def close(self) -> None:
        """End it. May be called again."""
        on_close, self._on_close = self._on_close, None
        self._body = b""
        if on_close is not None:
            on_close()


class Downloads:
    """The large responses that one server process sends."""

    def __init__(self) -> None:
        self._bytes = FairSlots(DOWNLOAD_BYTES)

    def start(self, body: bytes, client: str | None) -> Download | None:
        """Start to send a body. :param client: as for `FairSlots`. :return: None if its client receives too much."""
        count = min(max(len(body), DOWNLOAD_BYTES // MAX_DOWNLOADS), DOWNLOAD_BYTES)
        if not self._bytes.acquire(client, count):
            return None
        return Download(body, lambda: self._bytes.release(client, count))
