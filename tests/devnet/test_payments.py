"""Payments over HTTP: allocations, invoices, debit notes, and the faults of providers that bill."""

from __future__ import annotations

import asyncio
import time
from decimal import Decimal

import pytest

from devnet.provider.invoicing import activity_amount
from devnet.records import format_amount
from devnet.scenario import Fault
from tests.devnet.requestor import PAYMENT, PLATFORM, Requestor, RequestorRunner, single_provider
from tests.devnet.running import paid
from tests.timing import slowness, until


async def test_an_allocation_reserves_funds_until_it_is_released(requestor: RequestorRunner) -> None:
    async with requestor(single_provider(funds=Decimal("1.5"))) as client:
        allocation = await client.allocate("1.000000000000000001")
        path = f"{PAYMENT}/allocations/{client.allocation_id}"
        assert allocation["remainingAmount"] == allocation["totalAmount"] == "1.000000000000000001"
        assert (allocation["spentAmount"], allocation["paymentPlatform"]) == ("0", PLATFORM)
        status, answer = await client.request("POST", f"{PAYMENT}/allocations", {"totalAmount": "0.5"})
        assert (status, answer["message"].startswith("Not enough funds.")) == (400, True)
        assert [each["allocationId"] for each in await client.request_ok("GET", f"{PAYMENT}/allocations")] == [
            client.allocation_id
        ]
        await client.request_ok("DELETE", path)
        assert (await client.request("DELETE", path))[0] == 410
        assert (await client.request("GET", path))[0] == 404
        assert (await client.request("DELETE", f"{PAYMENT}/allocations/none"))[0] == 404
        assert await client.request_ok("GET", f"{PAYMENT}/allocations") == []
        await client.allocate("1.5")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"totalAmount": "much"},
        {"totalAmount": "-1"},
        {"totalAmount": "NaN"},
        {"totalAmount": "1", "timeout": "soon"},
        {"totalAmount": "1", "paymentPlatform": "erc20-mainnet-glm"},
    ],
)
async def test_an_invalid_allocation_is_rejected(requestor: RequestorRunner, body: object) -> None:
    async with requestor(single_provider()) as client:
        assert (await client.request("POST", f"{PAYMENT}/allocations", body))[0] == 400


async def test_an_allocation_names_its_platform_in_two_ways(requestor: RequestorRunner) -> None:
    async with requestor(single_provider()) as client:
        for platform in ("erc20-amoy-tglm", {"driver": "erc20", "network": "amoy", "token": "tglm"}):
            body = {"totalAmount": "1", "paymentPlatform": platform, "address": "0xab"}
            made = await client.request_ok("POST", f"{PAYMENT}/allocations", body)
            assert (made["paymentPlatform"], made["address"]) == ("erc20-amoy-tglm", "0xab")
            query = {"allocationIds": made["allocationId"]}
            decorations = await client.request_ok("GET", f"{PAYMENT}/demandDecorations", **query)
            key = "golem.com.payment.platform.erc20-amoy-tglm.address"
            assert {"key": key, "value": "0xab"} in decorations["properties"]
            assert f"(|({key}=*))" in decorations["constraints"]
        assert (await client.request("GET", f"{PAYMENT}/demandDecorations", allocationIds="none"))[0] == 400
        assert (await client.request("GET", f"{PAYMENT}/demandDecorations"))[0] == 400
        accounts = await client.request_ok("GET", f"{PAYMENT}/requestorAccounts")
        assert {"erc20-amoy-tglm", PLATFORM} <= {each["platform"] for each in accounts}


async def test_an_invoice_is_the_exact_price_of_the_usage_and_is_paid_once(requestor: RequestorRunner) -> None:
    async with requestor(single_provider()) as client:
        agreement_id = await client.complete_agreement(await client.subscribe())
        invoice = await client.invoice()
        assert invoice is not None
        agreement = client.devnet.market.agreements[agreement_id]
        plan = client.devnet.scenario.providers[0]
        (usage,) = agreement.usage.values()
        assert Decimal(invoice["amount"]) == activity_amount(plan, usage) > plan.start_price
        assert (invoice["status"], invoice["agreementId"]) == ("RECEIVED", agreement_id)
        for _ in range(2):
            assert await client.accept("invoices", invoice["invoiceId"], invoice["amount"]) == (200, None)
        assert await client.remaining() == 1 - Decimal(invoice["amount"])
        (listed,) = await client.request_ok("GET", f"{PAYMENT}/invoices")
        assert listed["status"] == "ACCEPTED"
        assert paid(client.devnet) == {agreement_id: Decimal(invoice["amount"])}
        await client.request_ok("DELETE", f"{PAYMENT}/allocations/{client.allocation_id}")
        assert client.devnet.payment.wallet.free_funds == 1000 - Decimal(invoice["amount"])


