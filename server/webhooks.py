"""Sends webhooks: messages to addresses that want to know when a request or a batch is done.

`wsgi.py` runs one Deliverer in each server process; the commands use `send` for a test. Messages follow Standard
Webhooks (https://www.standardwebhooks.com, 1.0.0): their headers, their signature, their schedule of tries. Whoever
gets one may get it again, with the same `webhook-id`.

An address is asked like one that a picture is fetched from (`fetching.py`): https, port 443, a public host, connected
to at the very address that was checked; no redirects, no credentials, one time limit for all. MLG_WEBHOOKS_PRIVATE=1
takes these limits away, for receivers in one's own network.
"""

from __future__ import annotations

import base64
import binascii
import collections
import contextlib
import hashlib
import hmac
import http.client
import json
import logging
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from provider_image.errors import InvalidParams, MlgError
from server.api.endpoint import Field
from server.api.serializers import serialize_request
from server.context import parse_read_params
from server.errors import UrlRefused
from server.intake.url_fetcher import MAX_URL_LENGTH, check_url, is_public, resolve_host
from store.errors import UnknownRequest
from store.records import to_text
from store.sqlite import SqliteStore
from store.webhooks import SECRET_PREFIX, DeliveryRecord, UnknownWebhook

log = logging.getLogger(__name__)

#: Seconds after which a message is tried again; after the last one it is given up.
RETRY_SECONDS = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000)
#: A wait is made longer or shorter by up to this part, so that those who failed together do not come back together.
JITTER = 0.1
#: Seconds that one try may take.
SEND_SECONDS = 15.0
#: Seconds after which another process may try what one has claimed.
LEASE_SECONDS = 60.0
#: Seconds between two looks for messages that are due.
POLL_SECONDS = 0.25
#: Messages that one process sends at once.
MAX_CONCURRENT_SENDS = 8
#: The longest wait that a receiver may ask for with Retry-After.
_MAX_RETRY_AFTER_SECONDS = 86_400

WEBHOOK = Field(
    name="webhook",
    help="An https address that gets a signed message when the request is done.",
    schema={"type": "string", "format": "uri", "maxLength": MAX_URL_LENGTH},
)


class DeliveryFailed(MlgError):
    """The receiver could not be reached."""

    code = "delivery_failed"


def check_webhook(url: str | None, *, is_private_allowed: bool) -> str | None:
    """Check an address that messages are to go to, as it is written. :raises InvalidParams:"""
    if url is None:
        return None
    try:
        if not is_private_allowed:
            check_url(url)
            return url
        parts = urlsplit(url)
        is_valid = (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and "@" not in parts.netloc
            and parts.port != 0
            and url.isascii()
            and url.isprintable()
            and " " not in url
            and len(url) <= MAX_URL_LENGTH
        )
    except (UrlRefused, ValueError) as error:
        raise InvalidParams(f"webhook: messages are sent to https addresses of public hosts only. {error}") from error
    if not is_valid:
        raise InvalidParams("webhook takes an http or https address, for example https://example.org/hooks/mlg")
    return url


def sign(secret: str, id: str, timestamp: int, body: bytes) -> str:
    """Make the header `webhook-signature`. :param secret: "whsec_" and base64. :raises ValueError: it is none."""
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except binascii.Error as error:
        raise ValueError("A webhook's secret is whsec_ and base64.") from error
    digest = hmac.digest(key, f"{id}.{timestamp}.".encode() + body, hashlib.sha256)
    return f"v1,{base64.b64encode(digest).decode()}"


