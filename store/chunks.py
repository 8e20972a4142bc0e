"""The rows of the journal as frozen records: what waits, what was dispatched, who is alive, how quick it was.

Every room above the store reads these; only `sqlite_journal.py` (and its later brothers) makes them from rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True, kw_only=True)
class ModelBacklog:
    """How much of one model waits."""

    #: The kind of service.
    service: str
    #: The model.
    model: str
    #: Requests queued.
    waiting: int
    #: Requests claimed.
    claimed: int
    #: The oldest queued request's number; None if none is queued.
    oldest_number: int | None
    #: When that one came in.
    oldest_at: datetime | None


@dataclass(frozen=True, kw_only=True)
class ChunkRecord:
    """One dispatch of one chunk."""

    #: Random; the only id that a provider sees.
    id: str
    #: The batcher that sent it.
    batcher_id: str
    #: The executor's name.
    executor: str
    #: Who worked on it; None until known.
    provider: str | None
    #: The kind of service.
    service: str
    #: The model.
    model: str
    #: How many items it has.
    items: int
    #: Size of the chunk file.
    bytes_sent: int
    #: Size of the results file.
    bytes_received: int | None
    #: When it was handed to the executor.
    dispatched_at: datetime
    #: When it ended; None while it is under way.
    finished_at: datetime | None
    #: Working seconds as the executor measured them.
    seconds: float | None
    #: Items answered, items failed.
    done: int | None
    failed: int | None
    #: What it cost in GLM, a decimal number as text; None where nothing is paid.
    cost: str | None
    #: Why the whole chunk failed.
    code: str | None
    reason: str | None
    #: Under which contract and on which machine it was worked on; None where nothing is paid.
    agreement_id: str | None = None
    activity_id: str | None = None
    #: The address of whoever worked on it.
    provider_id: str | None = None
    #: Requests that it answered; they share its cost equally.
    answers: int = 0
    #: False while the cost is an estimate.
    is_cost_final: bool = False


@dataclass(frozen=True, kw_only=True)
class BatcherRecord:
    """A batcher that is alive: it says so every few seconds."""

    #: Random, one per process.
    id: str
    #: Where it runs.
    host: str
    pid: int
    #: Executor names, comma separated.
    executor: str
    #: The timer: everything that waits is taken this often.
    every_seconds: float
    #: A request is taken at the latest after this long.
    max_wait_seconds: float
    #: How many chunks it works on at once.
    capacity: int
    started_at: datetime
    seen_at: datetime
    #: Model -> a sentence that says why it takes none of it now.
    notices: Mapping[str, str] = field(default_factory=dict)
    #: "run", "day", "total" -> the most that may be spent, in GLM as decimal text; empty where nothing is paid.
    budget: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """How fast a model was answered lately."""

    #: Answered items that the figure rests on.
    items: int
    #: Seconds from dispatch to end, mean over chunks.
    chunk_seconds: float
    #: Items a second of one chunk under way.
    items_per_second: float
