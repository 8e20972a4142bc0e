"""The golem executor: sees to it that there is a session, rents what the backlog wants, and decides after failures.

Made by the registry. Everything that is decided about money, providers and retries is decided here and in the pure
modules beside it; yapapi negotiates, deploys, transfers and runs.

Weaknesses compared with others: the first answer takes seconds, because a market is asked first; a provider sees the
pictures as they are sent (reduced to what the model sees of them, unless that is switched off); and what a stranger
answers is checked for form and identity, not yet for truth.

Longer than other modules, because the backlog, the budget and the hires that are told of here share one state.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from batcher.executors import Job, Outcome
from batcher.executors.golem.budget import Caps, Purse
from batcher.executors.golem.ledger_entries import Diary
from batcher.executors.golem.ledger_writer import Bookkeeper, Books
from batcher.executors.golem.offers import Market
from batcher.executors.golem.payload import make_payload
from batcher.executors.golem.prices import Price
from batcher.executors.golem.provider_bans import Blame
from batcher.executors.golem.queue import Backlog, Errand
from batcher.executors.golem.recovery import home_tag
from batcher.executors.golem.session import Session
from batcher.executors.golem.worker import Failure, Hire, Orders
from batcher.executors.golem.worker_pool import Rental, Told
from batcher.executors.golem.yapapi_adapter import explain
from batcher.settings import BatcherSettings
from batcher.workspace import is_alive
from provider_image.errors import (
    BudgetReached,
    ConfigError,
    ExecutorUnavailable,
    GolemUnavailable,
    MlgError,
    NoProvider,
    WorkerDied,
)

log = logging.getLogger(__name__)

#: Jobs under way for each computer: one that it works on and one that is packed and waits, so that it never waits.
JOBS_PER_WORKER = 2
#: What is wanted and what is there is compared this often.
_STEP_SECONDS = 0.2
#: What the store knows is read this often.
_LEARN_SECONDS = 5.0
#: Pause after a session could not be opened; doubles to the last.
_FIRST_PAUSE_SECONDS = 1.0
_LAST_PAUSE_SECONDS = 30.0
#: Requests are told why they wait when nobody has taken a chunk for so long.
_TELL_SECONDS = 5.0
#: A demand without work for so long is taken from the market.
_FORGET_SECONDS = 60.0
#: A model that had work within this time keeps its minimum of computers.
_KEEP_SECONDS = 3600.0
#: Attempts of any kind; those that fail through our own or the daemon's fault do not count as failures.
_MOST_ATTEMPTS = 10
#: An allocation without any cap on spending.
_DEFAULT_ALLOCATION = Decimal(10)
#: When the executor closes, hires get this long to end by themselves, their chunks having been given back.
_CLOSE_SECONDS = 1.0


class GolemExecutor:
    """See `batcher.executors.Executor`.

    :param books: the store's ledger.
    """

    name = "golem"
    sends_away = True

    def __init__(self, settings: BatcherSettings, books: Books) -> None:
        self._batcher = settings
        self._settings = settings.golem
        self._keeper = Bookkeeper(books)
        self._books = books
        self._id = settings.work.name
        self._market = Market(self._settings)
        self._purse = Purse(
            Caps(run=self._settings.budget_run, day=self._settings.budget_day, total=self._settings.budget_total),
            clock=lambda: datetime.now(UTC),
        )
        self._diary = Diary(self._keeper)
        self._blame = Blame(self._settings, self._market, self._diary)
        self._backlog: Backlog | None = None
        self._session: Session | None = None
        self._sessions = 0
        self._rentals: dict[str, Rental] = {}
        self._keeping: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._is_closed = False
        #: Why there is no session; None when there is one.
        self._trouble: str | None = "The connection to the Golem daemon is being opened."
        #: What the last step that the budget forbade would have cost at most.
        self._unaffordable: Decimal | None = None
        self._learned_at = float("-inf")
        self._first_try = asyncio.Event()
        self._tag = ""

    # The Executor protocol

    async def start(self) -> None:
        """Try to open a session; that the daemon is away is no error. :raises ConfigError: it never will work."""
        if not self._settings.app_key:
            raise ConfigError(
                "The golem executor needs a yagna daemon and its app key: set YAGNA_APPKEY (yagna app-key create mlg). "
                "To try without one: mlg devnet"
            )
        if shutil.which("gftp") is None:
            raise ConfigError("The program gftp is not on the PATH. It comes with yagna; mlg devnet brings its own.")
        self._backlog = Backlog()
        self._tag = await asyncio.to_thread(home_tag, self._batcher.work.parent / "golem-home")
        await asyncio.to_thread(self._batcher.work.mkdir, parents=True, exist_ok=True)
        self._keeper.start()
        self._keeping = asyncio.create_task(self._keep())
        first = asyncio.create_task(self._first_try.wait())
        await asyncio.wait({first, self._keeping}, return_when=asyncio.FIRST_COMPLETED)
        first.cancel()
        if self._keeping.done():
            self._keeping.result()  # a ConfigError, else it does not end

    def capacity(self) -> int:
        """See Executor.capacity."""
        return JOBS_PER_WORKER * self._settings.max_workers

    def workers(self) -> int:
        """See Executor.workers."""
        return self._settings.max_workers

    def obstacle(self, model: str) -> str | None:
        """See Executor.obstacle."""
        if self._trouble is not None:
            return self._trouble
        if self._unaffordable is not None:
            reason = self._purse.refusal(self._unaffordable)
            if reason is not None:
                return reason
        rental = self._rentals.get(model)
        if rental is None or rental.hires or self._backlog is None:
            return None
        oldest = min((each.waiting_since for each in self._backlog.errands() if each.job.model == model), default=None)
        if oldest is None or time.monotonic() - oldest < _TELL_SECONDS:
            return None
        return self._market.why(model)

    async def run(self, job: Job) -> Outcome:
        """See Executor.run."""
        if self._is_closed or self._backlog is None:
            return _refused(WorkerDied("The executor is closed."))
        errand = Errand(job=job, outcome=asyncio.get_running_loop().create_future(), waiting_since=time.monotonic())
        self._backlog.put(errand)
        try:
            return await errand.outcome
        finally:
            # After a cancellation: out of the queue, or stopped where it is worked on.
            self._backlog.remove([errand])
            if errand.outcome.cancelled():
                errand.call_back()

    async def close(self) -> None:
        """See Executor.close."""
        if self._is_closed or self._backlog is None:
            self._is_closed = True
            return
        self._is_closed = True
        self._backlog.refuse_all(WorkerDied("The executor is closed."))
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        if self._ending is not None:
            await self._ending
        await self._end_session(self._settings.settle_seconds)
        await self._keeper.close()

    # Sessions

    async def _keep(self) -> None:
        """Keep a session open, and step it."""
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                await self._learn()
                await self._open()
            except ExecutorUnavailable as error:
                self._trouble = error.reason
                log.warning("%s Trying again in %.0f s.", error.reason, pause)
                self._first_try.set()
                await self._wait_without_session(pause)
                pause = min(2 * pause, _LAST_PAUSE_SECONDS)
                continue
            except ConfigError:
                raise
            except Exception as error:
                # A bug here must not leave everybody waiting for ever.
                log.exception("the session with the Golem daemon failed")
                self._trouble = f"The session with the Golem daemon failed: {explain(error)}."
                self._first_try.set()
                await self._wait_without_session(pause)
                pause = min(2 * pause, _LAST_PAUSE_SECONDS)
                continue
            self._trouble = None
            self._first_try.set()
            pause = _FIRST_PAUSE_SECONDS
            try:
                await self._step_session()
            except Exception as error:
                log.exception("the session with the Golem daemon failed, another is opened")
                self._trouble = f"The session with the Golem daemon failed: {explain(error)}."
                await self._wait_without_session(pause)
            await self._end_session(0.0)

    async def _open(self) -> None:
        left = self._purse.left()
        if left is not None and left <= 0:
            raise BudgetReached(self._purse.refusal(Decimal("1e-9")))
        self._sessions += 1
        session = Session(
            batcher_id=self._id,
            number=self._sessions,
            tag=self._tag,
            amount=_DEFAULT_ALLOCATION if left is None else left,
            folder=self._batcher.work,
            settings=self._settings,
            market=self._market,
            keeper=self._keeper,
            on_paid=self._purse.pay,
            on_overbilled=self._blame.overbilled,
            on_offer=self._diary.offered,
            is_gone=lambda batcher_id: not is_alive(self._batcher.work.parent, batcher_id),
        )
        await session.open()
        self._session = session

    async def _wait_without_session(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._refuse_the_impatient()
            await asyncio.sleep(min(0.5, seconds))

    async def _step_session(self) -> None:
        """Step until the session has to be replaced."""
        session = self._session
        assert session is not None and self._backlog is not None
        while True:
            await asyncio.sleep(_STEP_SECONDS)
            if session.broken is not None:
                self._trouble = session.broken
                return
            if session.day != datetime.now(UTC).date():
                session.is_stale = True
            if session.is_stale:
                for rental in self._rentals.values():
                    rental.leave()
                if not any(rental.hires for rental in self._rentals.values()):
                    return
                continue
            await self._learn()
            self._refuse_the_impatient()
            await self._step_rentals(session)

    async def _step_rentals(self, session: Session) -> None:
        assert self._backlog is not None
        waiting = {model: self._backlog.count(model) for model in self._backlog.models()}
        for model in waiting:
            if model not in self._rentals:
                try:
                    self._rentals[model] = await self._new_rental(model, session)
                except MlgError as error:
                    self._backlog.refuse_all(error, model=model)
        wanted = self._share_out(waiting)
        for model, rental in list(self._rentals.items()):
            rental.step(wanted.get(model, 0))
            is_idle = not rental.hires and not waiting.get(model)
            if is_idle and time.monotonic() - rental.last_wanted > _FORGET_SECONDS:
                del self._rentals[model]
                await rental.close(0.0)

    def _share_out(self, waiting: dict[str, int]) -> dict[str, int]:
        """Share the computers out among the models: those at work stay, the others by turns."""
        now = time.monotonic()
        most = self._settings.max_workers
        wanted = {}
        for model, rental in self._rentals.items():
            busy = sum(hire.errand is not None or hire.start_seconds is None for hire in rental.hires)
            needed = max(busy, min(busy + waiting.get(model, 0), busy + most))
            if now - rental.last_wanted < _KEEP_SECONDS:
                needed = max(needed, self._settings.min_workers)
            wanted[model] = needed
        shared = dict.fromkeys(wanted, 0)
        while sum(shared.values()) < most and any(shared[model] < wanted[model] for model in wanted):
            for model in wanted:
                if shared[model] < wanted[model] and sum(shared.values()) < most:
                    shared[model] += 1
        hired = sum(len(rental.hires) for rental in self._rentals.values())
        starving = [model for model, rental in self._rentals.items() if waiting.get(model) and not rental.hires]
        if hired >= most and starving:
            self._dismiss_one()
        return shared

    def _dismiss_one(self) -> None:
        """Let one computer go for a model that has none: an idle one, or one of the model that has most."""
        rentals = sorted(self._rentals.values(), key=lambda rental: len(rental.hires), reverse=True)
        hires = [hire for rental in rentals for hire in rental.hires]
        if any(hire.leaving for hire in hires):
            return
        idle = [hire for hire in hires if hire.errand is None and hire.start_seconds is not None]
        crowded = [hire for hire in hires if len(rentals[0].hires) > 1 and hire in rentals[0].hires]
        for hire in [*idle, *crowded][:1]:
            hire.leaving = True
            if self._backlog is not None:
                self._backlog.tell()

    async def _new_rental(self, model: str, session: Session) -> Rental:
        assert self._backlog is not None
        speeds = await asyncio.to_thread(self._books.speed, model)
        self._market.learn_speed(model, speeds)
        payload = await make_payload(model, session.owner, self._batcher.models, self._settings)
        orders = Orders(
            settings=self._settings,
            backlog=self._backlog,
            folder=self._batcher.work,
            speed=lambda hire: self._market.speed(hire.model, hire.provider_id),
            refusal=self._refusal,
            is_kept=self._is_kept,
            on_ready=lambda hire: log.info(
                "%s is ready for %s after %.1f s", hire.provider_name, hire.model, hire.start_seconds or 0.0
            ),
            on_done=self._done,
            on_failed=self._failed,
        )
        told = Told(
            agreement=self._agreed,
            agreement_ended=self._diary.agreement_ended,
            unsigned=self._unsigned,
            hired=self._hired,
            hire_ended=self._hire_ended,
            too_dear=self._too_dear,
        )
        return Rental(
            model=model,
            session=session,
            payload=payload,
            market=self._market,
            orders=orders,
            settings=self._settings,
            told=told,
            is_affordable=self._is_affordable,
        )

    async def _end_session(self, settle_seconds: float) -> None:
        """End the session, if there is one, to its end: whoever waits for this may be cancelled meanwhile."""
        if self._ending is None or self._ending.done():
            self._ending = asyncio.create_task(self._end_session_now(settle_seconds))
        await asyncio.shield(self._ending)

    async def _end_session_now(self, settle_seconds: float) -> None:
        rentals, self._rentals = list(self._rentals.values()), {}
        patience = _CLOSE_SECONDS if self._session is not None and self._session.broken is None else 0.0
        await asyncio.gather(*(rental.close(patience) for rental in rentals))
        session, self._session = self._session, None
        if session is not None:
            await session.close(settle_seconds)

    async def _learn(self) -> None:
        """Read what the store knows: bans of operators and other batchers, scores, what others spend."""
        now = time.monotonic()
        if now - self._learned_at < _LEARN_SECONDS:
            return
        self._learned_at = now
        banned = self._market.banned()
        try:
            await asyncio.to_thread(self._learn_now)
        except MlgError as error:
            log.warning("the ledger cannot be read: %s", error)
        if banned - self._market.banned():
            for rental in self._rentals.values():
                rental.ask_again()

    def _learn_now(self) -> None:
        now = datetime.now(UTC)
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
        self._market.learn(
            banned=self._books.banned(now),
            reliability={each.id: each.score for each in self._books.list_providers()},
        )
        self._purse.others_spent(
            self._books.spent() - self._books.spent(batcher_id=self._id),
            self._books.spent(since=midnight) - self._books.spent(since=midnight, batcher_id=self._id),
        )

    # Money

    def _refusal(self, extra: Decimal) -> str | None:
        reason = self._purse.refusal(extra)
        if reason is None:
            return None
        if self._unaffordable is None:
            log.warning("%s", reason)
        self._unaffordable = extra if self._unaffordable is None else min(extra, self._unaffordable)
        if self._backlog is not None and not self._is_closed:
            self._backlog.refuse_all(BudgetReached(reason))
        return reason

    def _is_affordable(self, price: Price) -> bool:
        return self._purse.refusal(self._start_cost(price)) is None

    def _too_dear(self, price: Price) -> None:
        self._refusal(self._start_cost(price))

    def _start_cost(self, price: Price) -> Decimal:
        # A start that hangs is paid until it is given up, but no cap should be so tight that nothing could start.
        return price.most(min(60.0, self._settings.start_seconds))

    def _agreed(self, model: str, agreement: Any) -> None:
        assert self._session is not None
        self._diary.agreed(model, agreement, self._session.allocation_id)

    # Hires

    def _hired(self, hire: Hire) -> None:
        log.info("%s is hired for %s", hire.provider_name, hire.model, extra={"agreement_id": hire.agreement_id})
        self._unaffordable = None
        self._purse.open(hire.agreement_id, hire.most)
        self._diary.hired(hire)

    def _hire_ended(self, hire: Hire) -> None:
        log.info("%s is let go after %d chunks", hire.provider_name, hire.chunks)
        self._diary.hire_ended(hire)
        if self._session is not None and self._session.settler is not None:
            self._session.settler.expect(hire.agreement_id, hire.seconds())

    def _is_kept(self, hire: Hire) -> bool:
        rental = self._rentals.get(hire.model)
        if rental is None or self._is_closed:
            return False
        return len([each for each in rental.hires if not each.leaving]) <= self._settings.min_workers

    def _unsigned(self, provider_id: str) -> None:
        log.info("a provider did not sign: %s", provider_id)
        self._market.did_not_sign(provider_id)

    def _done(self, hire: Hire, errand: Errand, outcome: Outcome) -> None:
        self._blame.succeeded(hire, images=errand.job.items, seconds=outcome.seconds)
        errand.end(outcome)

    def _failed(self, hire: Hire, errand: Errand | None, failure: Failure, seconds: float) -> None:
        is_over = errand is not None and errand.outcome.done()
        if is_over and not failure.is_providers:
            return  # called back: that it ended here is no failure
        log.warning("%s failed: %s", hire.provider_name, failure.error, extra={"agreement_id": hire.agreement_id})
        if failure.is_file_servers and self._session is not None and self._session.broken is None:
            self._session.broken = failure.error.reason
        if failure.is_providers:
            self._blame.failed(hire, errand, failure, seconds)
        if errand is None or self._backlog is None or is_over:
            return
        errand.last = Outcome(
            provider=hire.provider_name,
            seconds=seconds,
            cost=f"{hire.attribute():f}",
            error=failure.error,
            is_blameless=not failure.is_providers,
            provider_id=hire.provider_id,
            agreement_id=hire.agreement_id,
            activity_id=hire.activity_id,
        )
        if self._is_closed:
            errand.end(_refused(WorkerDied("The executor is closed.")))
        elif errand.attempts_under_way:
            return  # another is at it
        elif errand.failures >= self._settings.attempts or errand.attempts >= _MOST_ATTEMPTS:
            self._give_up(errand)
        else:
            self._backlog.put(errand, is_again=True)

    def _give_up(self, errand: Errand) -> None:
        """End an errand that failed too often."""
        self._blame.clear(errand)
        assert errand.last is not None
        errand.end(errand.last)

    def _refuse_the_impatient(self) -> None:
        """Give back what has waited too long for a provider."""
        if self._backlog is None:
            return
        now = time.monotonic()
        for errand in list(self._backlog.errands()):
            if now - errand.waiting_since < self._settings.offer_seconds:
                continue
            rental = self._rentals.get(errand.job.model)
            if rental is not None and any(hire.provider_id not in errand.failed_on for hire in rental.hires):
                continue  # its turn will come
            self._backlog.remove([errand])
            if errand.last is not None and not errand.last.is_blameless:
                self._give_up(errand)  # nobody is left who has not failed on it
            elif self._trouble is not None:
                errand.end(_refused(GolemUnavailable(self._trouble)))
            else:
                errand.end(_refused(NoProvider(self._market.why(errand.job.model))))


def _refused(error: MlgError) -> Outcome:
    return Outcome(provider=None, seconds=0.0, error=error, is_blameless=True)
