"""Fetching images by URL: what is refused by its notation or its address, and what a hostile host may try."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import flask.testing
import pytest

from provider_image.errors import MlgError, TooManyBytes
from server import http_client
from server.app import create_app
from server.errors import FetchFailed, UrlRefused
from server.http_client import HttpClient, check_url, is_public, resolve_host
from server.intake.url_fetcher import fetch
from server.settings import ServerSettings
from store.store import Store
from tests.programs import find_program
from tests.timing import DEADLINE_SECONDS, slowness

HOST = "photos.example.com"
#: A public address by IANA's registry; the tests' connections do not go there.
PUBLIC = "93.184.215.14"
URL = f"https://{HOST}/kitten.jpg"

# What a URL looks like


@pytest.mark.parametrize(
    ("url", "host", "target"),
    [
        ("https://example.com", "example.com", "/"),
        ("https://Example.COM:443/a/b.jpg?x=1&y=%20#part", "example.com", "/a/b.jpg?x=1&y=%20"),
        ("https://xn--bcher-kva.example/a.png", "xn--bcher-kva.example", "/a.png"),
        ("HTTPS://my_bucket.storage.example.org/a@b", "my_bucket.storage.example.org", "/a@b"),
        ("https://1.2.3.example.com/", "1.2.3.example.com", "/"),
        ("https://example.com:/", "example.com", "/"),
        ("https://example.com?q", "example.com", "/?q"),
    ],
)
def test_a_plain_https_url_is_accepted(url: str, host: str, target: str) -> None:
    checked = check_url(url)

    assert (checked.host, checked.path) == (host, target)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "kitten.jpg",
        "//example.com/a",
        "http://example.com/a",
        "ftp://example.com/a",
        "file:///etc/passwd",
        "gopher://example.com/",
        "data:image/png;base64,AAAA",
        "https:example.com",
        "https:///example.com",
        "https://",
        # Other ports
        "https://example.com:80/",
        "https://example.com:8443/",
        "https://example.com:0/",
        "https://example.com:99999/",
        "https://example.com:x/",
        # Credentials, and hosts that hide behind them
        "https://user@example.com/",
        "https://user:password@example.com/",
        "https://example.com@127.0.0.1/",
        "https://example.com%40127.0.0.1/",
        "https://example.com\\@127.0.0.1/",
        "https://127.0.0.1\\.example.com/",
        # Addresses, in every notation
        "https://127.0.0.1/",
        "https://93.184.215.14/",
        "https://127.1/",
        "https://127.0.1/",
        "https://2130706433/",
        "https://017700000001/",
        "https://0177.0.0.1/",
        "https://0x7f000001/",
        "https://0x7f.0.0.1/",
        "https://0x7f.1/",
        "https://127.0.0.0x1/",
        "https://0/",
        "https://[::1]/",
        "https://[::ffff:127.0.0.1]/",
        "https://[::ffff:7f00:1]/",
        "https://[64:ff9b::7f00:1]/",
        "https://[2002:7f00:1::]/",
        "https://[fe80::1%25eth0]/",
        "https://[2606:2800:220:1::1]/",
        "https://[v1.x]/",
        "https://[::1/",
        # Names of this machine and its neighbours
        "https://localhost/",
        "https://LOCALHOST/",
        "https://a.localhost/",
        "https://metadata/",
        "https://metadata.google.internal/",
        "https://printer.local/",
        "https://nas.lan/",
        "https://router.home.arpa/",
        # Dots, and signs that are read in several ways
        "https://example.com./",
        "https://127.0.0.1./",
        "https://localhost./",
        "https://.example.com/",
        "https://example..com/",
        "https://-example.com/",
        "https://example.com-/",
        "https://exam%70le.com/",
        "https://127%2e0%2e0%2e1/",
        "https://ex ample.com/",
        "https://example.com/a b",
        "https://example.com/\r\nHost: x",
        "https://example.com/\x00",
        " https://example.com/",
        "ht\ntps://example.com/",
        # Signs that IDNA maps to ASCII: circled and full-width digits, an ideographic full stop, a soft hyphen
        "https://①②⑦.⓪.⓪.①/",
        "https://１２７.０.０.１/",
        "https://127。0。0。1/",
        "https://loc\u00adalhost/",
        "https://ⓛocalhost/",
        "https://bücher.example/",
        "https://example.com/ü.png",
        "https://" + "a" * 64 + ".com/",
        "https://" + "a." * 130 + "com/",
        "https://example.com/" + "a" * 2048,
    ],
)
def test_every_other_url_is_refused(url: str) -> None:
    with pytest.raises(UrlRefused):
        check_url(url)


# Whose an address is


@pytest.mark.parametrize(
    "address",
    [
        PUBLIC,
        "1.1.1.1",
        "9.255.255.255",
        "100.63.255.255",
        "100.128.0.0",
        "172.15.255.255",
        "172.32.0.0",
        "223.255.255.255",
        "2606:4700::1111",
        "2001:200::1",
        "::ffff:1.1.1.1",
        "64:ff9b::101:101",
    ],
)
def test_a_public_address_is_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.1",
        "100.64.0.1",
        "100.100.100.200",  # metadata of a cloud
        "100.127.255.255",
        "127.0.0.1",
        "127.255.255.254",
        "168.63.129.16",  # a cloud's own
        "169.254.169.254",  # metadata of most clouds
        "169.254.170.2",  # credentials of containers
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.192",  # metadata of a cloud
        "192.0.2.1",
        "192.88.99.1",
        "192.168.0.1",
        "198.18.0.1",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",  # IPv4-compatible
        "::ffff:127.0.0.1",
        "::ffff:a9fe:a9fe",
        "::ffff:0:127.0.0.1",  # IPv4-translated
        "64:ff9b::7f00:1",
        "64:ff9b::169.254.169.254",
        "64:ff9b:1::1",  # NAT64 of a private network
        "100::1",
        "2001::1",  # Teredo
        "2001:2::1",
        "2001:db8::1",
        "2002:7f00:1::1",
        "2002:5db8:d822::1",
        "3fff::1",
        "fc00::1",
        "fd00:ec2::254",  # metadata of a cloud
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
        "2606:4700::5efe:10.0.0.1",  # ISATAP
        "2606:4700::200:5efe:10.0.0.1",
        "not an address",
        "",
        "127.1",
        "0177.0.0.1",
    ],
)
def test_every_other_address_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("addresses", [["127.0.0.1"], [PUBLIC, "10.0.0.1"], ["::ffff:169.254.169.254"], ["fe80::1%lo"]])
def test_a_name_with_an_address_that_is_not_public_is_never_connected_to(addresses: list[str]) -> None:
    with pytest.raises(UrlRefused) as refusal:
        fetch_with(resolve=lambda *_: addresses, connect=no_connection)

    assert not any(address in refusal.value.reason for address in addresses)


def test_a_name_without_an_address_is_reported() -> None:
    def resolve(host: str, seconds: float) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    with pytest.raises(FetchFailed, match="no address"):
        fetch_with(resolve=resolve, connect=no_connection)


def test_a_resolver_that_does_not_answer_is_abandoned_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(DEADLINE_SECONDS) and [])

    with pytest.raises(FetchFailed, match="too long"):
        fetch_with(seconds=0.1, connect=no_connection)

    release.set()


def test_the_systems_resolver_is_used() -> None:
    assert set(resolve_host("localhost", 10)) <= {"127.0.0.1", "::1"}


def no_connection(address: str, port: int, seconds: float) -> socket.socket:
    raise AssertionError(f"connected to {address}")


def fetch_with(*, seconds: float = 5, **network: Any) -> bytes:
    """Fetch with another resolver, connection or trust store."""
    return fetch(URL, max_image_bytes=100, seconds=seconds, http_client=HttpClient(**network))


# A host that answers


class Host:
    """A TLS server for HOST on this machine, which answers each connection with what a test wants.

    :param tls_context: holds its self-made certificate.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self._context = context
        self.tls_context = ssl.create_default_context(cafile=str(certificate))
        self._listener = socket.create_server(("127.0.0.1", 0))
        #: What each connection asked for: request line and headers.
        self.requests: list[str] = []
        #: Addresses that were connected to.
        self.addresses: list[str] = []
        self._answers: list[bytes | Callable[[ssl.SSLSocket], None]] = []
        self.is_over = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    def fetch(
        self,
        *answers: bytes | Callable[[ssl.SSLSocket], None],
        url: str = URL,
        seconds: float = 10,
        is_trusted: bool = True,
    ) -> bytes:
        """Fetch a URL from this host, whatever address the name has."""
        self._answers += answers
        client = HttpClient(
            resolve=lambda *_: [PUBLIC], connect=self.connect, tls_context=self.tls_context if is_trusted else None
        )
        return fetch(url, max_image_bytes=1000, seconds=seconds, http_client=client)

    def connect(self, address: str, port: int, seconds: float) -> socket.socket:
        assert port == 443
        self.addresses.append(address)
        return socket.create_connection(self._listener.getsockname(), timeout=seconds)

    def close(self) -> None:
        self.is_over.set()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            try:
                with self._context.wrap_socket(plain, server_side=True) as secure:
                    request = b""
                    while b"\r\n\r\n" not in request and (piece := secure.recv(4096)):
                        request += piece
                    self.requests.append(request.decode())
                    answer = self._answers.pop(0)
                    if isinstance(answer, bytes):
                        secure.sendall(answer)
                    else:
                        answer(secure)
            except OSError:
                continue  # the client went away, as some tests want


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for HOST that signs itself, and its key."""
    find_program("openssl", package="openssl")
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST}"),
            *("-out", str(files[0]), "-keyout", str(files[1])),
        ],
        check=True,
        capture_output=True,
        timeout=DEADLINE_SECONDS,
    )
    return files


@pytest.fixture
def host(certificate: tuple[Path, Path]) -> Iterator[Host]:
    made = Host(*certificate)
    yield made
    made.close()


def ok(body: bytes, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", *(headers or (f"Content-Length: {len(body)}",)), "", ""]
    return "\r\n".join(lines).encode() + body


def redirect(where: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Moved\r\nLocation: {where}\r\nContent-Length: 0\r\n\r\n".encode()


def test_an_image_is_fetched_from_the_address_that_was_checked(host: Host) -> None:
    data = host.fetch(ok(b"an image"), url=f"{URL}?size=1#part")

    lines = host.requests[0].split("\r\n")
    assert data == b"an image"
    assert host.addresses == [PUBLIC]
    assert lines[0] == "GET /kitten.jpg?size=1 HTTP/1.1"
    assert f"Host: {HOST}" in lines
    assert "Accept-Encoding: identity" in lines
    assert not [line for line in lines if line.lower().startswith(("cookie", "authorization", "referer"))]


def test_the_environments_proxy_is_not_used(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")

    assert host.fetch(ok(b"x")) == b"x"


@pytest.mark.parametrize(
    "answer",
    [
        ok(b"x" * 1000),
        ok(b"x" * 1000, "Connection: close"),
        ok(b"3e8\r\n" + b"x" * 1000 + b"\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
    ],
)
def test_an_image_of_exactly_the_limit_is_fetched(host: Host, answer: bytes) -> None:
    assert host.fetch(answer) == b"x" * 1000


@pytest.mark.parametrize(
    "answer",
    [
        ok(b"x" * 1001),
        ok(b"", "Content-Length: 99999999999"),
        ok(b"x" * 1001, "Connection: close"),
        ok(b"3e9\r\n" + b"x" * 1001 + b"\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
    ],
)
def test_more_bytes_than_the_limit_are_refused(host: Host, answer: bytes) -> None:
    with pytest.raises(TooManyBytes):
        host.fetch(answer)


def test_a_body_without_end_is_refused_at_the_limit(host: Host) -> None:
    def pour(secure: ssl.SSLSocket) -> None:
        secure.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while not host.is_over.is_set():
            secure.sendall(b"x" * 1000)

    with pytest.raises(TooManyBytes):
        host.fetch(pour)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (ok(b"half", "Content-Length: 100"), "middle|ended"),
        (ok(b"64\r\nhalf", "Transfer-Encoding: chunked"), "ended"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "404"),
        (b"HTTP/1.1 304 Not Modified\r\n\r\n", "304"),
        (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", "302"),
        (ok(b"x", "Content-Encoding: gzip"), "Content-Encoding"),
        (b"SSH-2.0-OpenSSH\r\n", "HTTP"),
        (b"", "HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n", "HTTP"),
    ],
)
def test_a_response_without_an_image_is_reported(host: Host, answer: bytes, reason: str) -> None:
    with pytest.raises(FetchFailed, match=reason):
        host.fetch(answer)


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param((b"H", b"T"), id="status line"),
        pytest.param((b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"), id="headers"),
        pytest.param((b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"), id="continue"),
        pytest.param((b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n", b"x"), id="body"),
        pytest.param((b"", b""), id="nothing"),
    ],
)
def test_a_slow_host_is_cut_off_in_time(host: Host, pieces: tuple[bytes, bytes]) -> None:
    def drip(secure: ssl.SSLSocket) -> None:
        first, again = pieces
        secure.sendall(first or b"")
        while not host.is_over.wait(0.02):
            if again:
                secure.sendall(again)

    started_at = time.monotonic()
    with pytest.raises(FetchFailed, match="too long"):
        host.fetch(drip, seconds=0.4)

    assert time.monotonic() - started_at < 5 * slowness()


def test_a_host_without_a_tls_handshake_is_cut_off_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(FetchFailed, match="too long"):
        fetch_with(
            seconds=0.3,
            resolve=lambda *_: [PUBLIC],
            connect=lambda _, port, seconds: socket.create_connection(silent.getsockname(), timeout=seconds),
        )


def test_a_host_that_refuses_the_connection_is_reported() -> None:
    def refuse(address: str, port: int, seconds: float) -> socket.socket:
        raise ConnectionRefusedError

    with pytest.raises(FetchFailed, match="does not answer"):
        fetch_with(resolve=lambda *_: [PUBLIC], connect=refuse)


def test_a_certificate_that_the_system_does_not_trust_is_refused(host: Host) -> None:
    with pytest.raises(FetchFailed, match="certificate"):
        host.fetch(ok(b"x"), is_trusted=False)


def test_a_certificate_for_another_name_is_refused(host: Host) -> None:
    with pytest.raises(FetchFailed, match="certificate"):
        host.fetch(ok(b"x"), url="https://other.example.com/kitten.jpg")


def test_this_machine_is_not_connected_to_by_its_public_address(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "is_public", lambda address: True)

    with pytest.raises(UrlRefused):
        fetch_with(resolve=lambda *_: ["127.0.0.1"], connect=host.connect)


# Redirects


@pytest.mark.parametrize("where", ["/b.jpg", f"https://{HOST}/b.jpg", f"https://{HOST}:443/b.jpg", "b.jpg", "?b.jpg"])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_on_the_same_host_is_followed(host: Host, where: str, status: int) -> None:
    data = host.fetch(redirect(where, status), ok(b"an image"))

    assert data == b"an image"
    assert "b.jpg HTTP/1.1" in host.requests[1]
    assert host.addresses == [PUBLIC, PUBLIC]


@pytest.mark.parametrize(
    "where",
    [
        "https://other.example.com/a.jpg",
        f"http://{HOST}/a.jpg",
        f"https://{HOST}:8443/a.jpg",
        f"https://user@{HOST}/a.jpg",
        "//other.example.com/a.jpg",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://[broken/",
        "file:///etc/passwd",
        "https://localhost/",
        "/with space",
        "/" + "a" * 3000,
    ],
)
def test_a_redirect_elsewhere_is_refused(host: Host, where: str) -> None:
    with pytest.raises(UrlRefused):
        host.fetch(redirect(where))

    assert len(host.requests) == 1


def test_the_address_is_checked_again_at_each_redirect(host: Host) -> None:
    host._answers.append(redirect("/b.jpg"))
    addresses = [[PUBLIC], ["127.0.0.1"]]

    with pytest.raises(UrlRefused):
        fetch_with(resolve=lambda *_: addresses.pop(0), connect=host.connect, tls_context=host.tls_context)

    assert host.addresses == [PUBLIC]


def test_three_redirects_are_followed_and_not_four(host: Host) -> None:
    assert host.fetch(*[redirect("/again")] * 3, ok(b"x")) == b"x"

    with pytest.raises(FetchFailed, match="more than 3"):
        host.fetch(*[redirect("/again")] * 4)


def test_redirects_share_one_time_limit(host: Host) -> None:
    def late(secure: ssl.SSLSocket) -> None:
        host.is_over.wait(0.25)
        secure.sendall(redirect("/again"))

    with pytest.raises(FetchFailed, match="too long"):
        host.fetch(late, late, late, late, seconds=0.4)


# The API


def api(settings: ServerSettings, store: Store) -> flask.testing.FlaskClient:
    return create_app(replace(settings, fetches_urls=True), store).test_client()


def test_fetching_is_off_unless_the_operator_allows_it(client: flask.testing.FlaskClient, store: Store) -> None:
    answer = client.post("/requestPrediction/efficientnet_lite0", json={"url": URL})

    assert (answer.status_code, answer.json["code"]) == (403, "fetching_is_off")
    assert "MLG_FETCH_URLS=1" in answer.json["reason"]
    assert not store.requests.list()


def test_an_image_by_its_url_is_kept_like_any_other(
    settings: ServerSettings,
    store: Store,
    photos: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def fetch_here(url: str, **facts: object) -> bytes:
        asked.append((url, facts))
        return photos["rocket"]

    monkeypatch.setattr("server.intake.staging.fetch", fetch_here)

    answer = api(settings, store).post(
        "/requestPrediction/efficientnet_lite0", json={"url": f"{URL}?a=%2F", "fresh": True, "top": 3}
    )

    assert answer.status_code == 202
    assert answer.json["status_url"].endswith("?top=3")
    request = store.requests.get(answer.json["req_id"])
    assert request.name == "kitten.jpg"
    assert store.images.read(request.image_sha256) == photos["rocket"]
    assert asked == [(f"{URL}?a=%2F", {"max_image_bytes": settings.max_image_bytes, "seconds": settings.fetch_seconds})]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "malformed_request"),
        (b"{", "malformed_request"),
        (b"[" * 8000, "malformed_request"),
        (b"[]", "malformed_request"),
        (b"{}", "malformed_request"),
        (b'{"url": ["https://example.com/"]}', "malformed_request"),
        (b'{"url": null}', "malformed_request"),
        (b'{"url": "https://127.0.0.1/"}', "url_refused"),
        (b'{"url": "http://example.com/"}', "url_refused"),
        (b'{"url": 5}', "url_refused"),
        (b'{"url": "https://example.com/", "x": "' + b"x" * 9000 + b'"}', "too_large"),
    ],
)
def test_a_body_without_a_valid_url_is_refused(settings: ServerSettings, store: Store, body: bytes, code: str) -> None:
    answer = api(settings, store).post(
        "/requestPrediction/efficientnet_lite0", data=body, content_type="application/json"
    )

    assert (answer.status_code, answer.json["code"]) == (413 if code == "too_large" else 400, code)
    assert not store.requests.list()


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(FetchFailed("It took too long."), 502, "fetch_failed"), (UrlRefused(), 400, "url_refused")],
)
def test_a_failed_fetch_is_reported(
    settings: ServerSettings,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    error: MlgError,
    status: int,
    code: str,
) -> None:
    def fail(url: str, **facts: object) -> bytes:
        raise error

    monkeypatch.setattr("server.intake.staging.fetch", fail)

    answer = api(settings, store).post("/requestPrediction/efficientnet_lite0", json={"url": URL})

    assert (answer.status_code, answer.json) == (status, {"success": False, "reason": error.reason, "code": code})


def test_a_fetched_file_that_is_not_an_image_is_refused(
    settings: ServerSettings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.intake.staging.fetch", lambda url, **facts: b"<html>secrets</html>")

    answer = api(settings, store).post("/requestPrediction/efficientnet_lite0", json={"url": URL})

    assert (answer.status_code, answer.json["code"]) == (400, "not_an_image")
    assert "secrets" not in answer.text
    assert not store.requests.list()
