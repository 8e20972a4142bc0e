"""The golem executor on a devnet with faults of providers, of the daemon and of this machine."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from batcher.backoff import Backoff
from batcher.errors import BudgetReached, GolemUnavailable, NoProvider
from batcher.executors.golem.timings import GolemTimings
from batcher.executors.golem.yapapi_adapter import OWNER
from batcher.workspace import Workspace
from devnet.scenario import DAEMON, Fault, ProviderPlan
from provider_image.errors import ChunkTimeout, WorkerDied
from store.rentals.ledger import AgreementRecord, AllocationRecord
from tests.devnet.requestor import Requestor
from tests.devnet.running import calls_matching, paid
from tests.golem import MODEL, GolemHarness, devnet_and_store, golem, make_executor, provider, scenario
from tests.process_tree import command_line, descendants
from tests.timing import slowness, until

Body = Callable[[GolemHarness], Coroutine[Any, Any, None]]
Play = Callable[..., None]


#: Waits that suit a test, and not a public network.
SHORT = GolemTimings(
    session_backoff=Backoff(first_seconds=0.2, max_seconds=30.0),
    refresh_seconds=0.2,
    explain_wait_seconds=0.2,
    overtime_seconds=1.0,
    cleanup_seconds=1.0,
    search_backoff=Backoff(first_seconds=0.1, max_seconds=15.0),
    collect_offers_seconds=0.1,
    stale_demand_backoff=Backoff(first_seconds=1.0, max_seconds=1.0),
    unreachable_seconds=1.0,
    payment_backoff=Backoff(first_seconds=0.1, max_seconds=10.0),
    review_seconds=0.5,
)


@pytest.fixture
def play(tmp_path: Path, models_folder: Path) -> Play:
    """Run a test's body against a devnet of these providers."""

    def play(
        body: Body,
        *providers: ProviderPlan,
        faults: tuple[Fault, ...] = (),
        timings: GolemTimings = SHORT,
        **settings: Any,
    ) -> None:
        devnet_options = {key: settings.pop(key) for key in ("funds",) if key in settings}
        models = settings.pop("models", models_folder)

        async def main() -> None:
            plan = scenario(*providers, faults=faults, **devnet_options)
            async with golem(plan, tmp_path, models, timings=timings, **settings) as harness:
                await body(harness)

        asyncio.run(asyncio.wait_for(main(), 300))

    return play


def fault(kind: str, **fields: Any) -> Fault:
    """Make a fault."""
    return Fault(kind=kind, **fields)


def increasingly_expensive(*plans: tuple[str, tuple[Fault, ...]]) -> list[ProviderPlan]:
    """Make providers, each much more expensive than the one before, so that they are used in this order."""
    return [provider(name, *faults, start=f"0.00{number + 1}") for number, (name, faults) in enumerate(plans)]


def approved_providers(harness: GolemHarness) -> list[str]:
    """List the providers of all approved agreements, oldest first."""
    names = {each.node_id: each.name for each in harness.devnet.scenario.providers}
    return [
        names[each.provider_id] for each in harness.devnet.market.agreements.values() if each.approved_at is not None
    ]


def banned(harness: GolemHarness) -> dict[str, str]:
    """Return the banned providers in the ledger: name -> reason."""
    return {each.name: each.ban_reason for each in harness.store.providers.list() if each.ban_reason is not None}


def has_triggered(harness: GolemHarness, name: str) -> bool:
    """Return whether a fault of a provider has been triggered."""
    return any(each == name for each, _, _ in harness.devnet.faults._occasions)


def assert_nothing_is_open(harness: GolemHarness) -> None:
    """Check that nothing is open at the daemon, and that no file is left."""
    devnet = harness.devnet
    assert [each for each in devnet.market.agreements.values() if each.state == "Approved"] == []
    assert devnet.market.list_open_demands() == []
    assert devnet.payment.wallet.list_active() == []
    assert harness.store.ledger.agreements(is_open=True) == []
    assert harness.store.ledger.allocations(is_open=True) == []
    assert list(harness.work.iterdir()) == []


async def close(harness: GolemHarness, *, unbilled: Iterable[str] = ()) -> None:
    """Close the executor, and check that all but the unbilled agreements are paid and recorded as paid."""
    await harness.executor.close()
    assert_nothing_is_open(harness)
    assert [each.provider_name for each in harness.store.ledger.agreements(is_settled=False)] == list(unbilled)
    if not unbilled:
        assert harness.store.ledger.spent() == harness.paid()


# Providers that fail


def test_the_cheapest_provider_that_always_fails_is_paid_once_banned_and_replaced(play: Play) -> None:
    async def body(harness: GolemHarness) -> None:
        first = await harness.run("one", "two", "three")
        second = await harness.run("four")
        await close(harness)

        outcomes = [*first, *second]
        assert [(each.error, each.provider) for each in outcomes] == [(None, "beta")] * 4
        assert approved_providers(harness) == ["alpha", "beta"]
        failed = next(each for each in harness.devnet.market.agreements.values())
        assert paid(harness.devnet)[failed.agreement_id] > 0
        assert list(banned(harness)) == ["alpha"]
        assert {row.name: row.paid > 0 for row in harness.store.ledger.costs("provider")} == {
            "alpha": True,
            "beta": True,
        }

    play(body, *increasingly_expensive(("alpha", (fault("exit-nonzero"),)), ("beta", ())), max_workers=1)


