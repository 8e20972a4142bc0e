"""Who is to blame for failures, and for how long a provider is left alone for them.

Told by `executor.py` how each chunk ended. A provider that fails is banned, twice as long each time in a row. But a
chunk that fails on several providers is to blame itself: then their names are cleared.
"""

from __future__ import annotations

from datetime import timedelta

from batcher.executors.golem.ledger_entries import Diary
from batcher.executors.golem.offers import Market
from batcher.executors.golem.queue import Errand
from batcher.executors.golem.settings import GolemSettings
from batcher.executors.golem.worker import Failure, Hire

#: No ban for failures is longer.
_LONGEST = timedelta(days=7)
#: Whoever bills too much gets nothing for this long.
_OVERBILLED = timedelta(days=30)


class Blame:
    """The failures of one batcher's providers."""

    def __init__(self, settings: GolemSettings, market: Market, diary: Diary) -> None:
        self._settings = settings
        self._market = market
        self._diary = diary
        #: Address -> failures in a row.
        self._failures: dict[str, int] = {}

    def succeeded(self, hire: Hire, *, images: int, seconds: float) -> None:
        """Note that a provider answered a chunk."""
        self._failures.pop(hire.provider_id, None)
        self._diary.worked(hire, images=images, seconds=seconds, is_failure=False)
        self._market.learn_speed(hire.model, {hire.provider_id: images / max(1e-3, seconds)})

    def failed(self, hire: Hire, errand: Errand | None, failure: Failure, seconds: float) -> None:
        """Note that a provider failed, on this chunk if it had one."""
        self._diary.worked(hire, images=0, seconds=seconds, is_failure=True)
        times = self._failures[hire.provider_id] = self._failures.get(hire.provider_id, 0) + 1
        length = timedelta(seconds=self._settings.ban_seconds) * 2 ** min(20, times - 1)
        self._ban(hire.provider_id, failure.error.reason, min(length, _LONGEST))
        if errand is not None:
            errand.failures += 1
            errand.failed_on.add(hire.provider_id)
            errand.banned_for_it.add(hire.provider_id)

    def clear(self, errand: Errand) -> None:
        """Clear the names of those who were banned for a chunk that failed on several."""
        if len(errand.failed_on) < 2:
            return
        for provider_id in errand.banned_for_it:
            self._failures.pop(provider_id, None)
            self._market.unban(provider_id)
            self._diary.cleared(provider_id)

    def overbilled(self, provider_id: str, reason: str) -> None:
        """Note that a provider asked for more than it can have earned."""
        self._ban(provider_id, reason, _OVERBILLED)

    def _ban(self, provider_id: str, reason: str, length: timedelta) -> None:
        self._market.ban(provider_id, reason)
        self._diary.banned(provider_id, reason, length)
