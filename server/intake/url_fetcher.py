"""Fetches a picture by its URL, without letting the client use this machine to look at other things.

Called by the view that takes pictures. The dangers are addresses that only this machine reaches, in any spelling, and
servers that answer slowly or without end. So:

- The URL must be https on port 443, in plain ASCII, and name a host: addresses in any notation are refused.
- The host is resolved once. Every address found must be public, and the connection goes to one that was checked; the
  certificate must be good for the name, by the trust store of this system.
- A redirect is followed to the same host only, checked like the first URL, three times at most.
- The whole, redirects included, has one time limit: a watch cuts the connection, however the other side drips.
- No proxy of the environment is used, no credentials are sent, and errors name no addresses.

Weakness: the system's resolver knows no time limit, so a thread that waits for it may outlive its fetch for a while.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import ipaddress
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from urllib.parse import urljoin, urlsplit

from server.errors import FetchFailed, UrlRefused
from server.intake.uploads import too_many_bytes

#: Redirects that are followed.
MAX_REDIRECTS = 3
MAX_URL_LENGTH = 2048
_BUFFER_BYTES = 64 * 1024
_PORT = 443
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
#: At least two labels; the last begins with a letter, which no notation of an IPv4 address does.
_HOST = re.compile(r"(?:[a-z0-9](?:[a-z0-9_-]{0,61}[a-z0-9])?\.)+[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?")
#: Names that are never public.
_PRIVATE_NAMES = (".localhost", ".local", ".localdomain", ".internal", ".intranet", ".lan", ".home.arpa", ".onion")

# From the IANA registries of special-purpose addresses. Written out, as `ipaddress` answers differently from one
# version of Python to the next.
_NON_PUBLIC_IPV4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carrier-grade NAT; a cloud keeps its metadata here
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # looks public, but is a cloud's service to its own machines
        "169.254.0.0/16",  # link-local; most clouds keep their metadata here
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocols; a cloud keeps its metadata here
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
_PUBLIC_IPV6 = ipaddress.IPv6Network("2000::/3")
_NON_PUBLIC_IPV6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocols: Teredo, benchmarks, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "2620:4f:8000::/48",  # AS112
        "3ffe::/16",  # was the 6bone
        "3fff::/20",  # documentation
    )
)
#: The last 32 bits are the IPv4 address that a gateway connects to.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

Resolve = Callable[[str, float], list[str]]
Connect = Callable[[str, float], socket.socket]


def is_public(address: str) -> bool:
    """Tell whether an IP address, as a resolver writes it, belongs to a host on the public internet."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv4Address):
        return not any(parsed in network for network in _NON_PUBLIC_IPV4)
    if parsed.scope_id is not None:
        return False
    if parsed.ipv4_mapped is not None:
        return is_public(str(parsed.ipv4_mapped))
    if parsed in _NAT64:
        return is_public(str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)))
    # ISATAP also carries an IPv4 address, behind any prefix.
    if (int(parsed) >> 32) & 0xFDFFFFFF == 0x5EFE:
        return False
    return parsed in _PUBLIC_IPV6 and not any(parsed in network for network in _NON_PUBLIC_IPV6)


def check_url(url: str) -> tuple[str, str]:
    """Check a URL as it is written. :return: host, and path with query. :raises UrlRefused:"""
    if len(url) > MAX_URL_LENGTH:
        raise UrlRefused(f"The URL is longer than {MAX_URL_LENGTH} characters.")
    # What browsers and resolvers read differently from each other is not read at all.
    if not re.fullmatch(r"[!-~]+", url) or "\\" in url:
        raise UrlRefused("The URL has signs that must be written as %XX, or a host that must be written as xn--.")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UrlRefused() from error
    if parts.scheme != "https":
        raise UrlRefused("Only https URLs are fetched.")
    if "@" in parts.netloc:
        raise UrlRefused("A URL with a user name or a password is not fetched.")
    if "[" in parts.netloc:
        raise UrlRefused("The URL must name a host, not an address.")
    if port not in (None, _PORT):
        raise UrlRefused(f"Only port {_PORT} is asked.")
    host = parts.hostname or ""
    if len(host) > 253 or not _HOST.fullmatch(host) or host.endswith(_PRIVATE_NAMES):
        raise UrlRefused("The URL must name a public host, such as https://example.org/kitten.jpg")
    target = parts.path or "/"
    return host, f"{target}?{parts.query}" if parts.query else target


def fetch(
    url: str,
    *,
    max_image_bytes: int,
    seconds: float,
    resolve: Resolve | None = None,
    connect: Connect | None = None,
    tls_context: ssl.SSLContext | None = None,
) -> bytes:
    """Fetch what is at a URL.

    :param seconds: limit for the whole.
    :param resolve: gives the addresses of a host within some seconds.
    :param connect: opens a connection to port 443 of an address within some seconds.
    :raises UrlRefused: :raises FetchFailed: :raises TooManyBytes:
    """
    give_up_at = time.monotonic() + seconds
    first_host, target = check_url(url)
    for _ in range(MAX_REDIRECTS + 1):
        found = _fetch_one(
            first_host,
            target,
            max_image_bytes=max_image_bytes,
            give_up_at=give_up_at,
            resolve=resolve or resolve_host,
            connect=connect or connect_to,
            tls_context=tls_context or _system_tls_context(),
        )
        if isinstance(found, bytes):
            return found
        try:
            url = urljoin(f"https://{first_host}{target}", found)
        except ValueError as error:
            raise UrlRefused("The host redirects to something that is no URL.") from error
        host, target = check_url(url)
        if host != first_host:
            raise UrlRefused("The URL redirects to another host. Send the URL that it leads to.")
    raise FetchFailed(f"The URL redirects more than {MAX_REDIRECTS} times.")