def send(
    url: str,
    *,
    id: str,
    body: bytes,
    secret: str,
    is_private_allowed: bool,
    now: datetime,
    seconds: float = SEND_SECONDS,
) -> tuple[int, str | None]:
    """Send a message once. :return: the status and the header Retry-After. :raises DeliveryFailed:"""
    timestamp = int(now.timestamp())
    headers = {
        "Host": urlsplit(url).netloc,
        "User-Agent": "mlg",
        "Connection": "close",
        "Content-Type": "application/json",
        "webhook-id": id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": sign(secret, id, timestamp, body),
    }
    give_up_at = time.monotonic() + seconds
    try:
        check_webhook(url, is_private_allowed=is_private_allowed)
        return _post(url, body, headers, give_up_at=give_up_at, is_private_allowed=is_private_allowed)
    except InvalidParams as error:
        raise DeliveryFailed(str(error)) from error
    except ssl.SSLCertVerificationError as error:
        raise DeliveryFailed("The certificate of the receiver is not good.") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        if time.monotonic() >= give_up_at:
            raise DeliveryFailed(f"The receiver did not answer within {seconds:g} s.") from error
        kind = type(error).__name__
        raise DeliveryFailed(f"The receiver cannot be reached or does not speak HTTP ({kind}).") from error


def _post(
    url: str, body: bytes, headers: dict[str, str], *, give_up_at: float, is_private_allowed: bool
) -> tuple[int, str | None]:
    parts = urlsplit(url)
    host, is_secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if is_secure else 80)
    addresses = resolve_host(host, max(0.001, give_up_at - time.monotonic()))
    if not is_private_allowed and not (addresses and all(map(is_public, addresses))):
        raise DeliveryFailed("The receiver's host is not public.")
    with contextlib.ExitStack() as stack:
        timeout = max(0.001, give_up_at - time.monotonic())
        channel: socket.socket = stack.enter_context(
            contextlib.closing(socket.create_connection((addresses[0], port), timeout=timeout))
        )
        if not is_private_allowed and channel.getsockname()[0] == addresses[0]:
            raise DeliveryFailed("The receiver's host is not public.")
        if is_secure:
            tls_context = ssl.create_default_context()
            secure = tls_context.wrap_socket(channel, server_hostname=host, do_handshake_on_connect=False)
            channel = stack.enter_context(contextlib.closing(secure))

        def abort() -> None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(channel, socket.SHUT_RDWR)

        # A limit for each read alone would let a receiver drip for ever.
        timer = threading.Timer(max(0.0, give_up_at - time.monotonic()), abort)
        timer.daemon = True
        timer.start()
        stack.callback(timer.cancel)
        if isinstance(channel, ssl.SSLSocket):
            channel.do_handshake()
        connection = http.client.HTTPConnection(host, port)
        connection.sock = channel
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("POST", target, body=body, headers=headers)
        with contextlib.closing(connection.getresponse()) as response:
            return response.status, response.headers.get("Retry-After")