async def test_an_invoice_is_accepted_only_with_its_amount_and_enough_funds(requestor: RequestorRunner) -> None:
    async with requestor(single_provider()) as client:
        await client.allocate("0.0005")
        await client.complete_agreement(await client.subscribe())
        invoice = await client.invoice()
        assert invoice is not None
        invoice_id, amount = invoice["invoiceId"], invoice["amount"]
        assert (await client.accept("invoices", "none", amount))[0] == 404
        assert (await client.accept("invoices", invoice_id, "0.0001"))[0] == 400
        status, answer = await client.accept("invoices", invoice_id, amount)
        assert (status, answer["message"].startswith("Not enough funds.")) == (400, True)
        assert await client.remaining() == Decimal("0.0005")
        await client.allocate("1")
        assert (await client.accept("invoices", invoice_id, amount))[0] == 200
        body = {"totalAmount": "1", "paymentPlatform": "erc20-amoy-tglm"}
        other = await client.request_ok("POST", f"{PAYMENT}/allocations", body)
        client.allocation_id = other["allocationId"]
        await client.complete_agreement(
            await client.subscribe(**{f"golem.com.payment.platform.{PLATFORM}.address": "0xab"})
        )
        second = await client.invoice(client.devnet.payment.invoice_events[0]["eventDate"])
        assert second is not None
        status, answer = await client.accept("invoices", second["invoiceId"], second["amount"])
        assert (status, "another address" in answer["message"]) == (400, True)


async def test_a_rejected_invoice_can_be_accepted_and_an_accepted_one_not_rejected(requestor: RequestorRunner) -> None:
    async with requestor(single_provider()) as client:
        agreement_id = await client.complete_agreement(await client.subscribe())
        invoice = await client.invoice()
        assert invoice is not None
        assert (await client.reject("invoices", "none"))[0] == 404
        assert (await client.reject("invoices", invoice["invoiceId"], "TOO_MUCH"))[0] == 400
        assert await client.reject("invoices", invoice["invoiceId"]) == (200, None)
        (listed,) = await client.request_ok("GET", f"{PAYMENT}/invoices")
        assert (listed["status"], paid(client.devnet)) == ("REJECTED", {})
        assert (await client.accept("invoices", invoice["invoiceId"], invoice["amount"]))[0] == 200
        assert (await client.reject("invoices", invoice["invoiceId"]))[0] == 400
        assert list(paid(client.devnet)) == [agreement_id]


async def test_events_have_strictly_increasing_times(requestor: RequestorRunner) -> None:
    async with requestor(single_provider()) as client:
        demand_id = await client.subscribe()
        waiting = asyncio.create_task(client.request_ok("GET", f"{PAYMENT}/invoiceEvents", timeout=30))
        for _ in range(3):
            await client.complete_agreement(demand_id)
        assert len(await waiting) == 1
        path = f"{PAYMENT}/invoiceEvents"
        await until(lambda: len(client.devnet.payment.invoices) == 3)
        events = await client.request_ok("GET", path, timeout=0, maxEvents=100)
        dates = [event["eventDate"] for event in events]
        assert dates == sorted(set(dates)) and len(dates) == 3
        assert await client.request_ok("GET", path, timeout=0, afterTimestamp=dates[0], maxEvents=1) == events[1:2]
        assert await client.request_ok("GET", path, timeout=0.05, afterTimestamp=dates[2]) == []
        assert (await client.request("GET", path, afterTimestamp="yesterday"))[0] == 400
        assert len(await client.request_ok("GET", f"{PAYMENT}/invoices", maxItems=2)) == 2


async def notes_of_an_activity(client: Requestor, count: int) -> list[dict[str, object]]:
    agreement_id = await client.agree(await client.subscribe())
    activity_id = await client.activity(agreement_id)
    await client.execute(activity_id)
    await until(lambda: len(client.devnet.payment.debit_notes) >= count)
    await client.destroy(activity_id)
    await client.terminate(agreement_id)
    return list(await client.request_ok("GET", f"{PAYMENT}/debitNotes"))


