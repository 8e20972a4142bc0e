"""Large bodies in memory are limited, and shared fairly by the clients."""

from __future__ import annotations

import http.client
import io
import json
import socket
import struct
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import flask
import flask.testing
import pytest

from server.app import create_app
from server.auth.memory import DOWNLOAD_BYTES, MAX_DOWNLOADS, REQUEST_BYTES, Downloads, hold_bytes
from server.errors import TooManyUploads
from server.settings import ServerSettings
from store.clients.keys import KeyRecord, Scope
from store.store import Store
from tests.conftest import RunningServer
from tests.timing import wait_until

URL = "/requestPrediction/efficientnet_lite0"


def key_record(id: str) -> KeyRecord:
    return KeyRecord(id=id, name=id, sha256="0" * 64, scopes=frozenset({Scope.READ}), created_at=datetime.now(UTC))


def make_bitmap(side: int) -> bytes:
    """A black BMP of three bytes a pixel."""
    row = (3 * side + 3) // 4 * 4
    info = struct.pack("<LllHHLLllLL", 40, side, side, 1, 24, 0, row * side, 0, 0, 0, 0)
    return b"BM" + struct.pack("<LHHL", 54 + row * side, 0, 0, 54) + info + bytes(row * side)


def test_a_key_holds_half_of_the_memory_until_its_request_ends(settings: ServerSettings, store: Store) -> None:
    app = create_app(settings, store)

    def hold(id: str, count: int) -> None:
        flask.g.key = key_record(id)
        hold_bytes(count, TooManyUploads())

    for _ in range(2):
        with app.test_request_context():
            hold("a", REQUEST_BYTES // 2)
            with app.test_request_context():
                with pytest.raises(TooManyUploads):
                    hold("a", 1)
                hold("b", REQUEST_BYTES // 4)


@pytest.mark.parametrize("has_length", [True, False])
def test_the_body_of_an_upload_is_held(client: flask.testing.FlaskClient, photos: Any, has_length: bool) -> None:
    data = photos["rocket"]
    refusals = []

    class Body(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            piece = super().read(size)
            if not piece or has_length:
                with pytest.raises(TooManyUploads) as refusal:
                    hold_bytes(REQUEST_BYTES - len(data) + 1, TooManyUploads())
                refusals.append(refusal)
            return piece

    chunked = {"wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"}
    environ = {} if has_length else chunked
    sent = client.post(URL, input_stream=Body(data), content_type="image/jpeg", environ_overrides=environ)

    assert sent.status_code == 202
    assert refusals


def test_large_responses_are_limited_by_bytes_and_by_number() -> None:
    downloads, body = Downloads(), bytes(range(256)) * 2000
    started = []
    while (download := downloads.start(body, "a")) is not None:
        started.append(download)

    assert len(started) == MAX_DOWNLOADS // 2
    assert b"".join(started[0]) == body
    assert downloads.start(body, "a") is None
    started[0].close()
    started[0].close()
    again = downloads.start(body, "a")
    assert again is not None and downloads.start(body, "a") is None
    large = downloads.start(bytes(DOWNLOAD_BYTES // 4), "b")
    assert large is not None and downloads.start(bytes(DOWNLOAD_BYTES // 4), "b") is None


def test_clients_that_read_slowly_do_not_fill_the_memory(server: RunningServer) -> None:
    address = urlsplit(server.base)
    bitmap = make_bitmap(2300)

    def call(method: str, path: str, body: bytes | None = None) -> tuple[int, bytes, str | None]:
        connection = http.client.HTTPConnection(str(address.hostname), address.port)
        try:
            connection.request(method, path, body, {"Content-Type": "image/bmp"})
            response = connection.getresponse()
            return response.status, response.read(), response.headers["Retry-After"]
        finally:
            connection.close()

    path = f"/requests/{json.loads(call('POST', URL, bitmap)[1])['req_id']}/picture"
    assert call("GET", path)[:2] == (200, bitmap)
    slow = []
    try:
        while (answer := call("GET", path))[0] == 200:
            connection = socket.socket()
            slow.append(connection)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((address.hostname, address.port))
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert len(slow) <= 2 * DOWNLOAD_BYTES // len(bitmap)

        assert (answer[0], answer[2]) == (503, "1")
        assert call("GET", "/healthz")[0] == 200
    finally:
        for connection in slow:
            connection.close()
    wait_until(lambda: call("GET", path)[0] == 200)
