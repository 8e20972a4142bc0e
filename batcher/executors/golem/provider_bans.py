"""Who is to blame for failures, and for how long a provider is left alone for them.

Told by `executor.py` how each chunk ended. A provider that fails is banned, twice as long each time in a row. But a
chunk that fails on several providers is to blame itself: then their names are cleared.
"""

from __future__ import annotations

from datetime import timedelta

from batcher.executors.golem.job_queue import QueuedJob
from batcher.executors.golem.ledger_entries import LedgerEntries
from batcher.executors.golem.offers import OfferEvaluator
from batcher.executors.golem.settings import GolemSettings
from batcher.executors.golem.worker import AttemptFailure, GolemWorker

#: No ban for failures is longer.
_MAX_BAN = timedelta(days=7)
#: Whoever bills too much gets nothing for this long.
_OVERBILLING_BAN = timedelta(days=30)


class ProviderBans:
    """The failures of one batcher's providers."""

    def __init__(self, settings: GolemSettings, offer_evaluator: OfferEvaluator, ledger_entries: LedgerEntries) -> None:
        self._settings = settings
        self._offer_evaluator = offer_evaluator
        self._ledger_entries = ledger_entries
        #: Address -> failures in a row.
        self._failures: dict[str, int] = {}

    def record_success(self, worker: GolemWorker, *, images: int, seconds: float) -> None:
        """Note that a provider answered a chunk."""
        self._failures.pop(worker.provider_id, None)
        self._ledger_entries.record_work(worker, images=images, seconds=seconds, is_failure=False)
        self._offer_evaluator.update_speeds(worker.model, {worker.provider_id: images / max(1e-3, seconds)})

    def record_failure(
        self, worker: GolemWorker, queued_job: QueuedJob | None, failure: AttemptFailure, seconds: float
    ) -> None:
        """Note that a provider failed, on this chunk if it had one."""
        self._ledger_entries.record_work(worker, images=0, seconds=seconds, is_failure=True)
        failures_in_a_row = self._failures[worker.provider_id] = self._failures.get(worker.provider_id, 0) + 1
        length = timedelta(seconds=self._settings.ban_seconds) * 2 ** min(20, failures_in_a_row - 1)
        self._ban(worker.provider_id, failure.error.reason, min(length, _MAX_BAN))
        if queued_job is not None:
            queued_job.failures += 1
            queued_job.failed_on.add(worker.provider_id)
            queued_job.banned_providers.add(worker.provider_id)

    def lift_bans(self, queued_job: QueuedJob) -> None:
        """Clear the names of those who were banned for a chunk that failed on several."""
        if len(queued_job.failed_on) < 2:
            return
        for provider_id in queued_job.banned_providers:
            self._failures.pop(provider_id, None)
            self._offer_evaluator.unban(provider_id)
            self._ledger_entries.record_unban(provider_id)

    def record_overbilling(self, provider_id: str, reason: str) -> None:
        """Note that a provider asked for more than it can have earned."""
        self._ban(provider_id, reason, _OVERBILLING_BAN)

    def _ban(self, provider_id: str, reason: str, length: timedelta) -> None:
        self._offer_evaluator.ban(provider_id, reason)
        self._ledger_entries.record_ban(provider_id, reason, length)