async def test_debit_notes_grow_and_count_towards_the_invoice(requestor: RequestorRunner) -> None:
    async with requestor(single_provider(debit_note_seconds=0.05)) as client:
        notes = await notes_of_an_activity(client, 3)
        amounts = [Decimal(str(note["totalAmountDue"])) for note in notes]
        assert amounts == sorted(amounts) and len(amounts) >= 4
        assert notes[1]["previousDebitNoteId"] == notes[0]["debitNoteId"]
        assert all("paymentDueDate" not in note and len(note["usageCounterVector"]) == 2 for note in notes)
        invoice = await client.invoice()
        assert invoice is not None and Decimal(invoice["amount"]) == amounts[-1]
        for note in (notes[2], notes[0]):
            answer = await client.accept("debitNotes", str(note["debitNoteId"]), str(note["totalAmountDue"]))
            assert answer == (200, None)
        assert await client.remaining() == 1 - amounts[2]
        await client.accept("invoices", invoice["invoiceId"], invoice["amount"])
        assert await client.remaining() == 1 - amounts[-1]
        assert list(paid(client.devnet).values()) == [amounts[-1]]
        assert (await client.request("GET", f"{PAYMENT}/debitNotes/none"))[0] == 404


async def test_payable_debit_notes_are_paid_at_once_and_only_once(requestor: RequestorRunner) -> None:
    faults = (Fault(kind="payable-debit-note"), Fault(kind="frequent-debit-notes", seconds=0.05))
    async with requestor(single_provider(*faults)) as client:
        notes = await notes_of_an_activity(client, 2)
        assert all("paymentDueDate" in note for note in notes)
        for note in notes[:2]:
            await client.accept("debitNotes", str(note["debitNoteId"]), str(note["totalAmountDue"]))
            assert list(paid(client.devnet).values()) == [Decimal(str(note["totalAmountDue"]))]
        invoice = await client.invoice()
        assert invoice is not None
        await client.accept("invoices", invoice["invoiceId"], invoice["amount"])
        assert list(paid(client.devnet).values()) == [Decimal(invoice["amount"])]
        assert await client.remaining() == 1 - Decimal(invoice["amount"])


async def test_a_provider_overbills(requestor: RequestorRunner) -> None:
    async with requestor(single_provider(Fault(kind="overbill", factor=3))) as client:
        agreement_id = await client.complete_agreement(await client.subscribe())
        invoice = await client.invoice()
        assert invoice is not None
        (usage,) = client.devnet.market.agreements[agreement_id].usage.values()
        plan = client.devnet.scenario.providers[0]
        assert Decimal(invoice["amount"]) == activity_amount(plan, usage, 3)


async def test_a_provider_bills_late_or_never(requestor: RequestorRunner) -> None:
    faults = (Fault(kind="never-bill", times=1), Fault(kind="late-bill", seconds=0.2))
    async with requestor(single_provider(*faults)) as client:
        demand_id = await client.subscribe()
        await client.complete_agreement(demand_id)
        second = await client.complete_agreement(demand_id)
        assert await client.invoice(seconds=0) is None
        invoice = await client.invoice()
        assert invoice is not None and invoice["agreementId"] == second


@pytest.mark.parametrize("is_accepted", [False, True])
async def test_an_agreement_ends_if_a_debit_note_is_not_accepted_in_time(
    is_accepted: bool, requestor: RequestorRunner
) -> None:
    plan = single_provider(debit_note_seconds=0.1, debit_note_accept_seconds=1.5 * slowness())
    async with requestor(plan) as client:
        agreement_id = await client.agree(await client.subscribe())
        activity_id = await client.activity(agreement_id)
        agreement, notes = client.devnet.market.agreements[agreement_id], client.devnet.payment.debit_notes
        accepted: set[str] = set()

        async def accept_all() -> bool:
            for note in list(notes.values()):
                if is_accepted and note.bill_id not in accepted:
                    accepted.add(note.bill_id)
                    await client.accept("debitNotes", note.bill_id, format_amount(note.amount))
            return agreement.state == "Terminated"

        deadline = time.monotonic() + (4 * plan.debit_note_accept_seconds if is_accepted else 120)
        while not await accept_all() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

        if is_accepted:
            assert agreement.state == "Approved" and len(accepted) > 3
        else:
            assert agreement.reason == {"message": "A debit note was not accepted in time."}
            await until(lambda: client.devnet.activities.reason(activity_id))
