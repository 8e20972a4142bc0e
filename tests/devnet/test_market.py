"""The market over HTTP: demands, negotiation and agreements, valid and invalid steps."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from devnet.scenario import Fault, ProviderPlan, Scenario
from tests.devnet.requestor import ACTIVITY, MARKET, Requestor, RequestorRunner, in_hours, single_provider
from tests.timing import DEADLINE_SECONDS, until

TWO = Scenario(providers=(ProviderPlan(name="alpha"), ProviderPlan(name="beta", cores=4, runtimes=("mlg",))))


async def test_a_call_without_the_app_key_is_rejected(requestor: RequestorRunner) -> None:
    async with requestor(single_provider()) as client:
        for key in ("", "wrong", client.devnet.app_key + "x"):
            status, answer = await client.request("GET", "/me", key=key)
            assert (status, "app key" in answer["message"]) == (401, True)
        assert (await client.request("GET", "/nothing", key=""))[0] == 401
        assert (await client.request("GET", "/me", key="", authToken=client.devnet.app_key))[0] == 200
        identity = await client.request_ok("GET", "/me")
        assert identity["identity"].startswith("0x") and identity["role"] == "manager"
        assert (await client.request_ok("GET", "/version/get"))["current"]["version"]
        status, answer = await client.request("GET", "/market-api/v1/nothing")
        assert (status, "nothing" in answer["message"]) == (404, True)
        assert (await client.request("PUT", "/me"))[0] == 405


async def test_only_matching_offers_are_proposed(requestor: RequestorRunner) -> None:
    async with requestor(TWO) as client:
        every = await client.proposals(await client.subscribe("(golem.runtime.name=*)"))
        assert sorted(each["properties"]["golem.runtime.name"] for each in every) == ["mlg", "mlg", "vm"]
        assert all(type(each) is float for each in every[0]["properties"]["golem.com.pricing.model.linear.coeffs"])
        big = await client.proposals(await client.subscribe("(golem.inf.cpu.cores>=2)"))
        assert [each["properties"]["golem.node.id.name"] for each in big] == ["beta"]
        elsewhere = await client.subscribe(**{"golem.node.debug.subnet": "public"})
        assert await client.proposals(elsewhere, 0) == []
        open_ids = {each["demandId"] for each in await client.request_ok("GET", f"{MARKET}/demands")}
        assert elsewhere in open_ids and len(open_ids) == 3


async def test_events_are_returned_once_and_a_poll_waits_for_them(requestor: RequestorRunner) -> None:
    async with requestor(TWO) as client:
        demand_id = await client.subscribe("(golem.runtime.name=*)")
        assert len(await client.proposals(demand_id, maxEvents=2)) == 2
        (third,) = await client.proposals(demand_id)
        waiting = asyncio.create_task(client.proposals(demand_id, 30))
        await client.counter(demand_id, third["proposalId"])
        (draft,) = await waiting
        assert (draft["state"], draft["issuerId"]) == ("Draft", third["issuerId"])


async def test_a_demand_is_closed_only_once(requestor: RequestorRunner) -> None:
    async with requestor(single_provider()) as client:
        demand_id = await client.subscribe("(golem.runtime.name=absent)")
        path = f"{MARKET}/demands/{demand_id}"
        waiting = asyncio.create_task(client.request("GET", f"{path}/events", timeout=30))
        await until(lambda: client.devnet.market.demands[demand_id].is_open)
        await client.request_ok("DELETE", path)
        assert (await waiting)[0] == 404
        assert (await client.request("DELETE", path))[0] == 410
        assert (await client.request("DELETE", f"{MARKET}/demands/none"))[0] == 404
        assert (await client.request("GET", f"{path}/events"))[0] == 404


async def test_a_demand_expires(requestor: RequestorRunner) -> None:
    async with requestor(single_provider()) as client:
        soon = int((time.time() + 0.3) * 1000)
        demand_id = await client.subscribe("(golem.runtime.name=absent)", **{"golem.srv.comp.expiration": soon})
        assert (await client.request("GET", f"{MARKET}/demands/{demand_id}/events", timeout=30))[0] == 404


async def test_a_provider_refuses_what_expires_within_five_minutes(requestor: RequestorRunner) -> None:
    async with requestor(single_provider()) as client:
        soon = {"golem.srv.comp.expiration": int((time.time() + 290) * 1000)}
        assert await client.proposals(await client.subscribe(**soon), seconds=0) == []

        draft = await client.draft(await client.subscribe())
        (provider,) = client.devnet.market.providers.values()
        provider._scenario = replace(provider._scenario, min_expiration_seconds=4000.0)
        agreement_id = await client.propose_agreement(draft)
        assert (await client.request("POST", f"{MARKET}/agreements/{agreement_id}/wait", timeout=30))[0] == 410
        assert client.devnet.market.agreements[agreement_id].state == "Rejected"


async def test_a_distant_provider_answers_later(requestor: RequestorRunner) -> None:
    async with requestor(single_provider(latency_seconds=0.2)) as client:
        demand_id = await client.subscribe()
        started_at = time.monotonic()
        agreement_id = await client.agree(demand_id)  # the draft, and the approval
        assert time.monotonic() - started_at >= 0.4
        activity_id = await client.activity(agreement_id)
        await client.results(activity_id, await client.execute(activity_id))
        assert time.monotonic() - started_at >= 0.6


async def test_an_agreement_ends_when_its_demand_expires(requestor: RequestorRunner) -> None:
    async with requestor(single_provider(min_expiration_seconds=0.0)) as client:
        soon = int((time.time() + 0.5) * 1000)
        agreement_id = await client.agree(await client.subscribe(**{"golem.srv.comp.expiration": soon}))
        activity_id = await client.activity(agreement_id)
        agreement = client.devnet.market.agreements[agreement_id]
        await until(lambda: agreement.state == "Terminated")
        assert agreement.reason == {"message": "The demand has expired."}
        await until(lambda: client.devnet.activities.reason(activity_id))
        state = await client.request_ok("GET", f"{ACTIVITY}/activity/{activity_id}/state")
        assert state["state"] == ["Terminated", None]
        assert (await client.request("POST", f"{ACTIVITY}/activity/{activity_id}/exec", {"text": "[]"}))[0] == 404


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("demands", {"properties": {}}, "constraints"),
        ("demands", {"properties": [], "constraints": ""}, "object"),
        ("demands", {"properties": {}, "constraints": "(a=b"}, "at its end"),
        ("demands", [], "JSON object"),
        ("demands", {"properties": {"golem.srv.comp.expiration": 1e300}, "constraints": ""}, "expiration"),
        ("agreements", {"proposalId": "R-1"}, "validTo"),
        ("agreements", {"proposalId": "R-1", "validTo": "tomorrow"}, "ISO 8601"),
    ],
)
async def test_an_invalid_body_is_rejected(requestor: RequestorRunner, path: str, body: object, reason: str) -> None:
    async with requestor(single_provider()) as client:
        status, answer = await client.request("POST", f"{MARKET}/{path}", body)
        assert (status, reason in answer["message"]) == (400, True), answer


async def test_an_invalid_query_is_rejected(requestor: RequestorRunner) -> None:
    async with requestor(single_provider()) as client:
        events = f"{MARKET}/demands/{await client.subscribe()}/events"
        for query in ({"timeout": "soon"}, {"timeout": "-1"}, {"timeout": "nan"}, {"maxEvents": "0"}):
            assert (await client.request("GET", events, **query))[0] == 400, query
        assert (await client.request("GET", f"{MARKET}/agreements", state="Good"))[0] == 400


async def test_steps_in_the_wrong_order_are_rejected(requestor: RequestorRunner) -> None:
    async with requestor(single_provider()) as client:
        demand_id = await client.subscribe()
        (initial,) = await client.proposals(demand_id)
        create = {"proposalId": initial["proposalId"], "validTo": in_hours(1)}
        assert (await client.request("POST", f"{MARKET}/agreements", create))[0] == 409
        await client.counter(demand_id, initial["proposalId"])
        (draft,) = await client.proposals(demand_id)
        create["proposalId"] = draft["proposalId"]
        agreement_id = await client.request_ok("POST", f"{MARKET}/agreements", create)
        path = f"{MARKET}/agreements/{agreement_id}"
        assert (await client.request("POST", f"{MARKET}/agreements", create))[0] == 409
        assert (await client.request("POST", f"{path}/wait"))[0] == 409
        assert (await client.request("POST", f"{path}/terminate", {"message": "m"}))[0] == 409
        assert (await client.request("POST", f"{ACTIVITY}/activity", agreement_id))[0] == 400
        await client.request_ok("POST", f"{path}/confirm")
        await client.request_ok("POST", f"{path}/wait", timeout=DEADLINE_SECONDS)
        assert (await client.request("POST", f"{path}/confirm"))[0] == 410
        assert (await client.request("POST", f"{path}/cancel"))[0] == 410
        assert (await client.request("POST", f"{path}/terminate", {"why": "m"}))[0] == 400
        await client.terminate(agreement_id)
        status, answer = await client.request("POST", f"{path}/terminate", {"message": "m"})
        assert (status, answer["message"]) == (410, "Terminated")
        assert (await client.request("GET", f"{MARKET}/agreements/none"))[0] == 404
        assert client.devnet.market.agreements[agreement_id].reason == {"message": "done"}


async def test_a_rejected_proposal_cannot_be_used(requestor: RequestorRunner) -> None:
    async with requestor(single_provider()) as client:
        demand_id = await client.subscribe()
        draft = await client.draft(demand_id)
        path = f"{MARKET}/demands/{demand_id}/proposals/{draft['proposalId']}"
        assert draft["state"] == "Draft"
        await client.request_ok("POST", f"{path}/reject", {"message": "Score too low"})
        assert (await client.request("POST", f"{path}/reject", {"message": "m"}))[0] == 410
        assert (await client.request("POST", path, {"properties": {}, "constraints": ""}))[0] == 410
        create = {"proposalId": draft["proposalId"], "validTo": in_hours(1)}
        assert (await client.request("POST", f"{MARKET}/agreements", create))[0] == 410


async def test_an_agreement_expires_unless_it_is_approved(requestor: RequestorRunner) -> None:
    async with requestor(single_provider(Fault(kind="never-approve"))) as client:
        agreement_id = await client.propose_agreement(await client.draft(await client.subscribe()), 0.2 / 3600)
        status, answer = await client.request("POST", f"{MARKET}/agreements/{agreement_id}/wait", timeout=30)
        assert (status, answer["message"]) == (410, "Expired")


async def test_agreements_are_listed_by_state(requestor: RequestorRunner) -> None:
    async with requestor(TWO) as client:
        demand_id = await client.subscribe("(golem.runtime.name=mlg)(golem.inf.cpu.cores=1)")
        first = await client.complete_agreement(demand_id)
        second = await client.agree(await client.subscribe("(golem.inf.cpu.cores=4)"))
        path = f"{MARKET}/agreements"
        whole = await client.request_ok("GET", path)
        assert [each["id"] for each in whole] == [first, second]
        assert all(each["role"] == "Requestor" and each["approvedDate"] for each in whole)
        assert [each["id"] for each in await client.request_ok("GET", path, state="Approved")] == [second]
        shown = await client.request_ok("GET", f"{path}/{second}")
        assert shown["state"] == "Approved"
        assert shown["demand"]["properties"]["golem.com.payment.chosen-platform"]


# Providers


async def has_no_proposals(client: Requestor, demand_id: str) -> bool:
    return await client.proposals(demand_id, 0) == []


async def test_a_busy_provider_does_not_answer_and_proposes_again_when_free(requestor: RequestorRunner) -> None:
    async with requestor(single_provider(runtimes=("mlg",))) as client:
        first, second = await client.subscribe(), await client.subscribe()
        (waiting,) = await client.proposals(second)
        agreement_id = await client.agree(first)
        await client.counter(second, waiting["proposalId"])
        third = await client.subscribe()
        assert await has_no_proposals(client, second) and await has_no_proposals(client, third)
        await client.terminate(agreement_id)
        for demand_id in (first, second, third):
            (again,) = await client.proposals(demand_id)
            assert again["state"] == "Initial"


async def test_a_draft_can_be_countered_again_after_a_rejection(requestor: RequestorRunner) -> None:
    async with requestor(single_provider(Fault(kind="reject", times=1))) as client:
        demand_id = await client.subscribe()
        draft = await client.draft(demand_id)
        agreement_id = await client.propose_agreement(draft)
        status, answer = await client.request("POST", f"{MARKET}/agreements/{agreement_id}/wait")
        assert (status, answer["message"]) == (410, "Rejected")
        await client.counter(demand_id, draft["proposalId"])
        (second,) = await client.proposals(demand_id)
        accepted = await client.propose_agreement(second)
        await client.request_ok("POST", f"{MARKET}/agreements/{accepted}/wait")


async def test_an_agreement_for_one_activity_ends_with_it(requestor: RequestorRunner) -> None:
    async with requestor(single_provider()) as client:
        agreement_id = await client.agree(await client.subscribe(**{"golem.srv.caps.multi-activity": False}))
        activity_id = await client.activity(agreement_id)
        assert (await client.request("POST", f"{ACTIVITY}/activity", agreement_id))[0] == 400
        await client.destroy(activity_id)
        assert client.devnet.market.agreements[agreement_id].state == "Terminated"
        assert await client.invoice() is not None


async def test_an_agreement_for_several_activities_outlives_the_first(requestor: RequestorRunner) -> None:
    async with requestor(single_provider()) as client:
        agreement_id = await client.agree(await client.subscribe())
        activities = [await client.activity(agreement_id) for _ in range(2)]
        for activity_id in activities:
            await client.results(activity_id, await client.execute(activity_id))
            await client.destroy(activity_id)
            await client.destroy(activity_id)
        await client.terminate(agreement_id)
        invoice = await client.invoice()
        assert invoice is not None and invoice["activityIds"] == activities


@pytest.mark.parametrize(
    ("setting", "reason"),
    [("idle_seconds", "It has no activity."), ("silent_seconds", "The requestor is inactive.")],
)
async def test_a_provider_terminates_an_agreement_with_an_inactive_requestor(
    requestor: RequestorRunner, setting: str, reason: str
) -> None:
    async with requestor(single_provider(**{setting: 0.3})) as client:
        agreement_id = await client.agree(await client.subscribe())
        if setting == "silent_seconds":
            await client.activity(agreement_id)
        agreement = client.devnet.market.agreements[agreement_id]
        await until(lambda: agreement.state == "Terminated")
        assert agreement.reason == {"message": reason}


async def test_an_agreement_can_be_cancelled_before_a_slow_approval(requestor: RequestorRunner) -> None:
    async with requestor(single_provider(Fault(kind="slow-approval", seconds=0.3))) as client:
        demand_id = await client.subscribe()
        path = f"{MARKET}/agreements/{await client.propose_agreement(await client.draft(demand_id))}"
        assert (await client.request("POST", f"{path}/wait", timeout=0.01))[0] == 408
        await client.request_ok("POST", f"{path}/cancel", {"message": "too slow"})
        status, answer = await client.request("POST", f"{path}/wait")
        assert (status, answer["message"]) == (410, "Cancelled")
        # The provider is free again. A wait without a limit lasts until the approval.
        path = f"{MARKET}/agreements/{await client.propose_agreement(await client.draft(demand_id))}"
        await client.request_ok("POST", f"{path}/wait", timeout=0)


async def test_a_provider_fails_to_answer_or_to_create_an_activity(requestor: RequestorRunner) -> None:
    faults = (Fault(kind="no-answer", times=1), Fault(kind="no-activity", times=1))
    async with requestor(single_provider(*faults)) as client:
        demand_id = await client.subscribe()
        (initial,) = await client.proposals(demand_id)
        await client.counter(demand_id, initial["proposalId"])
        assert await has_no_proposals(client, demand_id)
        await client.counter(demand_id, initial["proposalId"])
        (draft,) = await client.proposals(demand_id)
        agreement_id = await client.propose_agreement(draft)
        await client.request_ok("POST", f"{MARKET}/agreements/{agreement_id}/wait")
        assert (await client.request("POST", f"{ACTIVITY}/activity", agreement_id))[0] == 500
        await client.activity(agreement_id)


async def test_a_provider_terminates_an_agreement_during_a_batch(requestor: RequestorRunner) -> None:
    async with requestor(single_provider(Fault(kind="drop-agreement", after=1))) as client:
        agreement_id = await client.agree(await client.subscribe())
        activity_id = await client.activity(agreement_id)
        await client.execute(activity_id)
        run = {"run": {"entry_point": "/bin/true", "args": []}}
        batch_id = await client.execute(activity_id, run)
        assert (await client.results(activity_id, batch_id))[0]["result"] == "Ok"
        sleep = {"run": {"entry_point": "/bin/sleep", "args": ["60"]}}
        batch_id = await client.execute(activity_id, sleep)
        path = f"{ACTIVITY}/activity/{activity_id}"
        status, _ = await client.request("GET", f"{path}/exec/{batch_id}", timeout=30)
        assert status in (404, 410)
        state = await client.request_ok("GET", f"{path}/state")
        assert state["state"][0] == "Terminated" and state["reason"]
        assert client.devnet.market.agreements[agreement_id].reason == {
            "message": "Fault of the scenario: drop-agreement."
        }
