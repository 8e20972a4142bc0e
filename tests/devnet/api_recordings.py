"""Recordings of all calls of three requestors: the executor, the unmodified yapapi, and one that makes every call.

For `test_published_api.py`, which checks their requests and responses.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import aiohttp

from batcher.executors.golem.yapapi_adapter import OWNER
from devnet.api.application import IMAGE_PATH, ApiCall
from devnet.daemon import Devnet
from devnet.scenario import Fault, default_scenario
from store.rentals.ledger import AllocationRecord
from tests.devnet.requestor import (
    ACTIVITY,
    BOOT_COMMANDS,
    MARKET,
    PAYMENT,
    Requestor,
    in_hours,
    run_command,
    single_provider,
)
from tests.devnet.running import run_devnet
from tests.golem import GolemHarness, devnet_and_store, make_executor, provider, scenario
from tests.timing import DEADLINE_SECONDS


class Recordings:
    """The recorded calls of each requestor."""

    def __init__(self) -> None:
        self.executor: list[ApiCall] = []
        self.yapapi: list[ApiCall] = []
        self.every_call: list[ApiCall] = []
        #: "METHOD /path" of every route of the devnet, with {} for parameters.
        self.routes: set[str] = set()

    @property
    def calls(self) -> list[ApiCall]:
        return [*self.executor, *self.yapapi, *self.every_call]


async def record_executor(recordings: Recordings, folder: Path, models: Path) -> None:
    """Record the executor from start to end, and its recovery of a killed batcher's agreement."""
    folder.mkdir()
    plan = scenario(
        provider("alpha", Fault(kind="reject", times=1), debit_note_seconds=0.3),
        provider("beta", start="0.002", debit_note_seconds=0.3),
        # Too expensive: its proposal is rejected.
        provider("gamma", start="5"),
    )
    async with devnet_and_store(plan, folder, models) as (devnet, store), aiohttp.ClientSession() as session:
        _record_full_bodies(devnet)
        first = make_executor(devnet, store, folder, models)
        harness = GolemHarness(devnet, first, store, folder / "jobs", models)
        await first.start()
        outcomes = await harness.run("one", "two", "three", "four")
        await first.close()
        assert [outcome.error for outcome in outcomes] == [None] * 4

        # What a killed batcher leaves open.
        tag = (folder / "work" / "golem-home").read_text().strip()
        dead_requestor = Requestor(devnet, session)
        allocation = await dead_requestor.allocate("0.1")
        store.ledger.record_allocation(
            AllocationRecord(
                id=dead_requestor.allocation_id,
                batcher_id="bbbb2222",
                platform=allocation["paymentPlatform"],
                address=allocation["address"],
                amount=Decimal("0.1"),
                created_at=datetime.now(UTC),
            )
        )
        demand_id = await dead_requestor.subscribe(**{OWNER: f"{tag}.bbbb2222-1"})
        proposal, *_ = await dead_requestor.proposals(demand_id)
        await dead_requestor.counter(demand_id, proposal["proposalId"])
        while proposal["state"] != "Draft":
            proposal = (await dead_requestor.proposals(demand_id))[-1]
        agreement_id = await dead_requestor.propose_agreement(proposal)
        await dead_requestor.request_ok("POST", f"{MARKET}/agreements/{agreement_id}/wait", timeout=DEADLINE_SECONDS)
        second = make_executor(devnet, store, folder, models, name="cccc3333")
        await second.start()
        await second.close()
        assert devnet.market.list_open_demands() == devnet.payment.wallet.list_active() == []
        assert "Approved" not in {each.state for each in devnet.market.agreements.values()}
        recordings.executor.extend(devnet.journal.calls)


