"""Three requestors of which every call is kept: the executor, the unmodified yapapi, and a walk through all calls.

For `test_published_api.py`, which looks through what they said and heard.
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
from devnet.devnet import Devnet, running
from devnet.journal import Call
from devnet.scenario import Fault, default_scenario
from store.ledger_records import AllocationRecord
from tests.devnet.requestor import ACTIVITY, BOOT, MARKET, PAYMENT, Requestor, alone, in_hours, requestor, run_command
from tests.golem import GolemBench, make_executor, provider, scenario, world


class Record:
    """The calls of each requestor."""

    def __init__(self) -> None:
        self.executor: list[Call] = []
        self.yapapi: list[Call] = []
        self.walk: list[Call] = []
        #: "METHOD /path" of every route of the devnet, with braces for what is not fixed.
        self.routes: set[str] = set()

    @property
    def calls(self) -> list[Call]:
        return [*self.executor, *self.yapapi, *self.walk]


async def executor(record: Record, folder: Path, models: Path) -> None:
    """Live a whole life, and clean up after somebody else's."""
    folder.mkdir()
    plan = scenario(
        provider("alpha", Fault(kind="reject", times=1), debit_note_seconds=0.3),
        provider("beta", start="0.002", debit_note_seconds=0.3),
        # Too dear: refused when it offers itself.
        provider("gamma", start="5"),
    )
    async with world(plan, folder, models) as (devnet, store), aiohttp.ClientSession() as session:
        _keep_all(devnet)
        first = make_executor(devnet, store, folder, models)
        bench = GolemBench(devnet, first, store, folder / "jobs", models)
        await first.start()
        outcomes = await bench.run("one", "two", "three", "four")
        await first.close()
        assert [outcome.error for outcome in outcomes] == [None] * 4

        # What a batcher that was killed leaves open.
        tag = (folder / "work" / "golem-home").read_text().strip()
        ghost = Requestor(devnet, session)
        promised = await ghost.allocate("0.1")
        store.note_allocation(
            AllocationRecord(
                id=ghost.allocation_id,
                batcher_id="bbbb2222",
                platform=promised["paymentPlatform"],
                address=promised["address"],
                amount=Decimal("0.1"),
                created_at=datetime.now(UTC),
            )
        )
        demand_id = await ghost.subscribe(**{OWNER: f"{tag}.bbbb2222-1"})
        proposal, *_ = await ghost.proposals(demand_id)
        await ghost.counter(demand_id, proposal["proposalId"])
        while proposal["state"] != "Draft":
            proposal = (await ghost.proposals(demand_id))[-1]
        agreement_id = await ghost.propose_agreement(proposal)
        await ghost.must("POST", f"{MARKET}/agreements/{agreement_id}/wait", timeout=5)
        second = make_executor(devnet, store, folder, models, name="cccc3333")
        await second.start()
        await second.close()
        assert devnet.market.open_demands() == devnet.payment.wallet.live() == []
        assert "Approved" not in {each.state for each in devnet.market.agreements.values()}
        record.executor.extend(devnet.journal)


