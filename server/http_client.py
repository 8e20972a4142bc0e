"""An HTTP client for URLs that others give: it never connects to anything but what was checked.

Used to fetch images (`server/intake/url_fetcher.py`) and to send webhooks (`server/webhooks.py`). The dangers are
addresses that only this machine reaches, in any notation, and servers that answer slowly or without end. So:

- A URL must be https on port 443, in plain ASCII, and name a host: addresses in any notation are refused.
- The host is resolved once. Every address found must be public, and the connection goes to one that was checked; the
  certificate must be valid for the name, by the trust store of this system.
- A request has one time limit for everything: a timer closes the connection, however slowly the other side sends.
- Redirects are left to the caller. No proxy of the environment is used, no credentials are sent, and errors name no
  addresses.

A client with `allows_private` leaves out the checks of URL and address, for receivers in a private network.

Weakness: the system's resolver has no time limit, so a thread that waits for it may outlive its request for a while.
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from provider_image.errors import MlgError
from server.errors import UrlRefused

MAX_URL_LENGTH = 2048
_PORT = 443
#: At least two labels; the last begins with a letter, which no notation of an IPv4 address does.
_HOST = re.compile(r"(?:[a-z0-9](?:[a-z0-9_-]{0,61}[a-z0-9])?\.)+[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?")
#: Names that are never public.
_PRIVATE_NAMES = (".localhost", ".local", ".localdomain", ".internal", ".intranet", ".lan", ".home.arpa", ".onion")

# From the IANA registries of special-purpose addresses. Written out, because `ipaddress` differs between versions of
# Python.
_NON_PUBLIC = tuple(
    ipaddress.ip_network(network)
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
        "2001::/23",  # protocols: Teredo, benchmarks, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "2620:4f:8000::/48",  # AS112
        "3ffe::/16",  # was the 6bone
        "3fff::/20",  # documentation
    )
)
_PUBLIC_IPV6 = ipaddress.IPv6Network("2000::/3")
#: The last 32 bits are the IPv4 address that a gateway connects to.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class RequestFailed(MlgError):
    """The host could not be reached."""

    # Callers turn it into an error of theirs.
    code = "error"


def is_public(address: str) -> bool:
    """Tell whether an IP address, as a resolver writes it, belongs to a host on the public internet."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if any(parsed in network for network in _NON_PUBLIC):
        return False
    if isinstance(parsed, ipaddress.IPv4Address):
        return True
    if parsed.scope_id is not None:
        return False
    if parsed.ipv4_mapped is not None:
        return is_public(str(parsed.ipv4_mapped))
    if parsed in _NAT64:
        return is_public(str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)))
    # ISATAP also carries an IPv4 address, behind any prefix.
    if (int(parsed) >> 32) & 0xFDFFFFFF == 0x5EFE:
        return False
    return parsed in _PUBLIC_IPV6


@dataclass(frozen=True, kw_only=True)
class Target:
    """A URL that was checked."""

    host: str
    path: str
    port: int = _PORT
    is_secure: bool = True
    host_header: str


def check_url(url: str, *, allows_private: bool = False) -> Target:
    """Check a URL as it is written; nothing is resolved.

    :param allows_private: accept any http or https URL.
    :raises UrlRefused:
    """
    if len(url) > MAX_URL_LENGTH:
        raise UrlRefused(f"The URL is longer than {MAX_URL_LENGTH} characters.")
    # What browsers and resolvers read differently from each other is not read at all.
    if not re.fullmatch(r"[!-~]+", url) or (not allows_private and "\\" in url):
        raise UrlRefused("The URL has characters that must be written as %XX, or a host that must be written as xn--.")
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname or ""
    except ValueError as error:
        raise UrlRefused() from error
    if "@" in parts.netloc:
        raise UrlRefused("A URL must not have a user name or a password.")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if allows_private:
        if parts.scheme not in ("http", "https") or not host or port == 0:
            raise UrlRefused("The URL must be like http://10.0.0.5:8080/hook or https://example.org/hook")
        is_secure = parts.scheme == "https"
        port = port or (_PORT if is_secure else 80)
        return Target(host=host, path=path, port=port, is_secure=is_secure, host_header=parts.netloc)
    if parts.scheme != "https":
        raise UrlRefused("The URL must begin with https://")
    if "[" in parts.netloc:
        raise UrlRefused("The URL must name a host, not an address.")
    if port not in (None, _PORT):
        raise UrlRefused(f"The URL's port must be {_PORT}.")
    if len(host) > 253 or not _HOST.fullmatch(host) or host.endswith(_PRIVATE_NAMES):
        raise UrlRefused("The URL must name a public host, such as https://example.org/kitten.jpg")
    return Target(host=host, path=path, host_header=host)


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


