"""The rows of requests as frozen records; those of the journal are in `journal_records.py`, money's in `money.py`.

Every room above the store reads these; only `sqlite.py` (and its later brothers) makes them from rows.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any


class RequestState(enum.StrEnum):
    """Where a request stands: `queued -> claimed -> done | failed | cancelled`, and back to `queued`."""

    QUEUED = "queued"
    CLAIMED = "claimed"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Tell whether nothing more will happen by itself."""
        return self in (RequestState.DONE, RequestState.FAILED, RequestState.CANCELLED)


class Blame(enum.Enum):
    """Whose fault it was that a claim ended without an answer."""

    #: Nobody's: the batcher is stopping, the executor refused. Nothing is counted.
    NOBODY = "nobody"
    #: The chunk's: it failed as a whole, so each item is under suspicion and goes out in a smaller chunk next time.
    CHUNK = "chunk"
    #: The item's own: counted as an attempt; after the last one the request fails.
    ITEM = "item"


#: Items in a chunk at most, by how often an item was in a chunk that failed as a whole. The last step is "alone".
ISOLATION_STEPS = (16, 4, 1)


def to_text(moment: datetime) -> str:
    """Format an aware time as sortable UTC text with milliseconds, as it stands in the database."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def from_text(text: str) -> datetime:
    """Parse what `to_text` wrote."""
    return datetime.fromisoformat(text)


def _parse_optional_time(text: str | None) -> datetime | None:
    return None if text is None else from_text(text)


@dataclass(frozen=True, kw_only=True)
class NewRequest:
    """A request that is about to be added."""

    #: Unguessable and unique; see `store.new_id`.
    id: str
    #: The kind of service, for example "classification".
    service: str
    #: The model's canonical name.
    model: str
    #: What the client chose, already checked by the service.
    params: Mapping[str, Any] = field(default_factory=dict)
    #: The client's own file name, cleaned; only shown, never used as a path.
    name: str | None = None
    #: Digest of the installed artefact. An earlier answer by the same artefact to the same bytes is used again.
    digest: str | None = None
    #: True when the client wants a new answer even if there is an earlier one.
    is_fresh: bool = False
    #: The batch it came in with.
    batch_id: str | None = None
    #: The client's own id, unique in its batch.
    client_id: str | None = None
    #: The client's own words about it.
    labels: Mapping[str, str] = field(default_factory=dict)
    #: The API key it came in with; None where none is asked for.
    key_id: str | None = None
    #: Seconds after its end that its owner wants it kept; None leaves that to the operator.
    keep_seconds: float | None = None
    #: If it is still queued then, it expires.
    deadline_at: datetime | None = None
    #: Address that is told when the request is done.
    webhook: str | None = None
    #: When the request came in.
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class RequestRecord:
    """A request as the store knows it."""

    #: Counts up in the order of arrival; the queue's order.
    number: int
    #: What the client knows it by.
    id: str
    #: The kind of service.
    service: str
    #: The model's canonical name.
    model: str
    #: What the client chose.
    params: Mapping[str, Any]
    #: The client's file name.
    name: str | None
    #: Lower-case hex digest of the picture's bytes.
    image_sha256: str
    #: The picture's size.
    image_bytes: int
    #: Where it stands.
    state: RequestState
    #: Failures of its own so far.
    attempts: int
    #: Index into ISOLATION_STEPS.
    isolation: int
    #: When it came in.
    created_at: datetime
    #: Not claimed before this time.
    due_at: datetime
    #: When the present or last claim was made.
    claimed_at: datetime | None
    #: When the present claim ends unless it is renewed.
    lease_ends_at: datetime | None
    #: When it reached a final state.
    finished_at: datetime | None
    #: The dispatch that answered it.
    chunk_id: str | None
    #: The service's answer.
    output: Any
    #: Digest of the artefact that answered.
    digest: str | None
    #: Who answered.
    provider: str | None
    #: Seconds the model spent on it.
    seconds: float | None
    #: True when the answer was taken from an earlier equal request.
    is_cached: bool
    #: Why it failed, or why the last attempt did.
    code: str | None
    #: The same for people.
    reason: str | None
    #: When retention removed the picture; None while it is kept.
    image_deleted_at: datetime | None
    #: The batch it came in with.
    batch_id: str | None = None
    #: The client's own id, unique in its batch.
    client_id: str | None = None
    #: The client's own words about it.
    labels: Mapping[str, str] = field(default_factory=dict)
    #: The API key it came in with; None where none is asked for.
    key_id: str | None = None
    #: Seconds after its end that its owner wants it kept; None leaves that to the operator.
    keep_seconds: float | None = None
    #: If it is still queued then, it expires.
    deadline_at: datetime | None = None
    #: Its share of what its chunk cost, in GLM; None where nothing is paid, and for an answer that was there already.
    cost: Decimal | None = None
    #: False while the cost is an estimate.
    is_cost_final: bool = False

    @property
    def status(self) -> str:
        """Return what a client is told: the state, or "expired" where the deadline ended it."""
        return "expired" if self.state is RequestState.CANCELLED and self.code == "expired" else str(self.state)

    @classmethod
    def from_row(
        cls, row: Mapping[str, Any], *, cost: Decimal | None = None, is_cost_final: bool = False
    ) -> RequestRecord:
        """Build the record from a row of the table `requests`, and from what its chunk's row says of the cost."""
        return cls(
            number=row["number"],
            id=row["id"],
            service=row["service"],
            model=row["model"],
            params=json.loads(row["params"]),
            name=row["name"],
            image_sha256=row["image_sha256"],
            image_bytes=row["image_bytes"],
            state=RequestState(row["state"]),
            attempts=row["attempts"],
            isolation=row["isolation"],
            created_at=from_text(row["created_at"]),
            due_at=from_text(row["due_at"]),
            claimed_at=_parse_optional_time(row["claimed_at"]),
            lease_ends_at=_parse_optional_time(row["lease_ends_at"]),
            finished_at=_parse_optional_time(row["finished_at"]),
            chunk_id=row["chunk_id"],
            output=None if row["output"] is None else json.loads(row["output"]),
            digest=row["digest"],
            provider=row["provider"],
            seconds=row["seconds"],
            is_cached=bool(row["is_cached"]),
            code=row["code"],
            reason=row["reason"],
            image_deleted_at=_parse_optional_time(row["image_deleted_at"]),
            batch_id=row["batch_id"],
            client_id=row["client_id"],
            labels=json.loads(row["labels"]),
            key_id=row["key_id"],
            keep_seconds=row["keep_seconds"],
            deadline_at=_parse_optional_time(row["deadline_at"]),
            cost=cost,
            is_cost_final=is_cost_final,
        )


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A batcher's hold on one request: what it needs to dispatch it, and the token that proves the hold."""

    #: The request's place in the queue.
    number: int
    #: The request's id; stays at home.
    id: str
    #: Fencing token: counts up with every claim of this request; a result with an older one is dropped.
    token: int
    #: The kind of service.
    service: str
    #: The model's canonical name.
    model: str
    #: What the client chose.
    params: Mapping[str, Any]
    #: The picture.
    image_sha256: str
    #: Its size.
    image_bytes: int
    #: Failures of its own so far.
    attempts: int
    #: Index into ISOLATION_STEPS.
    isolation: int
    #: When the request came in.
    created_at: datetime

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Claim:
        """Build the record from a row returned by the claiming statement."""
        return cls(
            number=row["number"],
            id=row["id"],
            token=row["token"],
            service=row["service"],
            model=row["model"],
            params=json.loads(row["params"]),
            image_sha256=row["image_sha256"],
            image_bytes=row["image_bytes"],
            attempts=row["attempts"],
            isolation=row["isolation"],
            created_at=from_text(row["created_at"]),
        )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A checked result for one claim."""

    #: The hold under which the answer was made.
    claim: Claim
    #: The service's output, JSON.
    output: Any
    #: Digest of the artefact that made it.
    digest: str
    #: The dispatch.
    chunk_id: str
    #: Who made it.
    provider: str
    #: Seconds the model spent.
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PurgeReport:
    """What a retention sweep removed."""

    images: int = 0
    results: int = 0
    leftovers: int = 0
