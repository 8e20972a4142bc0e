"""Bad input gets a clear JSON error and leaves nothing behind."""

from __future__ import annotations

import io
import socket
import struct
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlsplit

import flask.testing
import pytest
from PIL import Image

from server.app import create_app
from server.intake.uploads import clean_name
from server.settings import ServerSettings
from store.clients.keys import KeyRecord, Scope, hash_key, make_key
from store.store import Store
from tests.conftest import RunningServer
from tests.timing import DEADLINE_SECONDS

URL = "/requestPrediction/efficientnet_lite0"
Traces = Callable[[], tuple[list[str], int]]


def small_jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "navy").save(file, "JPEG")
    return file.getvalue()


JPEG = small_jpeg()
#: A GIF whose header declares 50,000 x 50,000 pixels, in 40 bytes.
GIF_BOMB = b"GIF89a" + struct.pack("<HHBBB", 50_000, 50_000, 0x80, 0, 0) + bytes(6) + b"\x2c" + bytes(19) + b"\x3b"


def png_bomb() -> bytes:
    head = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + head
        + struct.pack(">I", zlib.crc32(head))
        + struct.pack(">I", 0)
        + b"IEND"
        + struct.pack(">I", zlib.crc32(b"IEND"))
    )


def form(data: bytes, name: str = "kitten.jpg", field: str = "image") -> dict[str, Any]:
    return {field: (io.BytesIO(data), name)}


def multipart(body: bytes, content_type: str = "multipart/form-data; boundary=b") -> dict[str, Any]:
    return {"data": body, "content_type": content_type}


TAIL = b"\r\n--b--\r\n"
HEAD = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'

