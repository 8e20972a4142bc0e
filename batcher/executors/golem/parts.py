"""What the sessions, worker pools and workers of one golem executor have in common.

Made by `executor.py`; each part is described in its own module.
"""

from __future__ import annotations

from dataclasses import dataclass

from batcher.executors import ExecutorContext
from batcher.executors.golem.job_queue import JobQueue
from batcher.executors.golem.ledger_writer import LedgerWriter
from batcher.executors.golem.money import Money
from batcher.executors.golem.offers import OfferEvaluator
from batcher.executors.golem.provider_records import ProviderRecords
from batcher.executors.golem.settings import GolemSettings
from batcher.executors.golem.timings import GolemTimings
from batcher.workspace import is_alive


@dataclass(frozen=True, kw_only=True)
class GolemParts:
    """One executor's parts."""

    context: ExecutorContext
    settings: GolemSettings
    timings: GolemTimings
    ledger_writer: LedgerWriter
    money: Money
    offer_evaluator: OfferEvaluator
    provider_records: ProviderRecords
    job_queue: JobQueue

    @classmethod
    def make(cls, context: ExecutorContext, settings: GolemSettings, timings: GolemTimings) -> GolemParts:
        """Make all parts."""
        ledger_writer = LedgerWriter(timings)
        offer_evaluator = OfferEvaluator(settings)
        return cls(
            context=context,
            settings=settings,
            timings=timings,
            ledger_writer=ledger_writer,
            money=Money(context.store, ledger_writer, owner=context.owner, caps=settings.caps, timings=timings),
            offer_evaluator=offer_evaluator,
            provider_records=ProviderRecords(context.store.providers, settings, offer_evaluator, ledger_writer),
            job_queue=JobQueue(),
        )

    def is_gone(self, batcher_id: str) -> bool:
        """Return whether another batcher no longer runs."""
        return not is_alive(self.context.work.parent, batcher_id)
