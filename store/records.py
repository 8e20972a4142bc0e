"""Records of requests, and how records become rows.

The records of every other noun are beside its statements, for example `ChunkRecord` in `chunks.py`.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from store.cost_split import to_amount


class RequestState(enum.StrEnum):
    """State of a request: `queued -> claimed -> done | failed | cancelled`, and back to `queued`."""

    QUEUED = "queued"
    CLAIMED = "claimed"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Tell whether the state changes no more unless somebody retries the request."""
        return self in (RequestState.DONE, RequestState.FAILED, RequestState.CANCELLED)


class Blame(enum.Enum):
    """Who is to blame for a claim that ended without an answer."""

    #: Nobody: the batcher is stopping, the executor refused. Nothing is counted.
    NOBODY = "nobody"
    #: The chunk: it failed as a whole, so each item is suspected and is sent in a smaller chunk next time.
    CHUNK = "chunk"
    #: The item: counted as an attempt; after the last one the request fails.
    ITEM = "item"


#: Maximum number of items in a chunk, by how often an item was in a chunk that failed as a whole. The last is alone.
ISOLATION_STEPS = (16, 4, 1)


def to_text(moment: datetime) -> str:
    """Format an aware time as sortable UTC text with milliseconds, as it is in the database."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def from_text(text: str) -> datetime:
    """Parse a time that `to_text` formatted."""
    return datetime.fromisoformat(text)


def from_optional_text(text: str | None) -> datetime | None:
    """Parse a time that may be NULL in the database."""
    return None if text is None else from_text(text)


def to_row(record: Any) -> dict[str, Any]:
    """Turn a record into a row: times and amounts as text, mappings as JSON."""
    return {name: _to_cell(value) for name, value in asdict(record).items()}


def _to_cell(value: Any) -> Any:
    if isinstance(value, datetime):
        return to_text(value)
    if isinstance(value, Decimal):
        return to_amount(value)
    if isinstance(value, Mapping):
        return json.dumps(dict(value), ensure_ascii=False)
    return value


def from_row(
    row: Mapping[str, Any], *, amounts: Collection[str] = (), mappings: Collection[str] = ()
) -> dict[str, Any]:
    """Turn a row back into the values of a record. Columns named `*_at` and `*_until` are times, `is_*` are bools.

    :param amounts: columns that are decimals.
    :param mappings: columns that are JSON.
    """
    values: dict[str, Any] = {}
    for name, value in dict(row).items():
        if value is None:
            values[name] = None
        elif name.endswith(("_at", "_until")):
            values[name] = from_text(value)
        elif name.startswith("is_"):
            values[name] = bool(value)
        elif name in amounts:
            values[name] = Decimal(value)
        elif name in mappings:
            values[name] = json.loads(value)
        else:
            values[name] = value
    return values


@dataclass(frozen=True, kw_only=True)
class NewRequest:
    """A request that is about to be added."""

    #: Unguessable and unique; see `store.new_id`.
    id: str
    #: The kind of service, for example "classification".
    service: str
    #: The model's canonical name.
    model: str
    #: Options of the service, already checked by it.
    params: Mapping[str, Any] = field(default_factory=dict)
    #: The client's own file name, cleaned; only shown, never used as a path.
    name: str | None = None
    #: Digest of the installed artefact. An earlier answer of the same artefact for the same bytes is reused.
    digest: str | None = None
    #: True when the client wants a new answer even if there is an earlier one.
    is_fresh: bool = False
    #: The batch it belongs to.
    batch_id: str | None = None
    #: The client's own id, unique in its batch.
    client_id: str | None = None
    #: The client's labels.
    labels: Mapping[str, str] = field(default_factory=dict)
    #: The API key it was sent with; None where none is required.
    key_id: str | None = None
    #: Seconds that it is kept after its end; None leaves that to the operator.
    keep_seconds: float | None = None
    #: If it is still queued then, it expires.
    deadline_at: datetime | None = None
    #: URL that is notified when the request is done.
    webhook: str | None = None
    #: When it was accepted.
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class RequestRecord:
    """One request as it is stored."""

    #: Counts up in the order of arrival; the queue's order.
    number: int
    #: The id that the client knows.
    id: str
    #: The kind of service.
    service: str
    #: The model's canonical name.
    model: str
    #: Options of the service.
    params: Mapping[str, Any]
    #: The client's file name; only shown.
    name: str | None
    #: Sha256 of the image's bytes, lower-case hex.
    image_sha256: str
    #: Size of the image.
    image_bytes: int
    #: Its state.
    state: RequestState
    #: Failures so far that the item itself was blamed for.
    attempts: int
    #: Index into ISOLATION_STEPS.
    isolation: int
    #: When it was accepted.
    created_at: datetime
    #: Not claimed before this time.
    due_at: datetime
    #: When the current or last claim was made.
    claimed_at: datetime | None
    #: When the current claim ends unless it is renewed.
    lease_ends_at: datetime | None
    #: When it reached a final state.
    finished_at: datetime | None
    #: The chunk that answered it.
    chunk_id: str | None
    #: The service's answer.
    output: Any
    #: Digest of the artefact that answered.
    digest: str | None
    #: The worker or provider that answered.
    provider: str | None
    #: Seconds that the model spent on it.
    seconds: float | None
    #: True when the answer was taken from an earlier equal request.
    is_cached: bool
    #: Code of its failure, or of the last attempt's.
    code: str | None
    #: Message of that failure.
    reason: str | None
    #: When retention deleted the image; None while it is kept.
    image_deleted_at: datetime | None
    #: The batch it belongs to.
    batch_id: str | None = None
    #: The client's own id, unique in its batch.
    client_id: str | None = None
    #: The client's labels.
    labels: Mapping[str, str] = field(default_factory=dict)
    #: The API key it was sent with; None where none is required.
    key_id: str | None = None
    #: Seconds that it is kept after its end; None leaves that to the operator.
    keep_seconds: float | None = None
    #: If it is still queued then, it expires.
    deadline_at: datetime | None = None
    #: Its share of its chunk's cost, in GLM; None where nothing is paid, and for a reused answer.
    cost: Decimal | None = None
    #: False while the cost is an estimate.
    is_cost_final: bool = False

    @property
    def status(self) -> str:
        """The state as clients see it: "expired" where the deadline ended the request."""
        return "expired" if self.state is RequestState.CANCELLED and self.code == "expired" else str(self.state)

    @classmethod
    def from_row(
        cls, row: Mapping[str, Any], *, cost: Decimal | None = None, is_cost_final: bool = False
    ) -> RequestRecord:
        """Build the record from a row of the table `requests` and its share of its chunk's cost."""
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
            claimed_at=from_optional_text(row["claimed_at"]),
            lease_ends_at=from_optional_text(row["lease_ends_at"]),
            finished_at=from_optional_text(row["finished_at"]),
            chunk_id=row["chunk_id"],
            output=None if row["output"] is None else json.loads(row["output"]),
            digest=row["digest"],
            provider=row["provider"],
            seconds=row["seconds"],
            is_cached=bool(row["is_cached"]),
            code=row["code"],
            reason=row["reason"],
            image_deleted_at=from_optional_text(row["image_deleted_at"]),
            batch_id=row["batch_id"],
            client_id=row["client_id"],
            labels=json.loads(row["labels"]),
            key_id=row["key_id"],
            keep_seconds=row["keep_seconds"],
            deadline_at=from_optional_text(row["deadline_at"]),
            cost=cost,
            is_cost_final=is_cost_final,
        )


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A batcher's claim on one request: what it needs to dispatch it, and the token that proves the claim."""

    #: The request's number, its position in the queue.
    number: int
    #: The request's id; never sent to a provider.
    id: str
    #: Fencing token: counts up with every claim of this request; results under an older one are dropped.
    token: int
    #: The kind of service.
    service: str
    #: The model's canonical name.
    model: str
    #: Options of the service.
    params: Mapping[str, Any]
    #: Sha256 of the image.
    image_sha256: str
    #: Size of the image.
    image_bytes: int
    #: Failures so far that the item itself was blamed for.
    attempts: int
    #: Index into ISOLATION_STEPS.
    isolation: int
    #: When it was accepted.
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

    #: The claim under which the answer was made.
    claim: Claim
    #: The service's output, JSON.
    output: Any
    #: Digest of the artefact that made it.
    digest: str
    #: The chunk.
    chunk_id: str
    #: The worker or provider that made it.
    provider: str
    #: Seconds that the model spent.
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PurgeReport:
    """How much a purge deleted."""

    #: Images whose retention time is over.
    images: int = 0
    #: Requests whose retention time is over.
    results: int = 0
    #: Files that killed processes left.
    leftovers: int = 0
