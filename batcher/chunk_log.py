"""Records each dispatched chunk in the store.

Called by `batcher.cycle` in threads. The records serve people and estimates: when the store does not accept one, work
continues without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime

from batcher.executors import Outcome
from batcher.packing import PackedChunk
from batcher.results import ChunkOutcome
from store.chunks import ChunkRecord, Chunks
from store.errors import StoreError

log = logging.getLogger(__name__)


class ChunkLog:
    """The chunk records of one batcher.

    :param executor: the executor's name.
    """

    def __init__(self, chunks: Chunks, *, batcher_id: str, executor: str, clock: Callable[[], datetime]) -> None:
        self._chunks = chunks
        self._batcher_id = batcher_id
        self._executor = executor
        self._clock = clock

    def record_start(self, packed: PackedChunk) -> None:
        """Record that a chunk is dispatched."""
        record = ChunkRecord(
            id=packed.chunk_id,
            batcher_id=self._batcher_id,
            executor=self._executor,
            service=packed.planned.service,
            model=packed.planned.model,
            items=len(packed.items),
            bytes_sent=packed.size_bytes,
            dispatched_at=self._clock(),
        )
        try:
            self._chunks.start(record)
        except StoreError as error:
            log.warning("cannot record the start of a chunk: %s", error, extra={"chunk_id": packed.chunk_id})

    def record_end(self, packed: PackedChunk, outcome: Outcome, chunk_outcome: ChunkOutcome) -> None:
        """Record how a chunk ended."""
        error = chunk_outcome.error
        # Attempts before the last one are in the ledger with their own agreements.
        bill = outcome.bills[-1] if outcome.bills and outcome.provider is not None else None
        try:
            self._chunks.finish(
                packed.chunk_id,
                provider=outcome.provider,
                bytes_received=packed.results.stat().st_size if packed.results.exists() else None,
                seconds=outcome.seconds,
                done=chunk_outcome.items_done,
                failed=len(packed.items) - chunk_outcome.items_done,
                cost=None if bill is None else f"{bill.cost:f}",
                code=error.code if error else None,
                reason=error.reason if error else None,
                provider_id=None if bill is None else bill.provider_id,
                agreement_id=None if bill is None else bill.agreement_id,
                activity_id=None if bill is None else bill.activity_id,
                now=self._clock(),
            )
        except StoreError as store_error:
            log.warning("cannot record the end of a chunk: %s", store_error, extra={"chunk_id": packed.chunk_id})
