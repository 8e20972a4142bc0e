"""The store: requests, their pictures, and the journal of dispatches.

    POST                claim                finish
    ----> queued -----------------> claimed ----------> done
            ^  |                     |   |
            |  | cancel              |   | fail, or release after the last attempt
            |  v                     |   v
            | cancelled              |  failed
            +------------------------+
              release, or the lease ended

`retry` puts a failed or cancelled request back to queued. The server adds and reads; the batcher claims, renews,
finishes, fails and releases. Neither knows which database is behind the protocol: `sqlite.py` is the one there is, and
`tests/contracts/test_store.py` is what another must pass. The money is in `ledger.py`.

Promises that every implementation keeps:

- `add` returns only when the picture and the row would survive a power cut.
- A claim is one statement. Two batchers never hold the same request.
- A claim carries a fencing token. `finish`, `fail`, `release` and `renew` touch a request only while it is claimed
  under that very token; for any other they do nothing and say so in their result.
- All methods may be called from any thread.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from store.chunks import BatcherRecord, ChunkRecord, ModelBacklog, Throughput
    from store.images import StagedImage
    from store.records import Answer, Blame, Claim, NewRequest, PurgeReport, RequestRecord, RequestState


def new_id() -> str:
    """Make a request id: 32 hex digits, the first 12 its time in milliseconds, the other 80 bits random.

    Time first keeps the index of a large table in order of arrival, so that inserting stays quick.
    """
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


class Store(Protocol):
    """Requests and their pictures."""

    def add(self, new: NewRequest, staged: StagedImage) -> RequestRecord:
        """Add a request and publish its picture; returns when both are durable.

        When an equal picture was answered by the same artefact before, and the request is not fresh, it is done at
        once with that answer and `is_cached`.

        :raises StoreBusy: locked for too long. :raises StoreUnavailable: read-only or gone. :raises DiskFull:
        :raises QuotaReached: by its key, which is counted in the same commit; see `keys.py`.
            In each case neither the row nor the picture is left behind.
        """

    def get(self, id: str) -> RequestRecord:
        """Read one request. :raises UnknownRequest:"""

    def claim(
        self,
        *,
        models: Collection[str],
        limit: int,
        now: datetime,
        lease_ends_at: datetime,
        oldest_before: datetime | None,
    ) -> list[Claim]:
        """Claim up to `limit` queued requests of these models that are due, oldest first within a model.

        A model is due when a full chunk of it waits, or its oldest request came in before `oldest_before`;
        with None everything is. Models share the limit in turns, a chunk's worth each, the longest waiting first.
        """

    def renew(self, claims: Iterable[Claim], *, lease_ends_at: datetime) -> set[int]:
        """Extend the leases. :return: the numbers of those still held."""

    def finish(self, answers: Sequence[Answer], *, now: datetime) -> int:
        """Record answers, all or none of them in one commit. :return: how many were still held and so recorded."""

    def fail(self, claims: Iterable[Claim], *, code: str, reason: str, now: datetime) -> int:
        """Fail for good what cannot be answered. :return: how many were still held."""

    def release(
        self,
        claims: Iterable[Claim],
        *,
        blame: Blame,
        code: str,
        reason: str,
        now: datetime,
        due_at: datetime | None = None,
    ) -> int:
        """Give claims back to the queue, or fail them when their attempts are used up.

        :param due_at: not to be claimed again before this time; now when None.
        :return: how many were still held.
        """

    def release_expired(self, now: datetime) -> int:
        """Release, blaming the chunk, every claim whose lease has ended. :return: how many."""

    def cancel(self, id: str, *, now: datetime) -> RequestRecord:
        """Cancel a queued request. :raises UnknownRequest: :raises NotCancellable:"""

    def retry(self, id: str, *, now: datetime) -> RequestRecord:
        """Queue a failed or cancelled request again, its attempts forgotten.

        :raises UnknownRequest: :raises NotRetryable:
        """

    def purge(self, *, images_before: datetime, results_before: datetime, now: datetime) -> PurgeReport:
        """Delete pictures of requests finished before the one time, whole requests finished before the other, and
        files left over by killed processes. Waiting requests are never touched."""

    def list(
        self,
        *,
        state: RequestState | None = None,
        model: str | None = None,
        before: int | None = None,
        limit: int = 50,
    ) -> list[RequestRecord]:
        """List requests, newest first, those with a number under `before`."""


class Chunks(Protocol):
    """What the batchers did: for operators, for estimates, for the bill."""

    def start_chunk(self, chunk: ChunkRecord) -> None:
        """Note that a chunk was handed to an executor."""

    def finish_chunk(
        self,
        id: str,
        *,
        provider: str | None,
        bytes_received: int | None,
        seconds: float,
        done: int,
        failed: int,
        cost: str | None,
        code: str | None,
        reason: str | None,
        now: datetime,
        agreement_id: str | None = None,
        activity_id: str | None = None,
        provider_id: str | None = None,
    ) -> None:
        """Note how it ended. The cost is an estimate until the agreement's invoice is accepted; see `ledger.py`."""

    def list_chunks(self, *, limit: int = 50) -> list[ChunkRecord]:
        """List dispatches, newest first."""

    def heartbeat(self, batcher: BatcherRecord) -> None:
        """Say that a batcher is alive; the first beat registers it."""

    def deregister(self, batcher_id: str) -> None:
        """Say that a batcher has ended."""

    def list_batchers(self, *, seen_since: datetime) -> list[BatcherRecord]:
        """List the batchers that said something since."""

    def backlog(self) -> list[ModelBacklog]:
        """Count what waits and what is claimed, by model."""

    def throughput(self, model: str) -> Throughput | None:
        """Tell how fast the model was answered in its latest chunks; None when there were none."""
