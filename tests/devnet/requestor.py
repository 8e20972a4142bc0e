"""A requestor for tests: makes the calls that yapapi makes, with plain HTTP."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import aiohttp

from devnet.daemon import Devnet
from devnet.scenario import Fault, ProviderPlan, Scenario
from tests.timing import DEADLINE_SECONDS

PLATFORM = "erc20-holesky-tglm"
MARKET, PAYMENT, ACTIVITY = "/market-api/v1", "/payment-api/v1", "/activity-api/v1"
BOOT_COMMANDS = [{"deploy": {}}, {"start": {"args": []}}]


def in_hours(hours: float) -> str:
    return (datetime.now(UTC) + timedelta(hours=hours)).isoformat()


def single_provider(*faults: Fault, daemon: tuple[Fault, ...] = (), **fields: Any) -> Scenario:
    """Make a scenario of one provider with faults. Other fields belong to the provider or the scenario."""
    names = {each.name for each in dataclasses.fields(Scenario)}
    scenario_fields = {key: fields.pop(key) for key in sorted(names & fields.keys())}
    return Scenario(providers=(ProviderPlan(name="alpha", faults=faults, **fields),), faults=daemon, **scenario_fields)


def run_command(*words: str) -> dict[str, Any]:
    return {"run": {"entry_point": words[0], "args": list(words[1:])}}


class Requestor:
    """Calls a devnet."""

    def __init__(self, devnet: Devnet, session: aiohttp.ClientSession) -> None:
        self.devnet = devnet
        self.allocation_id = ""
        self._session = session

    async def request(
        self, method: str, path: str, body: Any = None, *, key: str | None = None, accept: str = "*/*", **query: Any
    ) -> tuple[int, Any]:
        """Make a call. :return: the status, and the body parsed as JSON."""
        headers = {"Authorization": f"Bearer {self.devnet.app_key if key is None else key}", "Accept": accept}
        url, parameters = self.devnet.url + path, {name: str(value) for name, value in query.items()}
        data = None if body is None else json.dumps(body)
        async with self._session.request(method, url, params=parameters, data=data, headers=headers) as response:
            text = await response.text()
            return response.status, json.loads(text) if text else None

    async def request_ok(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        """Make a call that must succeed. :return: the body parsed as JSON."""
        status, answer = await self.request(method, path, body, **query)
        assert 200 <= status < 300, (method, path, status, answer)
        return answer

    async def allocate(self, amount: str = "1") -> dict[str, Any]:
        allocation = await self.request_ok(
            "POST", f"{PAYMENT}/allocations", {"totalAmount": amount, "makeDeposit": False}
        )
        self.allocation_id = allocation["allocationId"]
        return dict(allocation)

    async def subscribe(self, constraints: str = "(golem.runtime.name=mlg)", **extra_properties: Any) -> str:
        """Open a demand with the decorations of the allocation."""
        if not self.allocation_id:
            await self.allocate()
        decorations = await self.request_ok("GET", f"{PAYMENT}/demandDecorations", allocationIds=self.allocation_id)
        properties = {
            "golem.srv.comp.expiration": int((time.time() + 3600) * 1000),
            "golem.srv.caps.multi-activity": True,
            "golem.node.debug.subnet": "devnet",
            **{each["key"]: each["value"] for each in decorations["properties"]},
            **extra_properties,
        }
        whole = f"(&(golem.node.debug.subnet=devnet)\n\t{''.join(decorations['constraints'])}\n\t{constraints})"
        body = {"properties": properties, "constraints": whole}
        return str(await self.request_ok("POST", f"{MARKET}/demands", body))

    async def proposals(self, demand_id: str, seconds: float = 60, **query: Any) -> list[dict[str, Any]]:
        path = f"{MARKET}/demands/{demand_id}/events"
        return [event["proposal"] for event in await self.request_ok("GET", path, timeout=seconds, **query)]

    async def counter(self, demand_id: str, proposal_id: str) -> str:
        demand = self.devnet.market.demands[demand_id]
        properties = {**demand.properties, "golem.com.payment.chosen-platform": PLATFORM}
        path = f"{MARKET}/demands/{demand_id}/proposals/{proposal_id}"
        return str(await self.request_ok("POST", path, {"properties": properties, "constraints": demand.constraints}))

    async def draft(self, demand_id: str) -> dict[str, Any]:
        """Negotiate until a provider sends a draft."""
        (initial,) = await self.proposals(demand_id)
        await self.counter(demand_id, initial["proposalId"])
        (draft,) = await self.proposals(demand_id)
        return draft

    async def propose_agreement(self, draft: dict[str, Any], hours: float = 1) -> str:
        body = {"proposalId": draft["proposalId"], "validTo": in_hours(hours)}
        agreement_id = str(await self.request_ok("POST", f"{MARKET}/agreements", body))
        await self.request_ok("POST", f"{MARKET}/agreements/{agreement_id}/confirm")
        return agreement_id

    async def agree(self, demand_id: str) -> str:
        """Negotiate until there is an approved agreement."""
        agreement_id = await self.propose_agreement(await self.draft(demand_id))
        await self.request_ok("POST", f"{MARKET}/agreements/{agreement_id}/wait", timeout=DEADLINE_SECONDS)
        return agreement_id

    async def activity(self, agreement_id: str) -> str:
        return str(await self.request_ok("POST", f"{ACTIVITY}/activity", agreement_id))

    async def execute(self, activity_id: str, *commands: dict[str, Any]) -> str:
        path = f"{ACTIVITY}/activity/{activity_id}/exec"
        return str(await self.request_ok("POST", path, {"text": json.dumps(commands or BOOT_COMMANDS)}))

    async def results(self, activity_id: str, batch_id: str) -> list[dict[str, Any]]:
        path = f"{ACTIVITY}/activity/{activity_id}/exec/{batch_id}"
        return list(await self.request_ok("GET", path, timeout=DEADLINE_SECONDS))

    async def destroy(self, activity_id: str) -> None:
        await self.request_ok("DELETE", f"{ACTIVITY}/activity/{activity_id}")

    async def terminate(self, agreement_id: str) -> None:
        await self.request_ok("POST", f"{MARKET}/agreements/{agreement_id}/terminate", {"message": "done"})

    async def complete_agreement(self, demand_id: str) -> str:
        """Make an agreement with one activity, and end both. :return: the agreement's id."""
        agreement_id = await self.agree(demand_id)
        activity_id = await self.activity(agreement_id)
        await self.results(activity_id, await self.execute(activity_id))
        await self.destroy(activity_id)
        await self.terminate(agreement_id)
        return agreement_id

    async def invoice(self, after: str | None = None, seconds: float = 60) -> dict[str, Any] | None:
        """Return the next invoice; None if there is none in time."""
        query = {"timeout": seconds} if after is None else {"timeout": seconds, "afterTimestamp": after}
        events = await self.request_ok("GET", f"{PAYMENT}/invoiceEvents", **query)
        return dict(await self.request_ok("GET", f"{PAYMENT}/invoices/{events[0]['invoiceId']}")) if events else None

    async def accept(self, kind: str, bill_id: str, amount: str) -> tuple[int, Any]:
        body = {"totalAmountAccepted": amount, "allocationId": self.allocation_id}
        return await self.request("POST", f"{PAYMENT}/{kind}/{bill_id}/accept", body)

    async def reject(self, kind: str, bill_id: str, reason: str = "INCORRECT_AMOUNT") -> tuple[int, Any]:
        body = {"rejectionReason": reason, "totalAmountAccepted": "0", "message": "A test."}
        return await self.request("POST", f"{PAYMENT}/{kind}/{bill_id}/reject", body)

    async def remaining(self) -> Decimal:
        return Decimal((await self.request_ok("GET", f"{PAYMENT}/allocations/{self.allocation_id}"))["remainingAmount"])


RequestorRunner = Callable[..., AbstractAsyncContextManager[Requestor]]
