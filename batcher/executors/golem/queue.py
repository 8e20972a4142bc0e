"""The chunks that wait for a computer, and which computer may have which.

Filled by `executor.py`, emptied by the hires. A chunk is never given twice to a provider that failed on it. Belongs to
one event loop; nothing here waits for the network.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from batcher.executors import Job, Outcome
from provider_image.errors import MlgError


@dataclass(kw_only=True, eq=False)
class Errand:
    """A job on its way to a provider, through all its attempts."""

    job: Job
    #: Set when it is over; cancelled when the caller has lost interest.
    outcome: asyncio.Future[Outcome]
    #: Since when it waits for a provider, by the monotonic clock.
    waiting_since: float
    #: Addresses of the providers that failed on it; it does not go there again.
    failed_on: set[str] = field(default_factory=set)
    #: Providers that were banned for failing on it: if it fails everywhere, it was not their fault.
    banned_for_it: set[str] = field(default_factory=set)
    #: Attempts that count, and all.
    failures: int = 0
    attempts: int = 0
    #: What the last attempt ended with.
    last: Outcome | None = None
    #: Those who work on it now -> what to call when their answer is of no use any more, and whether they came second.
    attempts_under_way: dict[str, tuple[Callable[[], None], bool]] = field(default_factory=dict)
    #: From then on, by the monotonic clock, an idle provider may try it too; None if nobody knows.
    late_at: float | None = None

    def end(self, outcome: Outcome) -> None:
        """Give the caller the outcome, unless there is one already, and call back who was outrun.

        Whoever came second and is not needed any more may as well finish: that costs less than a new start.
        """
        if not self.outcome.done():
            self.outcome.set_result(outcome)
        for stop, is_second in list(self.attempts_under_way.values()):
            if not is_second:
                stop()

    def call_back(self) -> None:
        """Tell all who work on it to stop."""
        for stop, _ in list(self.attempts_under_way.values()):
            stop()


class Backlog:
    """Errands by model, oldest first."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Errand]] = {}
        self._under_way: list[Errand] = []
        self._news = asyncio.Event()

    def models(self) -> list[str]:
        """List the models that something waits for."""
        return [model for model in self._waiting if self.count(model)]

    def count(self, model: str) -> int:
        """Count what waits for a model."""
        return sum(1 for _ in self._live(model))

    def could_take(self, model: str, provider_id: str) -> bool:
        """Tell whether something waits that this provider may have."""
        return any(provider_id not in errand.failed_on for errand in self._live(model))

    def errands(self) -> Iterator[Errand]:
        """Go through all that waits."""
        for model in list(self._waiting):
            yield from list(self._live(model))

    def put(self, errand: Errand, *, is_again: bool = False) -> None:
        """Add an errand; one that comes back stands first."""
        errand.waiting_since = time.monotonic()
        queue = self._waiting.setdefault(errand.job.model, deque())
        if is_again:
            queue.appendleft(errand)
        else:
            queue.append(errand)
        self.tell()

    def take(self, model: str, provider_id: str) -> Errand | None:
        """Take the oldest errand that this provider may have; None if there is none."""
        for errand in self._live(model):
            if provider_id not in errand.failed_on:
                self._waiting[model].remove(errand)
                return errand
        return None

    def begin(self, errand: Errand, provider_id: str, *, stop: Callable[[], None], late_at: float | None) -> None:
        """Note that a provider works on an errand.

        :param stop: called when its answer is of no use any more.
        :param late_at: from then on the errand may be tried elsewhere at the same time.
        """
        errand.attempts += 1
        errand.attempts_under_way[provider_id] = (stop, bool(errand.attempts_under_way))
        errand.late_at = late_at
        self._under_way.append(errand)

    def finish(self, errand: Errand, provider_id: str) -> None:
        """Note that a provider does not work on an errand any more."""
        errand.attempts_under_way.pop(provider_id, None)
        if errand in self._under_way:
            self._under_way.remove(errand)

    def straggler(self, model: str, provider_id: str) -> Errand | None:
        """Return an errand that has been worked on for too long, for a provider that has nothing else to do.

        A second try is cheap then, and one hung provider does not keep everybody waiting at the end. Never a third.
        """
        now = time.monotonic()
        for errand in self._under_way:
            is_late = errand.late_at is not None and now > errand.late_at and len(errand.attempts_under_way) == 1
            is_possible = errand.job.model == model and provider_id not in {
                *errand.failed_on,
                *errand.attempts_under_way,
            }
            if is_late and is_possible and not errand.outcome.done():
                return errand
        return None

    def remove(self, errands: Iterable[Errand]) -> list[Errand]:
        """Take these out, wherever they stand. :return: those that were in."""
        removed = []
        for errand in errands:
            queue = self._waiting.get(errand.job.model, deque())
            if errand in queue:
                queue.remove(errand)
                removed.append(errand)
        return removed

    def refuse_all(self, error: MlgError, *, model: str | None = None) -> int:
        """End everything that waits, through no fault of its own. :return: how many that were."""
        refused = self.remove([each for each in self.errands() if model in (None, each.job.model)])
        for errand in refused:
            errand.end(Outcome(provider=None, seconds=0.0, error=error, is_blameless=True))
        return len(refused)

    async def changed(self, seconds: float) -> None:
        """Wait until something was added, or so long."""
        news = self._news
        try:
            async with asyncio.timeout(seconds):
                await news.wait()
        except TimeoutError:
            return

    def tell(self) -> None:
        """Wake everybody who waits for a change."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _live(self, model: str) -> Iterator[Errand]:
        return (errand for errand in self._waiting.get(model, ()) if not errand.outcome.done())
