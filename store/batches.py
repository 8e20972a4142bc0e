"""Batches: many pictures that came in together, what became of them, and deadlines.

The server adds, reads, cancels and retries; the batcher lets requests expire. What a batch could not take (a file that
is no picture) is kept beside it, so that whoever sent ten thousand finds the three that were refused.

Promises beside those of `Store`: a batch is added whole or not at all, in one commit. What ended is numbered in the
order of the commits, so whoever has read the results up to a number and asks again later misses nothing and reads
nothing twice; a request that is tried again ends again, under a new number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Protocol

from provider_image.errors import MlgError
from store.errors import UnknownRequest

if TYPE_CHECKING:
    from store.images import StagedImage
    from store.records import NewRequest, RequestRecord

#: `code` of requests whose deadline passed; they are cancelled, and shown as expired.
EXPIRED = "expired"


class UnknownBatch(UnknownRequest):
    """There is no batch with this id. It was never accepted here, or its retention time is over."""

    code = "unknown_batch"


class BatchInProgress(MlgError):
    """Requests of the batch still wait or are being worked on. Cancel it, or wait until it has ended."""

    code = "batch_under_way"
    permanent = True


class DuplicateClientId(MlgError):
    """Two items of the batch have the same client id. Give each an id of its own."""

    code = "duplicate_client_id"
    permanent = True


@dataclass(frozen=True, kw_only=True)
class RefusedItem:
    """One item that a batch did not take."""

    #: Its place in what was sent, from 0.
    position: int
    #: The client's own id.
    client_id: str
    #: Why, as a word.
    code: str
    #: Why, for people.
    reason: str


@dataclass(frozen=True, kw_only=True)
class BatchRecord:
    """One batch as it came in; what became of it is its progress."""

    #: Unguessable and unique; made like a request's.
    id: str
    #: The kind of service.
    service: str
    #: The model's canonical name.
    model: str
    #: What the client chose, for all requests of the batch.
    params: Mapping[str, Any] = field(default_factory=dict)
    #: What the client calls it; only shown.
    name: str | None = None
    #: The client's own words about it; each request has them too.
    labels: Mapping[str, str] = field(default_factory=dict)
    #: The API key it came in with.
    key_id: str | None = None
    #: When it came in.
    created_at: datetime
    #: What is still queued then expires.
    deadline_at: datetime | None = None
    #: Seconds after its end that each request is wanted.
    keep_seconds: float | None = None
    #: Requests that were accepted.
    total: int = 0
    #: Items that were refused.
    refused: int = 0
    #: When it was cancelled.
    cancelled_at: datetime | None = None
    #: Address that is told when all of its requests are final.
    webhook: str | None = None
    #: Counts up in the order of arrival; 0 before it is added.
    number: int = 0


@dataclass(frozen=True, kw_only=True)
class BatchProgress:
    """How far a batch is."""

    queued: int = 0
    claimed: int = 0
    done: int = 0
    failed: int = 0
    #: Without those that expired.
    cancelled: int = 0
    expired: int = 0
    #: Sum of the shares of its answers, in GLM; None while nothing of it is paid.
    cost: Decimal | None = None
    #: False while the cost is an estimate.
    is_cost_final: bool = False
    #: Of the failed: code -> how many.
    failures: Mapping[str, int] = field(default_factory=dict)
    #: The last request that waits, else the last that is worked on; None when all have ended.
    last_number: int | None = None

    @property
    def waiting(self) -> int:
        """Count those that have not ended."""
        return self.queued + self.claimed

    @property
    def ended(self) -> int:
        """Count those that have ended."""
        return self.done + self.failed + self.cancelled + self.expired


class Batches(Protocol):
    """Batches, their items, and deadlines."""

    def add_batch(
        self, batch: BatchRecord, items: Sequence[tuple[NewRequest, StagedImage]], refused_items: Sequence[RefusedItem]
    ) -> list[RequestRecord]:
        """Add a batch, its requests in this order, and its refusals; returns when all are durable.

        :raises StoreError: :raises QuotaReached: nothing is left behind, the staged pictures included.
        """

    def get_batch(self, id: str) -> BatchRecord:
        """Read one batch. :raises UnknownBatch:"""

    def refused_items(self, batch_id: str) -> list[RefusedItem]:
        """List what a batch did not take, in order; nothing for an unknown one."""

    def list_batches(
        self, *, key_id: str | None = None, before: int | None = None, limit: int = 50
    ) -> list[BatchRecord]:
        """List batches, newest first. :param key_id: only those of this key. :param before: only lower numbers."""

    def batch_progress(self, id: str) -> BatchProgress:
        """Count where the requests of a batch stand; all zero for an unknown one."""

    def batch_results(self, id: str, *, after: int = 0, limit: int = 200) -> list[tuple[int, RequestRecord]]:
        """List what has ended, in the order in which it ended. :return: (the number of the end, the request)."""

    def batch_items(self, id: str, *, after: int = 0, limit: int = 200) -> list[RequestRecord]:
        """List the requests of a batch in the order in which they were sent. :param after: only higher numbers."""

    def cancel_batch(self, id: str, *, now: datetime) -> int:
        """Cancel what is queued of a batch. :return: how many requests. :raises UnknownBatch:"""

    def retry_batch(self, id: str, *, now: datetime) -> int:
        """Queue a batch's failed requests again whose pictures are kept. :return: how many. :raises UnknownBatch:"""

    def remove_batch(self, id: str) -> int:
        """Delete a batch with its requests and pictures. :return: how many requests.

        :raises UnknownBatch: :raises BatchInProgress: nothing was deleted.
        """

    def expire(self, now: datetime) -> int:
        """Cancel every queued request whose deadline has passed. What is claimed is finished. :return: how many."""