class Deliverer:
    """Sends what is due, in threads of its own.

    :param retry_seconds: seconds between the tries.
    """

    def __init__(
        self,
        outbox: SqliteStore,
        *,
        is_private_allowed: bool,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        retry_seconds: Sequence[float] = RETRY_SECONDS,
    ) -> None:
        self._outbox = outbox
        self._is_private_allowed = is_private_allowed
        self._clock = clock
        self._retry_seconds = retry_seconds
        self._lock = threading.Lock()
        #: Addresses that are being sent to, and how many messages to each.
        self._sending: collections.Counter[str] = collections.Counter()
        self._stopping = threading.Event()
        self._wake = threading.Event()

    def start(self) -> None:
        """Send from now on."""
        threading.Thread(target=self._run, name="webhooks", daemon=True).start()

    def stop(self) -> None:
        """Begin no more tries. What is under way is sent again by another process if this one ends before it."""
        self._stopping.set()
        self._wake.set()

    def send_due(self) -> list[threading.Thread]:
        """Begin to send what is due, as much as there are senders for. :return: the threads that send."""
        with self._lock:
            busy_urls, free = set(self._sending), MAX_CONCURRENT_SENDS - self._sending.total()
        if free <= 0:
            return []
        now = self._clock()
        claimed = self._outbox.claim_deliveries(
            now=now, lease_ends_at=now + timedelta(seconds=LEASE_SECONDS), limit=free, except_urls=busy_urls
        )
        threads = []
        for delivery in claimed:
            with self._lock:
                self._sending[delivery.url] += 1
            thread = threading.Thread(target=self._send, args=(delivery,), name="webhook", daemon=True)
            thread.start()
            threads.append(thread)
        return threads

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                self.send_due()
            except MlgError as error:
                log.warning("cannot look for webhooks that are due: %s", error)
            except Exception:
                # The thread must outlive any failure.
                log.exception("cannot look for webhooks that are due")
            self._wake.wait(POLL_SECONDS)

    def _send(self, delivery: DeliveryRecord) -> None:
        try:
            self._attempt(delivery)
        except Exception:
            # It is tried again when the lease ends.
            log.exception("cannot send a webhook", extra={"delivery": delivery.id})
        finally:
            with self._lock:
                self._sending[delivery.url] -= 1
                self._sending += collections.Counter()  # those at zero go
            self._wake.set()

    def _attempt(self, delivery: DeliveryRecord) -> None:
        payload = delivery.payload
        if payload is None:
            payload = self._payload(delivery)
            if payload is None:
                self._outbox.delete_delivery(delivery.id)
                return
            self._outbox.save_payload(delivery.id, payload)
        status: int | None = None
        retry_after: str | None = None
        error: str | None = None
        try:
            status, retry_after = send(
                delivery.url,
                id=delivery.id,
                body=payload.encode(),
                secret=self._outbox.webhook_secret(delivery.endpoint_id),
                is_private_allowed=self._is_private_allowed,
                now=self._clock(),
            )
            if not 200 <= status < 300:
                error = f"The receiver answered with status {status}."
        except UnknownWebhook:
            self._outbox.delete_delivery(delivery.id)
            return
        except DeliveryFailed as failure:
            error = failure.reason
        now = self._clock()
        retry_at = None
        if error is not None and status != 410 and delivery.attempts <= len(self._retry_seconds):
            retry_at = now + timedelta(seconds=self._retry_delay(delivery.attempts, retry_after))
        self._outbox.finish_delivery(delivery, now=now, retry_at=retry_at, status=status, error=error)
        if error is not None:
            log.warning("webhook %s: %s", delivery.id, error, extra={"delivery": delivery.id})
        if status == 410 and delivery.endpoint_id is not None:
            self._outbox.disable_endpoint(delivery.endpoint_id, reason="It answered with status 410.", now=now)

    def _retry_delay(self, attempts: int, retry_after: str | None) -> float:
        wait = self._retry_seconds[attempts - 1] * random.uniform(1 - JITTER, 1 + JITTER)
        if retry_after is not None and retry_after.isascii() and retry_after.isdigit():
            wait = max(wait, min(float(retry_after[:9]), _MAX_RETRY_AFTER_SECONDS))
        return wait

    def _payload(self, delivery: DeliveryRecord) -> str | None:
        """Build the body; None when the event was taken back: it was tried again, so another end will come."""
        data: dict[str, Any]
        try:
            if delivery.event == "batch.done":
                batch = self._outbox.get_batch(delivery.subject)
                progress = self._outbox.batch_progress(delivery.subject)
                if progress.waiting:
                    return None
                counts = ("done", "failed", "cancelled", "expired")
                data = {
                    "batch_id": batch.id,
                    "name": batch.name,
                    "model": batch.model,
                    "total": batch.total,
                    "refused": batch.refused,
                    **{name: getattr(progress, name) for name in counts},
                }
            else:
                request = self._outbox.get(delivery.subject)
                if not request.state.is_final:
                    return None
                data = serialize_request(request, parse_read_params(request.service, {}), None)
        except UnknownRequest:
            # Deleted already; who listens learns at least that it ended.
            name = "batch_id" if delivery.event == "batch.done" else "req_id"
            data = {name: delivery.subject, "status": delivery.state}
        message = {"type": delivery.event, "timestamp": to_text(delivery.created_at), "data": data}
        return json.dumps(message, separators=(",", ":"), ensure_ascii=False)
