"""Repeated requests: a client that does not know whether its request arrived sends it again under the same key.

Used by `server/api/idempotency.py`. The store keeps, for each owner and key, what was asked and the first answer. While
the first is under way it is held under a lease, so that a server that was killed in mid-request leaves nothing that
lasts. An owner is an API key's id, or the empty text where none is asked for.

Weakness: between the commit of the work and that of the answer lies a moment. A server that is killed in it leaves a
row without an answer, and the repetition, once the lease has ended, does the work again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from provider_image.errors import MlgError


class IdempotencyKeyReused(MlgError):
    """This key was used for another request. Make a new one for each request."""

    code = "key_reused"
    permanent = True


@dataclass(frozen=True, kw_only=True)
class SavedResponse:
    """The first answer to a request."""

    #: Says which body it was the answer to.
    fingerprint: str
    #: The HTTP status.
    status: int
    #: The headers that matter.
    headers: Mapping[str, str] = field(default_factory=dict)
    #: The body.
    body: bytes = b""


@dataclass(frozen=True, kw_only=True)
class EarlierRequest:
    """What is known of an earlier request under the same key."""

    #: Method and address of the earlier one.
    operation: str
    #: Its answer; None while it is under way.
    answer: SavedResponse | None
    #: When its lease ends, if it is under way.
    lease_ends_at: datetime


class Idempotency(Protocol):
    """The keys of repeated requests."""

    def reserve_idempotency_key(
        self,
        owner: str,
        key: str,
        *,
        operation: str,
        token: str,
        now: datetime,
        lease_ends_at: datetime,
        expires_at: datetime,
    ) -> EarlierRequest | None:
        """Begin a request under a key, in one statement: of two at once one begins.

        :param token: proves the hold to the methods below.
        :return: None when it may begin, else what is known of the earlier one.
        """

    def renew_idempotency_key(self, owner: str, key: str, token: str, *, lease_ends_at: datetime) -> bool:
        """Extend the lease of what is under way. :return: whether it is still held."""

    def save_response(self, owner: str, key: str, token: str, answer: SavedResponse) -> bool:
        """Keep the answer for those that come again. :return: whether it was still held."""

    def release_idempotency_key(self, owner: str, key: str, token: str) -> bool:
        """Forget the key: there is no answer that is worth keeping. :return: whether it was still held."""
