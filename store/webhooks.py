"""Webhooks in the store: who wants messages, and the messages with what became of them.

Commands and views manage them, `server/webhooks.py` sends. A message is written in the transaction that makes its
request final, by the table itself, so there is exactly one for each end and each address. It is delivered at least
once: a sender that dies with a message in its hands leaves it to another one when its lease has ended.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from provider_image.errors import MlgError

#: What can be told. A request is done when it is final, well or not; a batch when all of its requests are.
EVENTS = ("request.done", "batch.done")
#: What shows that a text is such a secret.
SECRET_PREFIX = "whsec_"
_SECRET_BYTES = 32
#: Messages that one claim takes for one address.
MAX_DELIVERIES_PER_URL = 4


def new_secret() -> str:
    """Make a secret for signing."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


class UnknownWebhook(MlgError):
    """There is no such webhook or delivery. See: mlg webhooks list, mlg webhooks deliveries"""

    code = "unknown_webhook"
    permanent = True


@dataclass(frozen=True, kw_only=True)
class EndpointRecord:
    """An address that is told of every end."""

    #: Starts with "we_".
    id: str
    #: Where messages go.
    url: str
    #: Of which events.
    events: tuple[str, ...]
    #: Signs the messages.
    secret: str
    #: When it was added.
    created_at: datetime
    #: Since when it gets no messages any more.
    disabled_at: datetime | None = None
    #: Why.
    disabled_reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class DeliveryRecord:
    """A message to one address."""

    #: Stays the same however often it is sent: the receiver knows by it what it has had.
    id: str
    #: The endpoint; None for an address that came with a request.
    endpoint_id: str | None
    #: Where it goes.
    url: str
    #: What happened.
    event: str
    #: The request's or the batch's id.
    subject: str
    #: The state that it got.
    state: str
    #: The body; None before the first try.
    payload: str | None
    #: When it happened.
    created_at: datetime
    #: Tries so far, the present one included.
    attempts: int
    #: When it is tried next, or when the present try's lease ends; None once it is delivered or dead.
    next_at: datetime | None
    #: When it was taken.
    delivered_at: datetime | None
    #: When it was given up.
    dead_at: datetime | None
    #: HTTP status of the last answer.
    last_status: int | None
    #: What went wrong last.
    last_error: str | None

    @property
    def status(self) -> str:
        """Say where it stands: pending, delivered or dead."""
        return "delivered" if self.delivered_at else "dead" if self.dead_at else "pending"


#: What deliveries can be listed by.
DELIVERY_STATES = ("pending", "delivered", "dead")


class Webhooks(Protocol):
    """Who wants messages, and the messages."""

    def add_endpoint(self, endpoint: EndpointRecord) -> None:
        """Add an address."""

    def remove_endpoint(self, id: str) -> None:
        """Remove an address and what was still to be sent to it. :raises UnknownWebhook:"""

    def list_endpoints(self) -> list[EndpointRecord]:
        """List the addresses, oldest first."""

    def webhook_secret(self, endpoint_id: str | None) -> str:
        """Return what signs messages to an endpoint; with None, those to addresses that came with requests.

        :raises UnknownWebhook:
        """

    def claim_deliveries(
        self, *, now: datetime, lease_ends_at: datetime, limit: int, except_urls: Collection[str]
    ) -> list[DeliveryRecord]:
        """Claim messages that are due, the longest due first, at most MOST_AN_ADDRESS each."""

    def save_payload(self, id: str, payload: str) -> None:
        """Keep a message's body, so that every try sends the same. The first one counts."""

    def delete_delivery(self, id: str) -> None:
        """Forget a message whose event was taken back."""

    def finish_delivery(
        self,
        delivery: DeliveryRecord,
        *,
        now: datetime,
        retry_at: datetime | None,
        status: int | None,
        error: str | None,
    ) -> bool:
        """Note how a try ended.

        :param retry_at: when to try again; None with an error gives the message up, without one it is delivered.
        :return: False when the try's lease had ended and somebody else has the message now.
        """

    def disable_endpoint(self, id: str, *, reason: str, now: datetime) -> None:
        """Send an endpoint nothing any more, and give up what was still to be sent to it."""

    def list_deliveries(self, *, status: str | None = None, limit: int = 50) -> list[DeliveryRecord]:
        """List messages, newest first. :param status: one of DELIVERY_STATES."""

    def redeliver(self, id: str, *, now: datetime) -> DeliveryRecord:
        """Have a message sent again from now, its tries forgotten. :raises UnknownWebhook:"""

    def purge_deliveries(self, *, before: datetime) -> int:
        """Delete messages that were delivered, or given up, before that time. :return: how many."""