def resolve_host(host: str, seconds: float) -> list[str]:
    """Ask the system for a host's addresses. :raises OSError: there are none. :raises TimeoutError:"""
    found: queue.Queue[list[str] | OSError] = queue.Queue()

    def look_up() -> None:
        try:
            rows = socket.getaddrinfo(host, _PORT, type=socket.SOCK_STREAM)
            found.put([str(row[4][0]) for row in rows])
        except (OSError, UnicodeError) as error:
            found.put(error if isinstance(error, OSError) else OSError(str(error)))

    threading.Thread(target=look_up, name="resolve", daemon=True).start()
    try:
        result = found.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(result, OSError):
        raise result
    return result


def connect_to(address: str, seconds: float) -> socket.socket:
    """Open a connection to an address; nothing is resolved any more. :raises OSError:"""
    return socket.create_connection((address, _PORT), timeout=seconds)


@functools.cache
def _system_tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()


def _seconds_left(give_up_at: float) -> float:
    """Return the seconds that are left. :raises FetchFailed: none are."""
    seconds = give_up_at - time.monotonic()
    if seconds <= 0:
        raise FetchFailed("Fetching the picture took too long.")
    return seconds


def _fetch_one(
    host: str,
    target: str,
    *,
    max_image_bytes: int,
    give_up_at: float,
    resolve: Resolve,
    connect: Connect,
    tls_context: ssl.SSLContext,
) -> bytes | str:
    """Ask once. :return: the body, or where it redirects to."""
    address = _resolve_public_address(host, resolve, give_up_at)
    try:
        plain = connect(address, _seconds_left(give_up_at))
    except OSError as error:
        raise FetchFailed("The URL's host does not answer.") from error
    with contextlib.closing(plain):
        try:
            if plain.getsockname()[0] == address:
                raise UrlRefused("The URL's host is not public.")  # it is this very machine
            plain.settimeout(_seconds_left(give_up_at))
            secure = tls_context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
            with contextlib.closing(secure), _abort_at(give_up_at, secure):
                secure.do_handshake()
                found = _request(secure, host, target, max_image_bytes)
            # A connection that was cut looks like one that ended, and half an answer like a whole one.
            _seconds_left(give_up_at)
            return found
        except FetchFailed:
            _seconds_left(give_up_at)
            raise
        except ssl.SSLCertVerificationError as error:
            raise FetchFailed("The certificate of the URL's host is not good.") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            _seconds_left(give_up_at)
            raise FetchFailed("The URL's host ended the connection, or does not speak HTTP over TLS.") from error


def _resolve_public_address(host: str, resolve: Resolve, give_up_at: float) -> str:
    """Find the address to ask. :raises UrlRefused: one of the host's addresses is not public. :raises FetchFailed:"""
    try:
        addresses = resolve(host, _seconds_left(give_up_at))
    except OSError as error:
        _seconds_left(give_up_at)
        raise FetchFailed("The URL's host has no address.") from error
    if not addresses:
        raise FetchFailed("The URL's host has no address.")
    # All of them: a host with public and private addresses is a trick, or was set up by mistake.
    if not all(map(is_public, addresses)):
        raise UrlRefused("The URL's host is not public.")
    return addresses[0]


def _request(secure: ssl.SSLSocket, host: str, target: str, max_image_bytes: int) -> bytes | str:
    connection = http.client.HTTPConnection(host, _PORT)
    connection.sock = secure
    connection.request("GET", target, headers={"Host": host, "User-Agent": "mlg", "Connection": "close"})
    with contextlib.closing(connection.getresponse()) as response:
        location = response.headers.get("Location")
        if response.status in _REDIRECTS and location is not None:
            return location
        if response.status != 200:
            raise FetchFailed(f"The URL's host answers with status {response.status}.")
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise FetchFailed("The URL's host sends the picture in a Content-Encoding that was not asked for.")
        if (response.length or 0) > max_image_bytes:
            raise too_many_bytes(max_image_bytes)
        pieces: list[bytes] = []
        size = 0
        while piece := response.read(_BUFFER_BYTES):
            size += len(piece)
            if size > max_image_bytes:
                raise too_many_bytes(max_image_bytes)
            pieces.append(piece)
        if response.length:
            raise FetchFailed("The URL's host ended the connection in the middle of the picture.")
        return b"".join(pieces)


@contextlib.contextmanager
def _abort_at(give_up_at: float, connection: socket.socket) -> Iterator[None]:
    """Cut a connection at a time: a limit for each read would let a host drip for ever."""

    def abort() -> None:
        with contextlib.suppress(OSError):
            # The plain socket's own: the secure one's would take the reading thread's state away.
            socket.socket.shutdown(connection, socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, give_up_at - time.monotonic()), abort)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