#: what -> (arguments of the post, status, code, a word of the reason)
BAD: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "no image part": ({"data": form(JPEG, field="picture")}, 400, "malformed_request", "curl -F image=@"),
    "no image part but a text": (
        {"data": {"top": "3", "a": "b"}, "content_type": "multipart/form-data"},
        400,
        "malformed_request",
        "'top', 'a'",
    ),
    "two images": (
        {"data": {"image": [(io.BytesIO(JPEG), "a"), (io.BytesIO(JPEG), "b")]}},
        400,
        "malformed_request",
        "2 fields",
    ),
    "nothing at all": ({}, 400, "empty_image", "curl -F image=@"),
    "an empty raw body": ({"data": b"", "content_type": "image/jpeg"}, 400, "empty_image", "curl"),
    "an empty file in a form": ({"data": form(b"")}, 400, "empty_image", "curl"),
    "an empty form": (multipart(b""), 400, "malformed_request", "curl"),
    "text named .jpg": ({"data": form(b"Dear kitten,\nhow are you?\n" * 99)}, 400, "not_an_image", "JPEG"),
    "a forgotten @": (
        {"data": {"image": "kitten.jpg"}, "content_type": "multipart/form-data"},
        400,
        "malformed_request",
        "@",
    ),
    "a truncated JPEG": ({"data": form(JPEG[: len(JPEG) // 2])}, 400, "broken_image", "cut short"),
    "a JPEG without its end": ({"data": JPEG[:-2], "content_type": "image/jpeg"}, 400, "broken_image", ""),
    "a GIF bomb": ({"data": form(GIF_BOMB, "bomb.gif")}, 413, "too_many_pixels", "50000"),
    "a PNG bomb": ({"data": form(png_bomb(), "bomb.png")}, 413, "too_many_pixels", "60000"),
    "a PDF": ({"data": form(b"%PDF-1.7\n" + bytes(200))}, 415, "unsupported_format", ""),
    "over 16 MB in a form": (multipart(HEAD + JPEG + bytes(2**24) + TAIL), 413, "too_large", "16 MB"),
    "one byte over 16 MB in a form": (
        multipart(HEAD + JPEG + bytes(2**24 + 1 - len(JPEG)) + TAIL),
        413,
        "too_large",
        "16 MB",
    ),
    "over 16 MB raw": ({"data": JPEG + bytes(2**24), "content_type": "image/jpeg"}, 413, "too_large", "16 MB"),
    "JSON": ({"json": {"image": "abc"}}, 403, "fetching_is_off", "Send the image itself"),
    "text": ({"data": b"hello", "content_type": "text/plain"}, 415, "unsupported_media_type", "curl -F"),
    "curl -d": ({"data": {"image": "x"}}, 415, "unsupported_media_type", "curl -F"),
    "a compressed body": (
        {"data": JPEG, "content_type": "image/jpeg", "headers": {"Content-Encoding": "gzip"}},
        415,
        "unsupported_media_type",
        "Content-Encoding",
    ),
    "no boundary": (
        multipart(HEAD + JPEG + b"\r\n--b--\r\n", "multipart/form-data"),
        400,
        "malformed_request",
        "boundary",
    ),
    "an empty boundary": (
        multipart(HEAD + JPEG, 'multipart/form-data; boundary=""'),
        400,
        "malformed_request",
        "boundary",
    ),
    "another boundary": (
        multipart(HEAD + JPEG + b"\r\n--b--\r\n", "multipart/form-data; boundary=other"),
        400,
        "malformed_request",
        "boundary",
    ),
    "no closing boundary": (multipart(HEAD + JPEG), 400, "malformed_request", "cut short"),
    "cut in the headers": (multipart(HEAD[:-8]), 400, "malformed_request", "end of headers"),
    "junk for a form": (multipart(bytes(range(256)) * 20), 400, "malformed_request", "cut short"),
    "a field without a name": (
        multipart(b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n"),
        400,
        "malformed_request",
        "name",
    ),
    "a field without headers": (multipart(b"--b\r\n\r\nx\r\n--b--\r\n"), 400, "malformed_request", ""),
    "a CRLF in the file name": (
        multipart(HEAD.replace(b"a.jpg", b"a\r\nSet-Cookie x.jpg") + JPEG + b"\r\n--b--\r\n"),
        400,
        "malformed_request",
        "colon",
    ),
    "endless headers": (
        multipart(b"--b\r\nX: " + b"y" * 9000 + b"\r\n\r\nx\r\n--b--\r\n"),
        400,
        "malformed_request",
        "end of headers",
    ),
    "hundreds of fields": (
        {"data": {**form(JPEG), **{f"f{i}": "x" for i in range(300)}}},
        400,
        "malformed_request",
        "16 fields",
    ),
    "an unknown parameter": ({"data": {**form(JPEG), "sharpness": "9"}}, 400, "invalid_params", "sharpness"),
    "a bad parameter": ({"data": {**form(JPEG), "top": "21"}}, 400, "invalid_params", "20"),
    "a second file": ({"data": {**form(JPEG), **form(JPEG, field="mask")}}, 400, "malformed_request", "mask"),
    "a parameter twice": (
        {"data": {**form(JPEG), "top": "3"}, "query_string": "top=4"},
        400,
        "malformed_request",
        "top",
    ),
    "a parameter twice in the URL": (
        {"data": form(JPEG), "query_string": "top=4&top=5"},
        400,
        "malformed_request",
        "twice",
    ),
    "fresh but how": ({"data": form(JPEG), "query_string": "fresh=maybe"}, 400, "invalid_params", "fresh"),
    "wait at the wrong place": ({"data": form(JPEG), "query_string": "wait=3"}, 400, "invalid_params", "wait"),
}


@pytest.mark.parametrize("what", list(BAD))
def test_bad_input_is_refused_and_leaves_nothing(
    client: flask.testing.FlaskClient, stored_state: Traces, what: str
) -> None:
    post, status, code, word = BAD[what]
    before = stored_state()
    if "data" in post and isinstance(post["data"], dict):
        rewind(post["data"])

    response = client.post(URL, **post)

    answer = response.json
    assert (response.status_code, answer["code"]) == (status, code), answer
    assert answer.keys() == {"success", "reason", "code"}
    assert answer["success"] is False
    assert word in answer["reason"]
    assert stored_state() == before == ([], 0)


def rewind(fields: dict[str, Any]) -> None:
    """Give the form fresh streams: Werkzeug's client closes what it has sent."""
    for name, value in fields.items():
        if isinstance(value, tuple):
            fields[name] = (io.BytesIO(value[0].getvalue()), value[1])
        elif isinstance(value, list):
            fields[name] = [(io.BytesIO(file.getvalue()), file_name) for file, file_name in value]


class Watched(io.BytesIO):
    """A body that counts the bytes that were read."""

    bytes_read = 0

    def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]
        data = super().read(size)
        self.bytes_read += len(data)
        return data


@pytest.mark.parametrize("content_type", ["image/jpeg", "multipart/form-data; boundary=b"])
def test_a_declared_length_over_the_limit_is_refused_before_a_byte_is_read(
    client: flask.testing.FlaskClient, stored_state: Traces, content_type: str
) -> None:
    body = Watched(bytes(20_000_000))

    response = client.post(URL, input_stream=body, content_length=20_000_000, content_type=content_type)

    assert (response.status_code, response.json["code"]) == (413, "too_large")
    assert body.bytes_read == 0
    assert stored_state() == ([], 0)


@pytest.mark.parametrize("content_type", ["image/jpeg", "multipart/form-data; boundary=b"])
@pytest.mark.parametrize("size", [20_000_000, 80_000_000])
def test_an_undeclared_length_is_refused_while_reading(
    client: flask.testing.FlaskClient, stored_state: Traces, content_type: str, size: int
) -> None:
    body = Watched(bytes(size))
    chunked = {"wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"}

    response = client.post(URL, input_stream=body, content_type=content_type, environ_overrides=chunked)

    assert (response.status_code, response.json["code"]) == (413, "too_large")
    assert body.bytes_read < 18_000_000
    assert stored_state() == ([], 0)


@pytest.mark.parametrize("what", ["without a key", "too large", "too large, in chunks"])
def test_the_answer_to_a_body_that_is_not_wanted_can_be_read_after_all_was_sent(
    start_server: Callable[..., RunningServer], store: Store, what: str
) -> None:
    id, key = make_key()
    scopes = frozenset({Scope.SUBMIT})
    store.keys.add(KeyRecord(id=id, name="a", sha256=hash_key(key), scopes=scopes, created_at=datetime.now(UTC)))
    address = urlsplit(start_server(MLG_MAX_IMAGE_BYTES="65536").base)
    body = bytes(6_000_000)
    length = f"Content-Length: {len(body)}"
    if what == "too large, in chunks":
        length, body = "Transfer-Encoding: chunked", b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    secret = "none" if what == "without a key" else key
    head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nX-API-Key: {secret}\r\nContent-Type: image/jpeg\r\n{length}\r\n\r\n"

    for _ in range(3):
        with socket.create_connection((address.hostname, address.port), timeout=DEADLINE_SECONDS) as connection:
            connection.sendall(head.encode())
            connection.sendall(body)
            status = connection.recv(100).split()[1]

        assert status == (b"401" if what == "without a key" else b"413")


def test_an_image_of_exactly_the_limit_is_accepted(settings: ServerSettings, store: Store) -> None:
    # A comment segment makes the file as long as wanted.
    filler = 4000 - len(JPEG) - 4
    data = JPEG[:2] + b"\xff\xfe" + struct.pack(">H", filler + 2) + bytes(filler) + JPEG[2:]
    small = ServerSettings(home=settings.home, max_image_bytes=4000)
    client = create_app(small, store).test_client()

    exact = [client.post(URL, data=form(data)), client.post(URL, data=data, content_type="image/jpeg")]
    over = [client.post(URL, data=form(data + b"x")), client.post(URL, data=data + b"x", content_type="image/jpeg")]

    assert [response.status_code for response in exact] == [202, 202]
    assert [response.status_code for response in over] == [413, 413]


def test_a_body_that_ends_early_is_refused(client: flask.testing.FlaskClient, stored_state: Traces) -> None:
    response = client.post(
        URL, data=JPEG, content_type="image/jpeg", environ_overrides={"CONTENT_LENGTH": str(len(JPEG) + 10)}
    )

    assert (response.status_code, response.json["code"]) == (400, "malformed_request")
    assert "ended after" in response.json["reason"]
    assert stored_state() == ([], 0)


@pytest.mark.parametrize(
    ("name", "hint"), [("densenet12", "densenet121"), ("xxceptionn", "xception"), ("zzzz", "mlg models")]
)
def test_an_unknown_model_error_names_the_nearest(
    client: flask.testing.FlaskClient, stored_state: Traces, name: str, hint: str
) -> None:
    response = client.post(f"/requestPrediction/{name}", data=form(JPEG))

    assert (response.status_code, response.json["code"]) == (404, "unknown_model")
    assert hint in response.json["reason"]
    assert stored_state() == ([], 0)


def test_a_model_that_is_not_installed_is_refused_with_the_command(
    client: flask.testing.FlaskClient, stored_state: Traces
) -> None:
    response = client.post("/requestPrediction/DenseNet121", data=form(JPEG))

    assert (response.status_code, response.json["code"]) == (503, "not_installed")
    assert "mlg models compile densenet121" in response.json["reason"]
    assert response.headers["Retry-After"]
    assert stored_state() == ([], 0)


STRANGE_IDS = [
    "nosuchid",
    "0" * 32,
    'x" union select hex(image)||id from requests --',
    "' OR '1'='1",
    "x'; DROP TABLE requests; --",
    "%",
    "../../etc/passwd".replace("/", "\\"),
    "\r\nSet-Cookie: a=b",
    "\x00",
    "café\u202e",
    "9" * 20_000,
]


@pytest.mark.parametrize("id", STRANGE_IDS, ids=range(len(STRANGE_IDS)))
def test_an_unknown_id_is_not_found_whatever_it_looks_like(
    client: flask.testing.FlaskClient, store: Store, id: str
) -> None:
    kept = client.post(URL, data=form(JPEG)).json["req_id"]
    place = quote(id, safe="")

    responses = [
        client.get(f"/readPrediction/{place}"),
        client.post(f"/readPrediction/{place}"),
        client.delete(f"/requests/{place}"),
        client.post(f"/requests/{place}/retry"),
    ]

    assert {(response.status_code, response.json["code"]) for response in responses} == {(404, "unknown_request")}
    assert store.requests.get(kept).id == kept


@pytest.mark.parametrize(
    "query", ["top=0", "top=21", "top=many", "top=", "wait=soon", "wait=-1", "wait=nan", "wait=inf", "depth=3"]
)
def test_a_bad_parameter_of_a_read_is_refused(client: flask.testing.FlaskClient, query: str) -> None:
    id = client.post(URL, data=form(JPEG)).json["req_id"]

    response = client.get(f"/readPrediction/{id}?{query}")

    assert (response.status_code, response.json["code"]) == (400, "invalid_params")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", URL, "POST"),
        ("PUT", URL, "POST"),
        ("DELETE", "/readPrediction/x", "GET"),
        ("PUT", "/requests/x", "DELETE"),
        ("POST", "/models", "GET"),
    ],
)
def test_a_wrong_method_error_names_the_right_ones(
    client: flask.testing.FlaskClient, method: str, path: str, allowed: str
) -> None:
    response = client.open(path, method=method)

    assert (response.status_code, response.json["code"]) == (405, "method_not_allowed")
    assert allowed in response.headers["Allow"]
    assert allowed in response.json["reason"]


@pytest.mark.parametrize("path", ["/nothing", "/requestPrediction", "/readPrediction/a/b", "/requests/a/b"])
def test_an_unknown_route_is_a_json_404(client: flask.testing.FlaskClient, path: str) -> None:
    response = client.get(path)

    assert (response.status_code, response.json["code"], response.is_json) == (404, "not_found", True)


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("kitten.jpg", "kitten.jpg"),
        ("../../etc/passwd", "passwd"),
        ("C:\\photos\\kitten.jpg", "kitten.jpg"),
        ("/", None),
        ("", None),
        ("a\r\nSet-Cookie: b\x00\x1b[31m.jpg", "aSet-Cookie: b[31m.jpg"),
        ("\u202egpj.exe", "gpj.exe"),
        ("\udcff.jpg", ".jpg"),
        ("kätzchen 猫.jpg", "kätzchen 猫.jpg"),
        ("x" * 500, "x" * 200),
    ],
)
def test_a_file_name_is_only_a_label(sent: str, kept: str | None) -> None:
    assert clean_name(sent) == kept


def test_a_path_in_the_file_name_is_ignored(
    client: flask.testing.FlaskClient, settings: ServerSettings, store: Store, stored_state: Traces
) -> None:
    id = client.post(URL, data=form(JPEG, "../../../evil%0d%0a.jpg")).json["req_id"]

    files, rows = stored_state()
    assert (len(files), rows) == (1, 1)
    assert files[0].endswith(store.requests.get(id).image_sha256)
    assert store.requests.get(id).name == "evil%0d%0a.jpg"