async def yapapi(record: Record, folder: Path) -> None:
    """Have the unmodified yapapi do its tasks, and hear of them in a stream."""
    folder.mkdir()
    async with running(default_scenario(3), folder=folder / "net") as devnet:
        _keep_all(devnet)
        program = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "ignore", str(Path(__file__).with_name("yapapi_tasks.py")), str(folder), "stream"),
            env={**os.environ, **devnet.variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, errors = await program.communicate()
        assert program.returncode == 0, errors.decode()
        assert len(json.loads(out)["answers"]) == 6
        record.yapapi.extend(devnet.journal)


async def walk(record: Record, folder: Path) -> None:
    """Make every call that the devnet knows, also those that nobody needs, and some in vain."""
    async with requestor(alone(), folder) as asker:
        _keep_all(asker.devnet)
        record.routes = _routes(asker.devnet)
        await asker.must("GET", "/me")
        await asker.ask("GET", "/me", key="wrong")
        await asker.must("GET", "/version/get")
        await _walk_through_market(asker)
        demand_id = await asker.subscribe()
        agreement_id = await asker.agree(demand_id)
        await _walk_through_activity(asker, agreement_id)
        await asker.terminate(agreement_id)
        await asker.must("POST", f"{MARKET}/agreements/{agreement_id}/terminate/reason")
        await asker.must("GET", f"{MARKET}/agreements", state="Terminated", afterDate=in_hours(-1))
        await asker.must("GET", f"{MARKET}/agreementEvents", timeout=0, maxEvents=100, afterTimestamp=in_hours(-1))
        assert (await asker.ask("POST", f"{MARKET}/agreements/{agreement_id}/confirm"))[0] == 410
        await _walk_through_payment(asker)
        record.walk.extend(asker.devnet.journal)


async def _walk_through_market(asker: Requestor) -> None:
    demand_id = await asker.subscribe()
    await asker.must("GET", f"{MARKET}/demands")
    (initial,) = await asker.proposals(demand_id)
    path = f"{MARKET}/demands/{demand_id}/proposals/{initial['proposalId']}"
    await asker.must("GET", path)
    early = {"proposalId": initial["proposalId"], "validTo": in_hours(1)}
    assert (await asker.ask("POST", f"{MARKET}/agreements", early))[0] == 409
    await asker.counter(demand_id, initial["proposalId"])
    (draft,) = await asker.proposals(demand_id)
    agreement_id = await asker.must(
        "POST", f"{MARKET}/agreements", {"proposalId": draft["proposalId"], "validTo": in_hours(1)}
    )
    await asker.must("GET", f"{MARKET}/agreements/{agreement_id}")
    await asker.must("GET", f"{MARKET}/agreements")
    assert (await asker.ask("POST", f"{MARKET}/agreements/{agreement_id}/wait", timeout=0))[0] == 409
    await asker.must("POST", f"{MARKET}/agreements/{agreement_id}/cancel", {"message": "It was a try."})
    await asker.must("POST", f"{path}/reject", {"message": "It was a try."})
    assert (await asker.ask("POST", f"{path}/reject"))[0] == 410
    await asker.must("DELETE", f"{MARKET}/demands/{demand_id}")
    assert (await asker.ask("GET", f"{MARKET}/demands/{demand_id}/events", timeout=0))[0] == 404


async def _walk_through_activity(asker: Requestor, agreement_id: str) -> None:
    created = await asker.must("POST", f"{ACTIVITY}/activity", {"agreementId": agreement_id})
    activity_id = created["activityId"]
    path = f"{ACTIVITY}/activity/{activity_id}"
    await asker.must("GET", f"{path}/agreement")
    await asker.results(activity_id, await asker.execute(activity_id, *BOOT))
    await asker.must("GET", f"{path}/state")
    said = await asker.execute(activity_id, run_command("/bin/sh", "-c", "echo said; echo warned >&2"))
    await asker.results(activity_id, said)
    streams = {"stdout": {"stream": {}}, "stderr": {"stream": {}}}
    command = {"entry_point": "/bin/sh", "args": ["-c", "echo said; echo warned >&2; exit 1"], "capture": streams}
    batch_id = await asker.execute(activity_id, {"run": command})
    await asker.stream(activity_id, batch_id)
    await asker.results(activity_id, batch_id)
    await asker.must("GET", f"{path}/usage")
    await asker.destroy(activity_id)
    await asker.must("GET", f"{path}/state")
    assert (await asker.ask("POST", f"{path}/exec", {"text": "[]"}))[0] >= 400


async def _walk_through_payment(asker: Requestor) -> None:
    allocation = f"{PAYMENT}/allocations/{asker.allocation_id}"
    await asker.must("GET", f"{PAYMENT}/requestorAccounts")
    await asker.must("GET", f"{PAYMENT}/allocations")
    await asker.must("PUT", allocation, {"totalAmount": "1.5"})
    refusal = {"rejectionReason": "BAD_SERVICE", "totalAmountAccepted": "0", "message": "It was a try."}
    since = in_hours(-1)
    for kind, event, key, amount in (
        ("debitNotes", "debitNoteEvents", "debitNoteId", "totalAmountDue"),
        ("invoices", "invoiceEvents", "invoiceId", "amount"),
    ):
        # Asked for after the agreement's end, there is one of each.
        first, *_ = await asker.must("GET", f"{PAYMENT}/{event}", timeout=5, afterTimestamp=since)
        await asker.must("GET", f"{PAYMENT}/{kind}", afterTimestamp=since, maxItems=5)
        bill = await asker.must("GET", f"{PAYMENT}/{kind}/{first[key]}")
        await asker.must("POST", f"{PAYMENT}/{kind}/{first[key]}/reject", refusal, timeout=1)
        assert (await asker.accept(kind, first[key], bill[amount]))[0] == 200
        assert (await asker.accept(kind, "none", bill[amount]))[0] == 404
    (paid,) = await asker.must("GET", f"{PAYMENT}/payments", timeout=5, afterTimestamp=since)
    await asker.must("GET", f"{PAYMENT}/payments/{paid['paymentId']}")
    await asker.must("GET", f"{PAYMENT}/payments/status", driver="erc20", network="holesky")
    await asker.must("GET", allocation)
    await asker.must("DELETE", allocation)
    assert (await asker.ask("DELETE", allocation))[0] == 410


def _keep_all(devnet: Devnet) -> None:
    devnet.journal.most_text = 1_000_000


def _routes(devnet: Devnet) -> set[str]:
    assert devnet._runner is not None and devnet._runner.app is not None
    return {
        f"{route.method} {bare(route.resource.canonical)}"
        for route in devnet._runner.app.router.routes()
        if route.method != "HEAD" and route.resource is not None
    }


def bare(path: str) -> str:
    """Leave out the names of a path's parameters."""
    return re.sub(r"\{\w+\}", "{}", path)