def test_a_provider_that_takes_its_time_to_sign_delays_no_other(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    from ya_market import RequestorApi

    plain = RequestorApi.wait_for_approval

    def wait(self: Any, agreement_id: str, **options: Any) -> Any:
        return plain(self, agreement_id, timeout=300, _request_timeout=301)  # yapapi's own is 15 s

    monkeypatch.setattr(RequestorApi, "wait_for_approval", wait)

    async def body(harness: GolemHarness) -> None:
        outcomes = await harness.run("one", "two")
        signed = approved_providers(harness)
        await close(harness)

        assert [(each.error, each.provider) for each in outcomes] == [(None, "beta")] * 2
        assert signed == ["beta"], "alpha, which is cheaper and was asked first, has not signed yet"

    plans = increasingly_expensive(("alpha", (fault("slow-approval", seconds=250.0),)), ("beta", ()))
    play(body, *plans, max_workers=2)


def test_a_chunk_never_goes_back_to_a_provider_that_failed_on_it(play: Play) -> None:
    async def body(harness: GolemHarness) -> None:
        (outcome,) = await harness.run("one")
        providers = approved_providers(harness)
        (other,) = await harness.run("two")
        await close(harness)

        assert isinstance(outcome.error, WorkerDied) and not outcome.is_blameless
        assert outcome.provider == "alpha"
        assert providers == ["alpha"], "no second agreement for a chunk that it may not get"
        assert (other.error, other.provider) == (None, "alpha")

    faults = (fault("exit-nonzero", times=1),)
    play(body, provider("alpha", *faults), ban_seconds=0.3, offer_seconds=2.0 * slowness())


def test_a_chunk_that_fails_everywhere_fails_and_its_providers_are_unbanned(play: Play) -> None:
    async def body(harness: GolemHarness) -> None:
        (outcome,) = await harness.run("poison")
        (next_one,) = await harness.run("next")
        await close(harness)

        assert isinstance(outcome.error, WorkerDied) and not outcome.is_blameless
        assert next_one.error is None
        assert sorted(approved_providers(harness)[:3]) == ["alpha", "beta", "gamma"]
        assert banned(harness) == {}

    once = (fault("exit-nonzero", times=1),)
    play(body, *increasingly_expensive(("alpha", once), ("beta", once), ("gamma", once)), attempts=3)


def test_a_provider_that_hangs_is_stopped_at_the_timeout_and_its_slot_is_reused(play: Play) -> None:
    async def body(harness: GolemHarness) -> None:
        pace = slowness()
        started_at = time.monotonic()
        (outcome,) = await harness.run("one", timeout_seconds=4 * pace)
        seconds = time.monotonic() - started_at
        await close(harness)

        assert (outcome.error, outcome.provider) == (None, "beta")
        assert seconds < 10 * max(pace, slowness())
        assert "in time" in banned(harness)["alpha"]

    play(body, *increasingly_expensive(("alpha", (fault("hang"),)), ("beta", ())), max_workers=1)


def test_a_chunk_that_hangs_everywhere_is_a_timeout(play: Play) -> None:
    async def body(harness: GolemHarness) -> None:
        (outcome,) = await harness.run("one", timeout_seconds=1)
        await close(harness)

        assert isinstance(outcome.error, ChunkTimeout)
        assert not outcome.is_blameless

    play(body, provider("alpha", fault("hang")), provider("beta", fault("hang")), attempts=2)


def test_calls_that_hang_block_neither_the_slot_nor_closing(play: Play) -> None:
    async def body(harness: GolemHarness) -> None:
        (outcome,) = await harness.run("one", timeout_seconds=4 * slowness())
        started_at = time.monotonic()
        await close(harness)

        assert (outcome.error, outcome.provider) == (None, "beta")
        assert time.monotonic() - started_at < 5 * slowness()
        assert list(banned(harness)) == ["alpha"]

    play(body, *increasingly_expensive(("alpha", (fault("vanish-http"),)), ("beta", ())), max_workers=1)


def test_a_chunk_is_answered_elsewhere_whatever_step_fails(play: Play) -> None:
    async def body(harness: GolemHarness) -> None:
        (outcome,) = await harness.run("one")
        await close(harness)

        assert (outcome.error, outcome.provider) == (None, "zeta")
        assert approved_providers(harness) == ["alpha", "beta", "gamma", "delta", "zeta"]
        # A provider that cannot create an activity is not banned but skipped, as if it had not signed.
        assert set(banned(harness)) == {"beta", "gamma", "delta"}
        assert [bill.provider for bill in outcome.bills] == ["gamma", "delta", "zeta"], "the others failed earlier"
        assert outcome.bills[-1].agreement_id == list(harness.devnet.market.agreements)[-1]

    plans = increasingly_expensive(
        ("alpha", (fault("no-activity"),)),
        ("beta", (fault("fail-deploy"),)),
        ("gamma", (fault("die"),)),
        ("delta", (fault("drop-agreement"),)),
        ("zeta", ()),
    )
    play(body, *plans, attempts=5, max_workers=1)


def test_a_provider_whose_calls_fail_again_and_again_is_not_hired_without_end(play: Play) -> None:
    async def body(harness: GolemHarness) -> None:
        (outcome,) = await harness.run("one")
        await close(harness)

        assert isinstance(outcome.error, NoProvider | GolemUnavailable)
        assert approved_providers(harness) == ["alpha", "alpha"]
        assert list(banned(harness)) == ["alpha"]

    fails = fault("http-500", path="GET /activity-api/v1/activity/*/exec/*")
    play(body, provider("alpha"), faults=(fails,), max_workers=1, offer_seconds=5.0 * slowness())


WRONG_RESULTS = ("garbage", "truncate", "oversize", "wrong-digest", "swap-results")


def test_wrong_results_are_detected_and_the_chunk_is_answered_elsewhere(play: Play) -> None:
    async def body(harness: GolemHarness) -> None:
        # A correct result, which the provider with `swap-results` then has available.
        (outcome,) = await harness.run("one")
        await close(harness)

        assert (outcome.error, outcome.provider) == (None, "honest")
        assert approved_providers(harness) == [*WRONG_RESULTS, "honest"]
        assert set(banned(harness)) == set(WRONG_RESULTS)

    plans = increasingly_expensive(*((kind, (fault(kind),)) for kind in WRONG_RESULTS), ("honest", ()))
    play(body, *plans, attempts=6, max_workers=1)


def test_a_results_file_is_measured_while_it_arrives_and_can_be_written_only_until_its_chunk_ends(play: Play) -> None:
    async def body(harness: GolemHarness) -> None:
        running = asyncio.create_task(harness.run("one", timeout_seconds=1000))
        (file,) = await until(lambda: list(harness.work.glob("*.part")))
        os.truncate(file, 65 * 1024 * 1024)
        (outcome,) = await running
        texts = [path.read_text() for path in harness.devnet._exchange.glob("*/*") if path.is_file()]
        published = [json.loads(text) for text in texts if text]
        await close(harness)

        assert (outcome.error, outcome.provider) == (None, "honest")
        assert "The results file has 68157440 bytes" in banned(harness)["hangs"]
        assert published and not any(entry["is_target"] for entry in published)

    play(body, *increasingly_expensive(("hangs", (fault("hang"),)), ("honest", ())), max_workers=1)


def test_a_provider_that_does_not_sign_is_skipped(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    from ya_market import RequestorApi

    plain = RequestorApi.wait_for_approval

    def wait(self: Any, agreement_id: str, **options: Any) -> Any:
        return plain(self, agreement_id, **{**options, "timeout": 0.7})  # yapapi's own is 15 s

    monkeypatch.setattr(RequestorApi, "wait_for_approval", wait)

    async def body(harness: GolemHarness) -> None:
        (outcome,) = await harness.run("one")
        await close(harness)

        assert (outcome.error, outcome.provider) == (None, "gamma")
        assert banned(harness) == {}

    plans = increasingly_expensive(
        ("alpha", (fault("reject"),)),
        ("beta", (fault("never-approve"),)),
        ("gamma", (fault("slow-approval", seconds=0.2),)),
    )
    play(body, *plans, max_workers=1)


def test_an_agreement_that_is_signed_too_late_is_cancelled(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    from ya_market import RequestorApi

    plain = RequestorApi.wait_for_approval

    def wait(self: Any, agreement_id: str, **options: Any) -> Any:
        return plain(self, agreement_id, **{**options, "timeout": 0.5})

    monkeypatch.setattr(RequestorApi, "wait_for_approval", wait)

    async def body(harness: GolemHarness) -> None:
        (outcome,) = await harness.run("one")
        alpha = next(iter(harness.devnet.market.agreements.values()))
        await until(lambda: harness.devnet.market.providers[alpha.provider_id].agreement is None)
        await close(harness)

        assert (outcome.error, outcome.provider) == (None, "beta")
        assert alpha.state == "Cancelled"

    play(body, *increasingly_expensive(("alpha", (fault("slow-approval", seconds=1.2),)), ("beta", ())), max_workers=1)


# Bills


def test_debit_notes_of_any_kind_do_not_interrupt_the_work(play: Play) -> None:
    async def body(harness: GolemHarness) -> None:
        outcomes = []
        for number in range(4):
            outcomes += await harness.run(f"chunk{number}")
        await until(lambda: len(harness.devnet.payment.debit_notes) >= 5)
        await close(harness)

        assert [each.error for each in outcomes] == [None] * 4
        assert approved_providers(harness) == ["alpha"]

    notes = (fault("payable-debit-note", every=2), fault("frequent-debit-notes", seconds=0.1))
    play(body, provider("alpha", *notes), max_workers=1)


def test_closing_waits_only_for_a_limited_time_for_an_invoice(play: Play) -> None:
    async def body(harness: GolemHarness) -> None:
        (outcome,) = await harness.run("one")
        started_at = time.monotonic()
        await close(harness, unbilled=["alpha"])

        assert outcome.error is None
        assert 0.4 < time.monotonic() - started_at < 4 * slowness()

    play(body, provider("alpha", fault("never-bill")), settle_seconds=0.5)


def test_an_invoice_that_is_too_high_is_rejected_and_its_provider_banned(play: Play) -> None:
    async def body(harness: GolemHarness) -> None:
        (first,) = await harness.run("one")
        await until(lambda: "alpha" in banned(harness))
        (second,) = await harness.run("two")
        await close(harness)

        assert (first.error, first.provider) == (None, "alpha")
        assert (second.error, second.provider) == (None, "beta")
        (total,) = harness.store.ledger.costs("total")
        assert total.refused > total.paid == harness.paid() > 0
        assert "too high" in banned(harness)["alpha"]
        assert [each.status for each in harness.devnet.payment.invoices.values()] == ["REJECTED", "ACCEPTED"]

    greedy = (fault("overbill", factor=20.0),)
    play(body, *increasingly_expensive(("alpha", greedy), ("beta", ())), idle_seconds=0.2)


def test_a_provider_that_the_daemon_did_not_tell_of_the_end_is_paid_until_it_was_told(play: Play) -> None:
    async def body(harness: GolemHarness) -> None:
        (outcome,) = await harness.run("one")
        await until(lambda: paid(harness.devnet) != {})
        await close(harness)

        assert outcome.error is None
        assert banned(harness) == {}
        assert harness.store.decisions.refused() == []

    # Nearly all of the bill is for time; the agreement goes on for some seconds after the worker has ended.
    deaf = (
        fault("http-500", path="DELETE /activity-api/v1/activity/*", times=2),
        fault("http-500", path="POST /market-api/v1/agreements/*/terminate", times=2),
    )
    plan = provider("alpha", start="0.000001", second="0.0001", price_per_cpu_second=Decimal(0))
    timings = replace(SHORT, ending_seconds=0.0, terminate_backoff=Backoff(first_seconds=3.0, max_seconds=3.0))
    play(body, plan, faults=deaf, idle_seconds=0.1, timings=timings)


def test_agreements_and_allocations_are_closed_although_the_daemon_cannot_list_agreements(play: Play) -> None:
    async def body(harness: GolemHarness) -> None:
        async with aiohttp.ClientSession() as http:
            dead = Requestor(harness.devnet, http)
            allocation = await dead.allocate("0.1")
            tag = (harness.work.parent / "golem-home").read_text().strip()
            id = await dead.agree(await dead.subscribe(**{OWNER: f"{tag}.dead0001-1"}))
        record = AllocationRecord(
            id=dead.allocation_id,
            batcher_id="dead0001",
            platform=allocation["paymentPlatform"],
            address=allocation["address"],
            amount=Decimal("0.1"),
            created_at=datetime.now(UTC),
        )
        harness.store.ledger.record_allocation(record)
        agreement = AgreementRecord(
            id=id,
            allocation_id=record.id,
            provider_id="0x1",
            provider_name="alpha",
            model=MODEL,
            start_price=Decimal(0),
            price_per_cpu_second=Decimal(0),
            price_per_second=Decimal(0),
            created_at=datetime.now(UTC),
        )
        harness.store.ledger.record_agreement(agreement)
        next_executor = harness.next_executor()
        await next_executor.start()
        await next_executor.close()

        assert harness.devnet.market.agreements[id].state == "Terminated"
        assert dead.allocation_id not in {each.allocation_id for each in harness.devnet.payment.wallet.list_active()}
        assert dead.allocation_id not in {each.id for each in harness.store.ledger.allocations(is_open=True)}
        assert harness.store.ledger.agreements(is_open=True) == []

    play(body, provider("alpha"), faults=(fault("http-500", path="GET /market-api/v1/agreements"),))


def test_a_batcher_ends_the_agreements_of_another_that_is_killed_meanwhile(play: Play) -> None:
    async def body(harness: GolemHarness) -> None:
        async with aiohttp.ClientSession() as http:
            other, workspace = Requestor(harness.devnet, http), Workspace(harness.work.parent, "other001")
            workspace.create()
            await other.allocate("0.1")
            tag = (harness.work.parent / "golem-home").read_text().strip()
            id = await other.agree(await other.subscribe(**{OWNER: f"{tag}.other001-1"}))
            workspace.remove()  # as if its batcher were killed now
            agreements = harness.devnet.market.agreements
            await until(lambda: agreements[id].state == "Terminated")
        await until(lambda: harness.store.ledger.agreements(is_open=True) == [])

        assert [each.id for each in harness.store.ledger.agreements()] == [id]

    play(body, provider("alpha"), timings=replace(SHORT, recover_again_seconds=0.2))


def test_an_invoice_that_comes_after_the_end_is_paid_by_the_next_batcher(play: Play) -> None:
    async def body(harness: GolemHarness) -> None:
        (outcome,) = await harness.run("one")
        await close(harness, unbilled=["alpha"])
        await until(lambda: harness.devnet.payment.invoices != {})
        next_executor = harness.next_executor()
        try:
            await next_executor.start()
            await until(lambda: harness.store.ledger.agreements(is_settled=False) == [])
        finally:
            await next_executor.close()

        assert outcome.error is None
        assert harness.store.ledger.spent() == harness.paid() > 0
        assert harness.devnet.payment.wallet.list_active() == []

    play(body, provider("alpha", fault("late-bill", seconds=0.5)), settle_seconds=0.0)


def test_an_old_invoice_is_paid_even_if_the_new_budget_is_smaller(play: Play) -> None:
    async def body(harness: GolemHarness) -> None:
        await harness.run("one")
        await close(harness, unbilled=["alpha"])
        await until(lambda: harness.devnet.payment.invoices != {})
        next_executor = harness.next_executor(budget_run=Decimal("0.0001"))
        try:
            await next_executor.start()
            await until(lambda: harness.store.ledger.agreements(is_settled=False) == [])
        finally:
            await next_executor.close()

        assert harness.store.ledger.spent() == harness.paid() > 0
        assert len(harness.devnet.payment.wallet.allocations) == 3, "one for that invoice alone"
        assert harness.devnet.payment.wallet.list_active() == []

    # Debit notes are not read: accepting one would already reserve the amount.
    unread = (fault("http-500", path="GET /payment-api/v1/debitNoteEvents"),)
    play(body, provider("alpha", fault("late-bill", seconds=0.3)), faults=unread, settle_seconds=0.0)


def test_what_is_left_open_is_settled_although_the_budget_is_used_up(play: Play) -> None:
    async def body(harness: GolemHarness) -> None:
        await harness.run("one")
        await close(harness, unbilled=["alpha"])
        await until(lambda: harness.devnet.payment.invoices != {})
        # Less than what may be owed for the agreement that is left open.
        next_executor = harness.next_executor(budget_total=Decimal("0.0000001"))
        try:
            await next_executor.start()
            await until(lambda: harness.store.ledger.agreements(is_settled=False) == [])
        finally:
            await next_executor.close()

        assert harness.store.ledger.spent() == harness.paid() > 0
        assert harness.store.reservations.list(is_open=True) == []
        assert harness.devnet.payment.wallet.list_active() == []

    unread = (fault("http-500", path="GET /payment-api/v1/debitNoteEvents"),)
    play(body, provider("alpha", fault("late-bill", seconds=0.3)), faults=unread, settle_seconds=0.0)


def test_two_batchers_of_a_home_each_pay_their_own_bills(tmp_path: Path, models_folder: Path) -> None:
    async def main() -> None:
        async with devnet_and_store(scenario(provider("alpha"), provider("beta")), tmp_path, models_folder) as (
            devnet,
            store,
        ):
            names = ("aaaa1111", "bbbb2222")
            workspaces = [Workspace(tmp_path / "work", name) for name in names]
            executors = []
            try:
                for workspace, name in zip(workspaces, names, strict=True):
                    workspace.create()
                    executors.append(
                        make_executor(devnet, store, tmp_path, models_folder, name=name, timings=SHORT, max_workers=1)
                    )
                    await executors[-1].start()
                harnesses = [GolemHarness(devnet, each, store, tmp_path / "jobs", models_folder) for each in executors]
                runs = (harness.run(*(f"{harness.work.name}-{each}" for each in range(3))) for harness in harnesses)
                outcomes = await asyncio.gather(*runs)
                await asyncio.gather(*(each.close() for each in executors))
            finally:
                for executor in executors:
                    await executor.close()
                for workspace in workspaces:
                    workspace.remove()

            assert [each.error for some in outcomes for each in some] == [None] * 6
            allocation_of = {each.id: each.allocation_id for each in store.ledger.agreements(is_settled=True)}
            bills = {**devnet.payment.invoices, **devnet.payment.debit_notes}
            accepted = [
                (bills[call.path.split("/")[-2]].agreement_id, json.loads(call.request)["allocationId"])
                for call in calls_matching(devnet, "POST /payment-api/v1/*/accept")
            ]
            assert set(accepted) == set(allocation_of.items())
            assert len(set(allocation_of.values())) == 2

    asyncio.run(asyncio.wait_for(main(), 300))


# Budgets


def test_work_stops_before_the_budget_is_used_up(play: Play) -> None:
    budget = Decimal("0.5")

    async def body(harness: GolemHarness) -> None:
        (done,) = await harness.run("one", timeout_seconds=100)
        (worker,) = next(iter(harness.executor._pools.values())).workers
        worker.reservation._committed_at -= 460  # as if it had worked for so long
        refused = await harness.run("two", "three", timeout_seconds=100)
        unavailable_reason = harness.executor.unavailable_reason(MODEL)
        await close(harness)

        assert done.error is None
        assert all(isinstance(each.error, BudgetReached) and each.is_blameless for each in refused)
        assert unavailable_reason is not None and "The budget of this run is used up" in unavailable_reason
        assert 0 < harness.paid() <= budget

    expensive = provider("alpha", second="0.001", price_per_cpu_second=Decimal(0))
    play(body, expensive, budget_run=budget, max_price_hour=None, start_seconds=100.0)


def test_two_batchers_do_not_exceed_the_budget_of_the_day_together(tmp_path: Path, models_folder: Path) -> None:
    budget, pace = Decimal("0.2"), slowness()
    plans = [provider(name, second=f"{0.02 / pace:.6f}", price_per_cpu_second=Decimal(0)) for name in ("alpha", "beta")]
    timings = replace(SHORT, overtime_seconds=0.1, ending_seconds=0.5 * pace, cover_seconds=1.0 * pace)
    limits: dict[str, Any] = {"budget_day": budget, "start_seconds": 4 * pace, "max_price_hour": None}
    limits["settle_seconds"] = 60.0

    async def main() -> None:
        async with devnet_and_store(scenario(*plans), tmp_path, models_folder) as (devnet, store):
            workspaces = [Workspace(tmp_path / "work", name) for name in ("aaaa1111", "bbbb2222")]
            executors, used = [], []
            try:
                for each in workspaces:
                    each.create()
                    name = each.folder.name
                    executors.append(
                        make_executor(devnet, store, tmp_path, models_folder, name=name, timings=timings, **limits)
                    )
                    await executors[-1].start()
                harnesses = [GolemHarness(devnet, each, store, tmp_path / "jobs", models_folder) for each in executors]
                jobs = [
                    harness.run(*(f"{harness.work.name}-{each}" for each in range(20)), timeout_seconds=2 * pace)
                    for harness in harnesses
                ]
                running = asyncio.ensure_future(asyncio.gather(*jobs))
                while not running.done():
                    used.append(store.reservations.used_by_all(now=datetime.now(UTC))["day"])
                    await asyncio.sleep(0.05)
                outcomes = [outcome for some in running.result() for outcome in some]
                await asyncio.gather(*(each.close() for each in executors))
            finally:
                for executor in executors:
                    await executor.close()
                for workspace in workspaces:
                    workspace.remove()

            assert {type(each.error) for each in outcomes} == {type(None), BudgetReached}
            assert 0 < max(used) <= budget
            assert 0 < store.ledger.spent() == sum(paid(devnet).values()) <= budget

    asyncio.run(asyncio.wait_for(main(), 300))


def test_a_worker_that_is_kept_ends_before_the_budget_is_used_up(play: Play) -> None:
    budget, pace = Decimal("0.15"), slowness()

    async def body(harness: GolemHarness) -> None:
        (outcome,) = await harness.run("one", timeout_seconds=2 * pace)
        reserved = []

        def has_ended() -> bool:
            reserved.append(sum(each.amount for each in harness.store.reservations.list()))
            return harness.store.ledger.agreements(is_open=True) == []

        await until(has_ended)
        await close(harness)

        assert outcome.error is None
        assert len(set(reserved)) > 2, "it was reserved step by step"
        assert max(reserved) <= budget and 0 < harness.paid() <= budget

    kept = provider("alpha", second=f"{0.015 / pace:.6f}", price_per_cpu_second=Decimal(0))
    timings = replace(SHORT, overtime_seconds=0.1, ending_seconds=1.0 * pace, cover_seconds=1.0 * pace)
    settings = {"min_workers": 1, "idle_seconds": 0.2, "start_seconds": 4 * pace, "max_price_hour": None}
    play(body, kept, budget_run=budget, timings=timings, **settings)


def test_a_wallet_without_enough_funds_is_named_as_the_reason(play: Play) -> None:
    async def body(harness: GolemHarness) -> None:
        (outcome,) = await harness.run("one")
        unavailable_reason = harness.executor.unavailable_reason(MODEL)

        assert isinstance(outcome.error, GolemUnavailable) and outcome.is_blameless
        assert unavailable_reason is not None and "Not enough funds" in unavailable_reason
        assert harness.devnet.market.agreements == {}

    play(body, provider("alpha"), funds=Decimal("0.5"), offer_seconds=0.5)


# No provider


def test_a_market_without_offers_is_named_as_the_reason_and_blames_no_chunk(play: Play) -> None:
    async def body(harness: GolemHarness) -> None:
        run = asyncio.create_task(harness.executor.run(harness.job("one")))
        await until(lambda: harness.executor.unavailable_reason(MODEL) is not None)
        unavailable_reason = harness.executor.unavailable_reason(MODEL)
        outcome = await run

        assert isinstance(outcome.error, NoProvider) and outcome.is_blameless
        assert unavailable_reason == outcome.error.reason
        assert "No provider on the market offers what the model needs." in outcome.error.reason

    play(body, provider("alpha", runtimes=("mlg",)), offer_seconds=1.0)


def test_rejected_offers_are_named_as_the_reason_and_blame_no_chunk(play: Play) -> None:
    async def body(harness: GolemHarness) -> None:
        for plan in harness.devnet.scenario.providers[2:]:
            prices = {"start_price": plan.start_price, "price_per_cpu_second": Decimal(0)}
            now = datetime.now(UTC)
            harness.store.providers.record_offer(
                plan.node_id, name=plan.name, price_per_second=Decimal(0), now=now, **prices
            )
            harness.store.providers.ban(plan.node_id, until=None, reason="Under maintenance.", by_operator=True)
        (outcome,) = await harness.run("one")
        unavailable_reason = harness.executor.unavailable_reason(MODEL)

        assert isinstance(outcome.error, NoProvider) and outcome.is_blameless
        for reason in ("of 3 offers", "1 banned", "1 above 0.5 GLM per hour", "1 above 0.01 GLM per start"):
            assert reason in outcome.error.reason
        assert unavailable_reason is None, "nothing is queued any more"
        assert harness.devnet.market.agreements == {}

    plans = (provider("alpha", start="0.02"), provider("beta", second="0.001"), provider("gamma"))
    play(body, *plans, offer_seconds=1.5)


# The daemon


START = ("GET /me", "POST /payment-api/v1/allocations", "GET /payment-api/v1/demandDecorations")
MARKET = (
    "POST /market-api/v1/demands",
    "GET /market-api/v1/demands/*/events",
    "POST /market-api/v1/demands/*/proposals/*",
    "POST /market-api/v1/agreements",
    "GET /market-api/v1/agreements/*",
    "POST /market-api/v1/agreements/*/confirm",
    "POST /market-api/v1/agreements/*/wait",
)
ACTIVITY = (
    "POST /activity-api/v1/activity",
    "POST /activity-api/v1/activity/*/exec",
    "GET /activity-api/v1/activity/*/exec/*",
    "DELETE /activity-api/v1/activity/*",
    "POST /market-api/v1/agreements/*/terminate",
)
PAYMENT = (
    "GET /payment-api/v1/invoiceEvents",
    "GET /payment-api/v1/debitNoteEvents",
    "GET /payment-api/v1/invoices*",
    "GET /payment-api/v1/debitNotes/*",
    "POST /payment-api/v1/invoices/*/accept",
    "POST /payment-api/v1/debitNotes/*/accept",
    "DELETE /payment-api/v1/allocations/*",
    "GET /payment-api/v1/allocations",
    "GET /market-api/v1/demands",
    "DELETE /market-api/v1/demands/*",
)


#: The daemon performs these calls, but their responses are lost.
UNANSWERED = (
    "POST /market-api/v1/demands",
    "POST /market-api/v1/agreements",
    "POST /market-api/v1/agreements/*/confirm",
    "POST /activity-api/v1/activity",
    "POST /activity-api/v1/activity/*/exec",
    "DELETE /activity-api/v1/activity/*",
    "POST /market-api/v1/agreements/*/terminate",
    "POST /payment-api/v1/invoices/*/accept",
    "DELETE /payment-api/v1/allocations/*",
)
TROUBLES = {
    "start": ("http-500", START),
    "market": ("http-500", MARKET),
    "activity": ("http-500", ACTIVITY),
    "payment": ("http-500", PAYMENT),
    "unanswered": ("gone", UNANSWERED),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_one_failure_of_the_daemon_on_each_path_loses_neither_work_nor_money(play: Play, trouble: str) -> None:
    kind, paths = TROUBLES[trouble]

    async def body(harness: GolemHarness) -> None:
        first = await harness.run("one", "two")
        second = await harness.run("three", "four")
        await close(harness)

        assert [each.error for each in (*first, *second)] == [None] * 4
        triggered = {number for name, _, number in harness.devnet.faults._occasions if name == DAEMON}
        assert [path for number, path in enumerate(paths) if number not in triggered] == []
        # Two of them may hit calls for the same provider in a row, which then counts as its fault.
        assert banned(harness) == {} or sum("/activity/" in path for path in paths) > 1

    faults = tuple(fault(kind, path=path, times=1) for path in paths)
    play(body, provider("alpha"), provider("beta"), provider("gamma"), faults=faults, max_workers=2)


@pytest.mark.parametrize("is_missed", [False, True], ids=["at once", "later"])
def test_a_daemon_that_restarts_during_the_work_needs_no_restart_of_the_executor(play: Play, is_missed: bool) -> None:
    async def body(harness: GolemHarness) -> None:
        runs = asyncio.create_task(harness.run("one", "two", "three"))
        await until(lambda: has_triggered(harness, "alpha"))
        await harness.devnet.stop()
        if is_missed:
            await until(lambda: "daemon" in (harness.executor.unavailable_reason(MODEL) or ""))
        await harness.devnet.start()
        outcomes = await runs
        await close(harness)

        assert [each.error for each in outcomes] == [None] * 3
        assert (len(harness.devnet.payment.wallet.allocations) > 1) == is_missed, "a new session only if needed"

    timings = replace(SHORT, unreachable_seconds=0.5 if is_missed else 30.0)
    play(body, provider("alpha", fault("hang", times=1)), provider("beta"), max_workers=2, timings=timings)


def test_a_daemon_that_does_not_run_at_the_start_is_waited_for(tmp_path: Path, models_folder: Path) -> None:
    async def main() -> None:
        async with devnet_and_store(scenario(provider("alpha")), tmp_path, models_folder) as (devnet, store):
            await devnet.stop()
            executor = make_executor(devnet, store, tmp_path, models_folder, timings=SHORT)
            harness = GolemHarness(devnet, executor, store, tmp_path / "jobs", models_folder)
            try:
                await executor.start()
                unavailable_reason = executor.unavailable_reason(MODEL)
                runs = asyncio.create_task(harness.run("one"))
                await asyncio.sleep(0)
                await devnet.start()
                (outcome,) = await runs
                await close(harness)
            finally:
                await executor.close()

            assert unavailable_reason is not None and devnet.url in unavailable_reason
            assert outcome.error is None

    asyncio.run(asyncio.wait_for(main(), 300))


# This machine


def file_servers() -> list[int]:
    """List the gftp processes of this test."""
    return [pid for pid in descendants(os.getpid()) if any(word.endswith("gftp") for word in command_line(pid))]


def test_a_file_server_that_is_killed_is_replaced(play: Play) -> None:
    async def body(harness: GolemHarness) -> None:
        (first,) = await harness.run("one")
        for pid in file_servers():
            os.kill(pid, signal.SIGKILL)
        others = await harness.run("two", "three", "four")
        await close(harness)

        assert [each.error for each in (first, *others)] == [None] * 4
        assert banned(harness) == {}

    play(body, provider("alpha"), provider("beta"), max_workers=2)


def test_jobs_cancelled_at_any_moment_do_not_mix_up_the_files_of_others(play: Play) -> None:
    chance = random.Random(7)

    async def cancelled(harness: GolemHarness, name: str) -> None:
        run = asyncio.create_task(harness.executor.run(harness.job(name)))
        deadline = time.monotonic() + chance.uniform(0.0, 0.25)
        while time.monotonic() < deadline:
            await asyncio.sleep(0)
            session = harness.executor._session
            if (
                chance.random() < 0.5
                and session is not None
                and session.engine._storage_manager._process._lock.locked()
            ):
                break  # the worst moment: the file server has a request and has not responded
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)

    async def body(harness: GolemHarness) -> None:
        await harness.run("first", "second")
        for number in range(8):
            await asyncio.gather(*(cancelled(harness, f"unwanted{number}-{each}") for each in range(3)))
        outcomes = await harness.run(*(f"wanted{number}" for number in range(6)))
        await close(harness)

        # Each job has checked that its results file answers its own chunk.
        assert [each.error for each in outcomes] == [None] * 6
        assert len(harness.devnet.payment.wallet.allocations) == 1, "no new session was needed"

    play(body, *(provider(name) for name in ("alpha", "beta", "gamma")), max_workers=2)


#: A batcher's executor in a separate process, which a test kills while its workers run.
BATCHER = """
import asyncio, os, sys
from pathlib import Path
from batcher.executors.golem.executor import GolemExecutor
from batcher.executors.golem.yapapi_adapter import OWNER
from batcher.workspace import Workspace
from store.settings import HomeSettings
from store.store import Store
from tests.contexts import make_context
from tests.golem import GolemHarness

async def main(home, models):
    workspace = Workspace(home / "work", "cccc3333")
    workspace.create()
    store = Store(HomeSettings(home=home / "home", busy_seconds=5))
    context = make_context(workspace.folder, models, store=store)
    executor = GolemExecutor(context)
    await executor.start()
    await GolemHarness(None, executor, store, home / "jobs", models).run("one", "two")

asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
"""


def test_the_next_batcher_closes_and_pays_what_a_killed_batcher_left_open(tmp_path: Path, models_folder: Path) -> None:
    async def main() -> None:
        plan = scenario(provider("alpha", fault("hang")), provider("beta", fault("hang")))
        async with devnet_and_store(plan, tmp_path, models_folder) as (devnet, store):
            environment = {**os.environ, **devnet.variables, "MLG_HOME": str(tmp_path / "home")}
            words = (sys.executable, "-c", BATCHER, str(tmp_path), str(models_folder))
            batcher = await asyncio.create_subprocess_exec(*words, env=environment)
            try:
                await until(lambda: len(calls_matching(devnet, "POST /activity-api/v1/activity/*/exec")) >= 4)
                open_before = len(devnet.market.list_open_demands()), len(devnet.payment.wallet.list_active())
            finally:
                batcher.kill()
                await batcher.wait()
            executor = make_executor(devnet, store, tmp_path, models_folder, timings=SHORT)
            harness = GolemHarness(devnet, executor, store, tmp_path / "jobs", models_folder)
            await executor.start()
            await until(lambda: len(paid(devnet)) == 2)
            open_after = len(devnet.market.list_open_demands()), len(devnet.payment.wallet.list_active())
            await close(harness)

            assert open_before == (1, 1)
            assert open_after == (0, 1), "its own allocation"
            assert {each.state for each in devnet.market.agreements.values()} == {"Terminated"}

    asyncio.run(asyncio.wait_for(main(), 300))


def test_closing_during_the_work_ends_pays_and_releases_everything_quickly(play: Play) -> None:
    async def body(harness: GolemHarness) -> None:
        runs = asyncio.create_task(harness.run("one", "two", "three", "four"))
        await until(lambda: len(calls_matching(harness.devnet, "POST /activity-api/v1/activity/*/exec")) >= 4)
        started_at = time.monotonic()
        await close(harness)
        seconds = time.monotonic() - started_at
        outcomes = await runs

        assert seconds < 10 * slowness()
        assert all(each.is_blameless and each.error is not None for each in outcomes)
        assert len(paid(harness.devnet)) == 2
        assert file_servers() == []
        assert banned(harness) == {}

    play(body, provider("alpha", fault("hang")), provider("beta", fault("hang")), max_workers=2)


def test_closing_ends_within_its_limit_though_no_call_to_the_daemon_returns(play: Play) -> None:
    async def body(harness: GolemHarness) -> None:
        (outcome,) = await harness.run("one")
        harness.devnet.faults._faults[DAEMON] = (fault("http-hang", path="*"),)
        started_at = time.monotonic()
        await harness.executor.close()

        assert outcome.error is None
        assert time.monotonic() - started_at < harness.executor.stop_seconds() + 2 * slowness()

    timings = replace(SHORT, recovery_seconds=1.0, stop_seconds=1.0, ledger_close_seconds=1.0, cleanup_seconds=0.5)
    play(body, provider("alpha"), timings=timings, settle_seconds=0.5)


def test_two_models_have_workers_at_the_same_time(play: Play, custom_models_folder: Path) -> None:
    async def body(harness: GolemHarness) -> None:
        jobs = [harness.job(f"{model}{number}", model=model) for model in (MODEL, "my_pets") for number in range(2)]
        outcomes = await asyncio.gather(*(harness.executor.run(job) for job in jobs))
        await close(harness)

        assert [each.error for each in outcomes] == [None] * 4
        assert {each.model for each in harness.store.ledger.agreements()} == {MODEL, "my_pets"}
        assert len(harness.devnet.payment.wallet.allocations) == 1

    play(body, provider("alpha"), provider("beta"), max_workers=2, models=custom_models_folder)