def connect_to(address: str, port: int, seconds: float) -> socket.socket:
    """Open a connection to an address; nothing is resolved. :raises OSError:"""
    return socket.create_connection((address, port), timeout=seconds)


@dataclass(frozen=True, kw_only=True)
class HttpClient:
    """Sends requests; may be used from any thread. The last three fields are for tests."""

    #: Connect also to private addresses, other ports, and without TLS.
    allows_private: bool = False
    #: Returns the addresses of a host, within some seconds.
    resolve: Callable[[str, float], list[str]] = resolve_host
    #: Opens a connection to a port of an address, within some seconds.
    connect: Callable[[str, int, float], socket.socket] = connect_to
    #: None uses the trust store of the system.
    tls_context: ssl.SSLContext | None = None

    @contextlib.contextmanager
    def request(
        self,
        method: str,
        url: str,
        *,
        give_up_at: float,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a request; the response is read inside of the `with` statement.

        :param give_up_at: when everything must be over, reading included, by time.monotonic().
        :raises UrlRefused: the URL is not accepted, or its host is not public.
        :raises RequestFailed: also for errors while the response is read.
        """
        target = check_url(url, allows_private=self.allows_private)
        address = self._resolve(target.host, give_up_at)
        try:
            plain = self.connect(address, target.port, _seconds_left(give_up_at))
        except OSError as error:
            _seconds_left(give_up_at)
            raise RequestFailed("The host does not answer.") from error
        try:
            with contextlib.ExitStack() as stack:
                channel: socket.socket = stack.enter_context(contextlib.closing(plain))
                if not self.allows_private and channel.getsockname()[0] == address:
                    raise UrlRefused("The URL's host is not public.")  # it is this very machine
                channel.settimeout(_seconds_left(give_up_at))
                if target.is_secure:
                    tls_context = self.tls_context or _system_tls_context()
                    secure = tls_context.wrap_socket(
                        channel, server_hostname=target.host, do_handshake_on_connect=False
                    )
                    channel = stack.enter_context(contextlib.closing(secure))
                stack.enter_context(_abort_at(give_up_at, channel))
                if isinstance(channel, ssl.SSLSocket):
                    channel.do_handshake()
                connection = http.client.HTTPConnection(target.host, target.port)
                connection.sock = channel
                always = {"Host": target.host_header, "User-Agent": "mlg", "Connection": "close"}
                connection.request(method, target.path, body=body, headers={**always, **(headers or {})})
                yield stack.enter_context(contextlib.closing(connection.getresponse()))
            # A connection that was cut looks like one that ended, and half a response like a whole one.
            _seconds_left(give_up_at)
        except UrlRefused:
            raise
        except MlgError:
            _seconds_left(give_up_at)
            raise
        except ssl.SSLCertVerificationError as error:
            raise RequestFailed("The certificate of the host is not valid.") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            _seconds_left(give_up_at)
            protocol = "HTTP over TLS" if target.is_secure else "HTTP"
            raise RequestFailed(f"The host ended the connection, or does not speak {protocol}.") from error

    def _resolve(self, host: str, give_up_at: float) -> str:
        """Find the address to connect to. :raises UrlRefused: one of the host's addresses is not public."""
        try:
            addresses = self.resolve(host, _seconds_left(give_up_at))
        except OSError as error:
            _seconds_left(give_up_at)
            raise RequestFailed("The host has no address.") from error
        if not addresses:
            raise RequestFailed("The host has no address.")
        # All of them: a host with public and private addresses is an attack, or a mistake.
        if not self.allows_private and not all(map(is_public, addresses)):
            raise UrlRefused("The URL's host is not public.")
        return addresses[0]


@functools.cache
def _system_tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()


def _seconds_left(give_up_at: float) -> float:
    """Return the seconds that are left. :raises RequestFailed: none are."""
    seconds = give_up_at - time.monotonic()
    if seconds <= 0:
        raise RequestFailed("It took too long.")
    return seconds


@contextlib.contextmanager
def _abort_at(give_up_at: float, connection: socket.socket) -> Iterator[None]:
    """Cut a connection at a time: with a limit for each read, a host could send one byte at a time for ever."""

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
