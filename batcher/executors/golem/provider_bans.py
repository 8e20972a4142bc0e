"""Bans providers that fail or charge too much, and lifts bans when the chunk was at fault.

`executor.py` reports how each chunk ended. A provider that fails is banned, twice as long for each further failure in
a row. But when a chunk fails on several providers, the chunk is at fault, and their bans are lifted.
"""

from __future__ import annotations

from datetime import timedelta

from batcher.executors.golem.job_queue import QueuedJob
from batcher.executors.golem.ledger_writer import LedgerWriter
from batcher.executors.golem.offers import OfferEvaluator
from batcher.executors.golem.settings import GolemSettings
from batcher.executors.golem.worker import AttemptFailure, GolemWorker

#: Longest ban for failures.
_MAX_BAN = timedelta(days=7)
#: Ban of a provider that charged too much.
_OVERBILLING_BAN = timedelta(days=30)


class ProviderBans:
    """The failures and bans of one batcher's providers."""

    def __init__(self, settings: GolemSettings, offer_evaluator: OfferEvaluator, ledger_writer: LedgerWriter) -> None:
        self._settings = settings
        self._offer_evaluator = offer_evaluator
        self._ledger_writer = ledger_writer
        #: Address -> failures in a row.
        self._failures: dict[str, int] = {}

    def record_success(self, worker: GolemWorker, *, images: int, seconds: float) -> None:
        """Record that a provider answered a chunk."""
        self._failures.pop(worker.provider_id, None)
        self._ledger_writer.record_work(worker, images=images, seconds=seconds, is_failure=False)
        self._offer_evaluator.update_speeds(worker.model, {worker.provider_id: images / max(1e-3, seconds)})

    def record_failure(
        self, worker: GolemWorker, queued_job: QueuedJob | None, failure: AttemptFailure, seconds: float
    ) -> None:
        """Record that a provider failed, on this chunk if it had one, and ban it."""
        self._ledger_writer.record_work(worker, images=0, seconds=seconds, is_failure=True)
        failures_in_a_row = self._failures[worker.provider_id] = self._failures.get(worker.provider_id, 0) + 1
        length = timedelta(seconds=self._settings.ban_seconds) * 2 ** min(20, failures_in_a_row - 1)
        self._ban(worker.provider_id, failure.error.reason, min(length, _MAX_BAN))
        if queued_job is not None:
            queued_job.failures += 1
            queued_job.failed_on.add(worker.provider_id)
            queued_job.banned_providers.add(worker.provider_id)

    def lift_bans(self, queued_job: QueuedJob) -> None:
        """Lift the bans caused by a chunk that failed on several providers."""
        if len(queued_job.failed_on) < 2:
            return
        for provider_id in queued_job.banned_providers:
            self._failures.pop(provider_id, None)
            self._offer_evaluator.unban(provider_id)
            self._ledger_writer.record_unban(provider_id)

    def record_overbilling(self, provider_id: str, reason: str) -> None:
        """Ban a provider that charged more than it can have earned."""
        self._ban(provider_id, reason, _OVERBILLING_BAN)

    def _ban(self, provider_id: str, reason: str, length: timedelta) -> None:
        self._offer_evaluator.ban(provider_id, reason)
        self._ledger_writer.record_ban(provider_id, reason, length)