async def record_yapapi(recordings: Recordings, folder: Path) -> None:
    """Record the unmodified yapapi, which runs tasks."""
    folder.mkdir()
    async with run_devnet(folder, default_scenario(3)) as devnet:
        _record_full_bodies(devnet)
        program = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "ignore", str(Path(__file__).with_name("yapapi_tasks.py")), str(folder)),
            env={**os.environ, **devnet.variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, errors = await program.communicate()
        assert program.returncode == 0, errors.decode()
        assert len(json.loads(out)["answers"]) == 6
        recordings.yapapi.extend(devnet.journal.calls)


async def record_every_call(recordings: Recordings, folder: Path) -> None:
    """Record a requestor that makes every call of the devnet, and some that fail."""
    async with run_devnet(folder, single_provider()) as devnet, aiohttp.ClientSession() as session:
        client = Requestor(devnet, session)
        _record_full_bodies(devnet)
        recordings.routes = _routes(client.devnet)
        await client.request_ok("GET", "/me")
        await client.request("GET", "/me", key="wrong")
        await client.request_ok("GET", "/version/get")
        await _call_market(client)
        demand_id = await client.subscribe()
        agreement_id = await client.agree(demand_id)
        await _call_activity(client, agreement_id)
        await client.terminate(agreement_id)
        await client.request_ok("GET", f"{MARKET}/agreements", state="Terminated")
        assert (await client.request("POST", f"{MARKET}/agreements/{agreement_id}/confirm"))[0] == 410
        await _call_payment(client)
        recordings.every_call.extend(client.devnet.journal.calls)


async def _call_market(client: Requestor) -> None:
    demand_id = await client.subscribe()
    await client.request_ok("GET", f"{MARKET}/demands")
    (initial,) = await client.proposals(demand_id)
    path = f"{MARKET}/demands/{demand_id}/proposals/{initial['proposalId']}"
    early = {"proposalId": initial["proposalId"], "validTo": in_hours(1)}
    assert (await client.request("POST", f"{MARKET}/agreements", early))[0] == 409
    await client.counter(demand_id, initial["proposalId"])
    (draft,) = await client.proposals(demand_id)
    agreement_id = await client.request_ok(
        "POST", f"{MARKET}/agreements", {"proposalId": draft["proposalId"], "validTo": in_hours(1)}
    )
    await client.request_ok("GET", f"{MARKET}/agreements/{agreement_id}")
    await client.request_ok("GET", f"{MARKET}/agreements")
    assert (await client.request("POST", f"{MARKET}/agreements/{agreement_id}/wait", timeout=0))[0] == 409
    await client.request_ok("POST", f"{MARKET}/agreements/{agreement_id}/cancel", {"message": "A test."})
    await client.request_ok("POST", f"{path}/reject", {"message": "A test."})
    assert (await client.request("POST", f"{path}/reject"))[0] == 410
    await client.request_ok("DELETE", f"{MARKET}/demands/{demand_id}")
    assert (await client.request("GET", f"{MARKET}/demands/{demand_id}/events", timeout=0))[0] == 404


async def _call_activity(client: Requestor, agreement_id: str) -> None:
    created = await client.request_ok("POST", f"{ACTIVITY}/activity", {"agreementId": agreement_id})
    activity_id = created["activityId"]
    path = f"{ACTIVITY}/activity/{activity_id}"
    await client.results(activity_id, await client.execute(activity_id, *BOOT_COMMANDS))
    await client.request_ok("GET", f"{path}/state")
    command_batch = run_command("/bin/sh", "-c", "echo out; echo err >&2")
    await client.results(activity_id, await client.execute(activity_id, command_batch))
    await client.request_ok("GET", f"{path}/usage")
    await client.destroy(activity_id)
    await client.request_ok("GET", f"{path}/state")
    assert (await client.request("POST", f"{path}/exec", {"text": "[]"}))[0] >= 400


async def _call_payment(client: Requestor) -> None:
    allocation = f"{PAYMENT}/allocations/{client.allocation_id}"
    await client.request_ok("GET", f"{PAYMENT}/requestorAccounts")
    await client.request_ok("GET", f"{PAYMENT}/allocations")
    since = in_hours(-1)
    for kind, event, key, amount in (
        ("debitNotes", "debitNoteEvents", "debitNoteId", "totalAmountDue"),
        ("invoices", "invoiceEvents", "invoiceId", "amount"),
    ):
        # After the end of the agreement there is one of each.
        first, *_ = await client.request_ok("GET", f"{PAYMENT}/{event}", timeout=DEADLINE_SECONDS, afterTimestamp=since)
        await client.request_ok("GET", f"{PAYMENT}/{kind}", afterTimestamp=since, maxItems=5)
        bill = await client.request_ok("GET", f"{PAYMENT}/{kind}/{first[key]}")
        assert (await client.reject(kind, first[key]))[0] == 200
        assert (await client.accept(kind, first[key], bill[amount]))[0] == 200
        assert (await client.accept(kind, "none", bill[amount]))[0] == 404
    await client.request_ok("GET", allocation)
    await client.request_ok("DELETE", allocation)
    assert (await client.request("DELETE", allocation))[0] == 410


def _record_full_bodies(devnet: Devnet) -> None:
    devnet.journal.max_body_bytes = 1_000_000


def _routes(devnet: Devnet) -> set[str]:
    assert devnet._runner is not None and devnet._runner.app is not None
    return {
        f"{route.method} {without_parameter_names(route.resource.canonical)}"
        for route in devnet._runner.app.router.routes()
        if route.method != "HEAD" and route.resource is not None and route.resource.canonical != IMAGE_PATH
    }


def without_parameter_names(path: str) -> str:
    """Replace the parameters of a path by {}."""
    return re.sub(r"\{\w+\}", "{}", path)
