"""Sends webhooks: messages to URLs when a request or a batch is done.

`server/process.py` runs one Deliverer in each server process; `cli/webhooks.py` uses `send` for a test. Messages follow
Standard Webhooks (https://www.standardwebhooks.com, 1.0.0): their headers, their signature, their schedule of retries.
A receiver may get a message more than once, with the same `webhook-id`. It must not import Flask.

Each commit delays the uploads that wait for the next one. So a group of messages is claimed, and its bodies are saved,
in one commit, which also records the results that earlier messages have had by then.

A URL gets the same checks as one that an image is fetched from, see `server/http_client.py`; redirects are not
followed. MLG_WEBHOOKS_PRIVATE=1 removes these checks, for receivers in a private network.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from provider_image.errors import InvalidParams, MlgError
from server.errors import DeliveryFailed, UrlRefused
from server.http_client import HttpClient, RequestFailed, check_url
from server.record_json import fields
from server.serializers import Thresholds, parse_read_params, serialize_request
from store.clients.webhooks import SECRET_PREFIX, DeliveryRecord, DeliveryResult, UnknownWebhook
from store.errors import StoreError, UnknownRequest
from store.rows import to_text
from store.store import Store

log = logging.getLogger(__name__)

#: Seconds after which a message is sent again; after the last one it is given up.
RETRY_SECONDS = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000)
#: A delay is made longer or shorter by up to this part, so that messages that failed together are spread out.
JITTER = 0.1
#: Seconds that one attempt may take.
SEND_SECONDS = 15.0
#: Seconds after which another process may send what one has claimed.
LEASE_SECONDS = 60.0
#: Seconds between two polls for messages that are due, and after which a result is recorded at the latest.
POLL_SECONDS = 0.25
#: Messages that one process sends at once, and those of one owner; one when half of all are in progress.
MAX_CONCURRENT_SENDS = 32
MAX_SENDS_PER_OWNER = 8
#: Messages that are claimed together, and seconds between the beginnings of two: uploads need the processor too.
GROUP_SIZE = 8
SEND_PAUSE_SECONDS = 0.006
#: Seconds that a stop waits until the results of what has been sent are recorded.
STOP_SECONDS = 1.0
#: The longest delay that a receiver may ask for with Retry-After.
_MAX_RETRY_AFTER_SECONDS = 86_400


def check_webhook(url: str | None, *, allows_private: bool) -> str | None:
    """Check the URL of a webhook as it is written. :return: the URL. :raises InvalidParams:"""
    if url is None:
        return None
    try:
        check_url(url, allows_private=allows_private)
    except UrlRefused as error:
        kind = "http or https URLs" if allows_private else "https URLs of public hosts"
        raise InvalidParams(f"webhook: messages are sent to {kind} only. {error.reason}") from error
    return url


def sign(secret: str, id: str, timestamp: int, body: bytes) -> str:
    """Build the header `webhook-signature`. :param secret: "whsec_" and base64. :raises ValueError: it is not."""
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
    now: datetime,
    http_client: HttpClient,
    seconds: float = SEND_SECONDS,
) -> tuple[int, str | None]:
    """Send a message once. :return: the status and the header Retry-After. :raises DeliveryFailed:"""
    timestamp = int(now.timestamp())
    headers = {
        "Content-Type": "application/json",
        "webhook-id": id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": sign(secret, id, timestamp, body),
    }
    give_up_at = time.monotonic() + seconds
    try:
        with http_client.request("POST", url, give_up_at=give_up_at, headers=headers, body=body) as response:
            return response.status, response.headers.get("Retry-After")
    except (UrlRefused, RequestFailed) as error:
        if time.monotonic() >= give_up_at:
            raise DeliveryFailed(f"The receiver did not answer within {seconds:g} s.") from error
        raise DeliveryFailed(f"The receiver cannot be reached. {error.reason}") from error


class Deliverer:
    """Sends what is due, in background threads."""

    def __init__(
        self,
        outbox: Store,
        *,
        http_client: HttpClient,
        models: Path | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        retry_seconds: Sequence[float] = RETRY_SECONDS,
    ) -> None:
        self._outbox = outbox
        self._http_client = http_client
        self._models = models
        self._clock = clock
        self._retry_seconds = retry_seconds
        self._lock = threading.Lock()
        #: Id -> owner and host of a message that is being sent.
        self._sending: dict[str, tuple[str, str]] = {}
        #: What is not recorded yet.
        self._results: list[DeliveryResult] = []
        #: When no more than these are in progress, the group that was begun last has ended, or others instead.
        self._wake_below = 0
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)

    def start(self) -> None:
        """Start the background thread."""
        self._thread.start()

    def stop(self) -> None:
        """Begin no more attempts, and record those that have ended. Another process repeats those that do not end."""
        self._stopping.set()
        self._wake.set()
        self._thread.join(STOP_SECONDS)

    def send_due(self) -> list[threading.Thread]:
        """Record what was sent, and begin to send some of what is due, at most GROUP_SIZE.

        :return: the threads that send.
        """
        with self._lock:
            sending = list(self._sending.values())
            self._wake_below = len(sending)
        free, now = MAX_CONCURRENT_SENDS - len(sending), self._clock()
        due = []
        if free > 0:
            due = self._outbox.webhooks.list_due(
                now=now,
                limit=min(free, GROUP_SIZE),
                per_owner=MAX_SENDS_PER_OWNER if free > MAX_CONCURRENT_SENDS // 2 else 1,
                sending=sending,
            )
        messages = {delivery.id: self._message_of(delivery) for delivery in due}
        threads = []
        for delivery in self._claim(messages, now):
            message = messages[delivery.id]
            if message is None:
                continue  # it is tried again when the lease ends
            # What was deleted meanwhile is not saved and not told.
            body = delivery.payload or self._message(delivery, self._deleted_data(delivery))
            with self._lock:
                self._sending[delivery.id] = delivery.owner, delivery.host
            thread = threading.Thread(target=self._send, args=(delivery, body), name="webhook", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                # No thread can be started now; another attempt is made when the lease ends.
                self._end(delivery)
                raise
            threads.append(thread)
            self._stopping.wait(SEND_PAUSE_SECONDS)
        return threads

    def record(self) -> None:
        """Record the results of what was sent. :raises StoreError: they are kept for the next time."""
        self._claim({}, self._clock())

    def _claim(self, messages: Mapping[str, str | None], now: datetime) -> list[DeliveryRecord]:
        """Claim deliveries, drop those whose message is empty, and record the results of others, in one commit."""
        with self._lock:
            results, self._results = self._results, []
        if not (messages or results):
            return []
        try:
            return self._outbox.webhooks.claim_deliveries(
                {id: message for id, message in messages.items() if message != ""},
                now=now,
                lease_ends_at=now + timedelta(seconds=LEASE_SECONDS),
                dropped=[id for id, message in messages.items() if message == ""],
                results=results,
            )
        except StoreError:
            with self._lock:
                self._results = results + self._results
            raise

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            self._try(self.send_due)
            self._stopping.wait(SEND_PAUSE_SECONDS)
            self._wake.wait(POLL_SECONDS)
        self._try(self.record)

    @staticmethod
    def _try(work: Callable[[], object]) -> None:
        try:
            work()
        except MlgError as error:
            log.warning("cannot read or record webhooks: %s", error)
        except Exception:
            # The thread must survive any failure. What was not recorded is sent again.
            log.exception("cannot read or record webhooks")

    def _send(self, delivery: DeliveryRecord, body: str) -> None:
        result = None
        try:
            result = self._attempt(delivery, body)
        except Exception:
            # It is sent again when the lease ends.
            log.exception("cannot send a webhook", extra={"delivery": delivery.id})
        finally:
            self._end(delivery, result)
        if self._stopping.is_set():
            self._try(self.record)

    def _end(self, delivery: DeliveryRecord, result: DeliveryResult | None = None) -> None:
        with self._lock:
            # Not there if it was claimed twice: the system's time was set beyond the end of its lease.
            self._sending.pop(delivery.id, None)
            if result is not None:
                self._results.append(result)
            if len(self._sending) <= self._wake_below:
                self._wake.set()

    def _attempt(self, delivery: DeliveryRecord, body: str) -> DeliveryResult | None:
        """Send a message once. :return: the result, unless it is recorded already."""
        status: int | None = None
        retry_after: str | None = None
        error: str | None = None
        try:
            status, retry_after = send(
                delivery.url,
                id=delivery.id,
                body=body.encode(),
                secret=self._outbox.webhooks.secret(delivery.endpoint_id, delivery.owner),
                now=self._clock(),
                http_client=self._http_client,
            )
            if not 200 <= status < 300:
                error = f"The receiver answered with status {status}."
        except UnknownWebhook:
            self._outbox.webhooks.delete_delivery(delivery.id)
            return None
        except DeliveryFailed as failure:
            error = failure.reason
        now = self._clock()
        retry_at = None
        if error is not None and status != 410 and delivery.attempts <= len(self._retry_seconds):
            retry_at = now + timedelta(seconds=self._retry_delay(delivery.attempts, retry_after))
        if error is not None:
            log.warning("webhook %s: %s", delivery.id, error, extra={"delivery": delivery.id})
        result = DeliveryResult(delivery=delivery, ended_at=now, retry_at=retry_at, status=status, error=error)
        if status != 410 or delivery.endpoint_id is None:
            return result
        # Before the endpoint's other deliveries are given up, which takes a while.
        self._outbox.webhooks.finish_deliveries([result])
        self._outbox.webhooks.disable_endpoint(delivery.endpoint_id, reason="It answered with status 410.", now=now)
        return None

    def _retry_delay(self, attempts: int, retry_after: str | None) -> float:
        wait = self._retry_seconds[attempts - 1] * random.uniform(1 - JITTER, 1 + JITTER)
        if retry_after is not None and retry_after.isascii() and retry_after.isdigit():
            wait = max(wait, min(float(retry_after[:9]), _MAX_RETRY_AFTER_SECONDS))
        return wait

    def _message_of(self, delivery: DeliveryRecord) -> str | None:
        """Return the body; empty when the request or batch was queued again, None when it cannot be built now."""
        if delivery.payload is not None:
            return delivery.payload
        try:
            message = self._build(delivery)
            message.encode()
        except Exception:
            # One message that cannot be built must not hold up the others.
            log.exception("cannot build the message of a webhook", extra={"delivery": delivery.id})
            return None
        return message

    def _build(self, delivery: DeliveryRecord) -> str:
        """Build the body; empty when the request or batch was queued again, so another event will follow."""
        data: dict[str, Any]
        try:
            if delivery.event == "batch.done":
                batch = self._outbox.batches.get(delivery.subject)
                progress = self._outbox.batches.progress(delivery.subject)
                if progress.waiting:
                    return ""
                data = {
                    "batch_id": batch.id,
                    **fields(batch, "name model total refused"),
                    **fields(progress, "done failed cancelled expired"),
                }
            else:
                request = self._outbox.requests.get(delivery.subject)
                if not request.state.is_final:
                    return ""
                thresholds = None if self._models is None else Thresholds(self._models)
                data = serialize_request(request, parse_read_params(request.service, {}), None, thresholds=thresholds)
        except UnknownRequest:
            data = self._deleted_data(delivery)
        return self._message(delivery, data)

    @staticmethod
    def _deleted_data(delivery: DeliveryRecord) -> dict[str, Any]:
        """Of what was deleted the receiver learns at least that it ended."""
        name = "batch_id" if delivery.event == "batch.done" else "req_id"
        return {name: delivery.subject, "status": delivery.state}

    @staticmethod
    def _message(delivery: DeliveryRecord, data: Mapping[str, Any]) -> str:
        message = {"type": delivery.event, "timestamp": to_text(delivery.created_at), "data": data}
        return json.dumps(message, separators=(",", ":"), ensure_ascii=False)
