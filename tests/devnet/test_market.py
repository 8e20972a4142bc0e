"""The market over HTTP: every step that a requestor takes, and every step out of turn."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from devnet.scenario import Fault, ProviderPlan, Scenario
from tests.devnet.requestor import ACTIVITY, MARKET, Requestor, alone, in_hours, requestor, until

TWO = Scenario(providers=(ProviderPlan(name="alpha"), ProviderPlan(name="beta", cores=4, runtimes=("mlg",))))


def test_nobody_is_served_without_the_key(tmp_path: Path) -> None:
    async def main() -> None:
        async with requestor(alone(), tmp_path) as asker:
            for key in ("", "wrong", asker.devnet.app_key + "x"):
                status, answer = await asker.ask("GET", "/me", key=key)
                assert (status, "app key" in answer["message"]) == (401, True)
            assert (await asker.ask("GET", "/nothing", key=""))[0] == 401
            assert (await asker.ask("GET", "/me", key="", authToken=asker.devnet.app_key))[0] == 200
            identity = await asker.must("GET", "/me")
            assert identity["identity"].startswith("0x") and identity["role"] == "manager"
            assert (await asker.must("GET", "/version/get"))["current"]["version"]
            status, answer = await asker.ask("GET", "/market-api/v1/nothing")
            assert (status, "nothing" in answer["message"]) == (404, True)
            assert (await asker.ask("PUT", "/me"))[0] == 405

    asyncio.run(main())


def test_only_offers_that_match_are_proposed(tmp_path: Path) -> None:
    async def main() -> None:
        async with requestor(TWO, tmp_path) as asker:
            every = await asker.proposals(await asker.subscribe("(golem.runtime.name=*)"))
            assert sorted(each["properties"]["golem.runtime.name"] for each in every) == ["mlg", "mlg", "vm"]
            assert all(type(each) is float for each in every[0]["properties"]["golem.com.pricing.model.linear.coeffs"])
            big = await asker.proposals(await asker.subscribe("(golem.inf.cpu.cores>=2)"))
            assert [each["properties"]["golem.node.id.name"] for each in big] == ["beta"]
            elsewhere = await asker.subscribe(**{"golem.node.debug.subnet": "public"})
            assert await asker.proposals(elsewhere, 0) == []
            open_ids = {each["demandId"] for each in await asker.must("GET", f"{MARKET}/demands")}
            assert elsewhere in open_ids and len(open_ids) == 3

    asyncio.run(main())


def test_events_are_given_once_and_waited_for(tmp_path: Path) -> None:
    async def main() -> None:
        async with requestor(TWO, tmp_path) as asker:
            demand_id = await asker.subscribe("(golem.runtime.name=*)")
            assert len(await asker.proposals(demand_id, maxEvents=2)) == 2
            (third,) = await asker.proposals(demand_id)
            waiting = asyncio.create_task(asker.proposals(demand_id, 30))
            await asker.counter(demand_id, third["proposalId"])
            (draft,) = await waiting
            assert (draft["state"], draft["issuerId"]) == ("Draft", third["issuerId"])

    asyncio.run(main())


def test_a_demand_ends_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with requestor(alone(), tmp_path) as asker:
            demand_id = await asker.subscribe("(golem.runtime.name=absent)")
            path = f"{MARKET}/demands/{demand_id}"
            waiting = asyncio.create_task(asker.ask("GET", f"{path}/events", timeout=30))
            await until(lambda: asker.devnet.market.demands[demand_id].is_open)
            await asker.must("DELETE", path)
            assert (await waiting)[0] == 404
            assert (await asker.ask("DELETE", path))[0] == 410
            assert (await asker.ask("DELETE", f"{MARKET}/demands/none"))[0] == 404
            assert (await asker.ask("GET", f"{path}/events"))[0] == 404

    asyncio.run(main())


def test_a_demand_expires(tmp_path: Path) -> None:
    async def main() -> None:
        async with requestor(alone(), tmp_path) as asker:
            soon = int((time.time() + 0.3) * 1000)
            demand_id = await asker.subscribe("(golem.runtime.name=absent)", **{"golem.srv.comp.expiration": soon})
            assert (await asker.ask("GET", f"{MARKET}/demands/{demand_id}/events", timeout=30))[0] == 404

    asyncio.run(main())


def test_an_agreement_ends_with_its_demand(tmp_path: Path) -> None:
    async def main() -> None:
        async with requestor(alone(), tmp_path) as asker:
            soon = int((time.time() + 0.5) * 1000)
            agreement_id = await asker.agree(await asker.subscribe(**{"golem.srv.comp.expiration": soon}))
            activity_id = await asker.activity(agreement_id)
            agreement = asker.devnet.market.agreements[agreement_id]
            await until(lambda: agreement.state == "Terminated")
            assert agreement.terminator == "Provider"
            await until(lambda: asker.devnet.activities.reason(activity_id))
            state = await asker.must("GET", f"{ACTIVITY}/activity/{activity_id}/state")
            assert state["state"] == ["Terminated", None]
            assert (await asker.ask("POST", f"{ACTIVITY}/activity/{activity_id}/exec", {"text": "[]"}))[0] == 404

    asyncio.run(main())


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
def test_a_wrong_body_is_refused(tmp_path: Path, path: str, body: object, reason: str) -> None:
    async def main() -> None:
        async with requestor(alone(), tmp_path) as asker:
            status, answer = await asker.ask("POST", f"{MARKET}/{path}", body)
            assert (status, reason in answer["message"]) == (400, True), answer

    asyncio.run(main())


def test_a_wrong_query_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with requestor(alone(), tmp_path) as asker:
            events = f"{MARKET}/demands/{await asker.subscribe()}/events"
            for query in ({"timeout": "soon"}, {"timeout": "-1"}, {"timeout": "nan"}, {"maxEvents": "0"}):
                assert (await asker.ask("GET", events, **query))[0] == 400, query
            assert (await asker.ask("GET", f"{MARKET}/agreements", state="Good"))[0] == 400
            assert (await asker.ask("GET", f"{MARKET}/agreements", afterDate="x"))[0] == 400

    asyncio.run(main())


def test_steps_out_of_turn_are_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with requestor(alone(), tmp_path) as asker:
            demand_id = await asker.subscribe()
            (initial,) = await asker.proposals(demand_id)
            create = {"proposalId": initial["proposalId"], "validTo": in_hours(1)}
            assert (await asker.ask("POST", f"{MARKET}/agreements", create))[0] == 409
            await asker.counter(demand_id, initial["proposalId"])
            (draft,) = await asker.proposals(demand_id)
            create["proposalId"] = draft["proposalId"]
            agreement_id = await asker.must("POST", f"{MARKET}/agreements", create)
            path = f"{MARKET}/agreements/{agreement_id}"
            assert (await asker.ask("POST", f"{MARKET}/agreements", create))[0] == 409
            assert (await asker.ask("POST", f"{path}/wait"))[0] == 409
            assert (await asker.ask("POST", f"{path}/terminate", {"message": "m"}))[0] == 409
            assert (await asker.ask("POST", f"{ACTIVITY}/activity", agreement_id))[0] == 400
            await asker.must("POST", f"{path}/confirm")
            await asker.must("POST", f"{path}/wait", timeout=5)
            assert (await asker.ask("POST", f"{path}/confirm"))[0] == 410
            assert (await asker.ask("POST", f"{path}/cancel"))[0] == 410
            assert (await asker.ask("POST", f"{path}/terminate", {"why": "m"}))[0] == 400
            await asker.terminate(agreement_id)
            status, answer = await asker.ask("POST", f"{path}/terminate", {"message": "m"})
            assert (status, answer["message"]) == (410, "Terminated")
            assert (await asker.ask("GET", f"{MARKET}/agreements/none"))[0] == 404
            assert (await asker.must("POST", f"{path}/terminate/reason"))["reason"] == {"message": "done"}

    asyncio.run(main())


def test_a_rejected_proposal_is_over(tmp_path: Path) -> None:
    async def main() -> None:
        async with requestor(alone(), tmp_path) as asker:
            demand_id = await asker.subscribe()
            draft = await asker.draft(demand_id)
            path = f"{MARKET}/demands/{demand_id}/proposals/{draft['proposalId']}"
            assert (await asker.must("GET", path))["state"] == "Draft"
            await asker.must("POST", f"{path}/reject", {"message": "Score too low"})
            assert (await asker.ask("POST", f"{path}/reject", {"message": "m"}))[0] == 410
            assert (await asker.ask("POST", path, {"properties": {}, "constraints": ""}))[0] == 410
            create = {"proposalId": draft["proposalId"], "validTo": in_hours(1)}
            assert (await asker.ask("POST", f"{MARKET}/agreements", create))[0] == 410

    asyncio.run(main())


def test_an_agreement_expires_unless_it_is_approved(tmp_path: Path) -> None:
    async def main() -> None:
        async with requestor(alone(Fault(kind="never-approve")), tmp_path) as asker:
            agreement_id = await asker.propose_agreement(await asker.draft(await asker.subscribe()), 0.2 / 3600)
            status, answer = await asker.ask("POST", f"{MARKET}/agreements/{agreement_id}/wait", timeout=30)
            assert (status, answer["message"]) == (410, "Expired")

    asyncio.run(main())


def test_agreements_are_listed_by_state_and_date(tmp_path: Path) -> None:
    async def main() -> None:
        async with requestor(TWO, tmp_path) as asker:
            demand_id = await asker.subscribe("(golem.runtime.name=mlg)(golem.inf.cpu.cores=1)")
            first = await asker.work(demand_id)
            second = await asker.agree(await asker.subscribe("(golem.inf.cpu.cores=4)"))
            path = f"{MARKET}/agreements"
            whole = await asker.must("GET", path)
            assert [each["id"] for each in whole] == [first, second]
            assert all(each["role"] == "Requestor" and each["approvedDate"] for each in whole)
            assert [each["id"] for each in await asker.must("GET", path, state="Approved")] == [second]
            assert [each["id"] for each in await asker.must("GET", path, afterDate=whole[0]["timestamp"])] == [second]
            assert [each["id"] for each in await asker.must("GET", path, beforeDate=whole[1]["timestamp"])] == [first]
            shown = await asker.must("GET", f"{path}/{second}")
            assert shown["state"] == "Approved"
            assert shown["demand"]["properties"]["golem.com.payment.chosen-platform"]
            events = await asker.must("GET", f"{MARKET}/agreementEvents", timeout=0)
            kinds = [event["eventType"] for event in events]
            assert kinds == ["AgreementApprovedEvent", "AgreementTerminatedEvent", "AgreementApprovedEvent"]
            later = await asker.must("GET", f"{MARKET}/agreementEvents", afterTimestamp=events[1]["eventDate"])
            assert later == events[2:]

    asyncio.run(main())


# Providers


async def is_silent(asker: Requestor, demand_id: str) -> bool:
    return await asker.proposals(demand_id, 0) == []


def test_a_busy_provider_answers_nobody_and_offers_itself_again_when_free(tmp_path: Path) -> None:
    async def main() -> None:
        async with requestor(alone(runtimes=("mlg",)), tmp_path) as asker:
            first, second = await asker.subscribe(), await asker.subscribe()
            (waiting,) = await asker.proposals(second)
            agreement_id = await asker.agree(first)
            await asker.counter(second, waiting["proposalId"])
            third = await asker.subscribe()
            assert await is_silent(asker, second) and await is_silent(asker, third)
            await asker.terminate(agreement_id)
            for demand_id in (first, second, third):
                (again,) = await asker.proposals(demand_id)
                assert again["state"] == "Initial"

    asyncio.run(main())


def test_a_draft_can_be_countered_again_after_a_refusal(tmp_path: Path) -> None:
    async def main() -> None:
        async with requestor(alone(Fault(kind="reject", times=1)), tmp_path) as asker:
            demand_id = await asker.subscribe()
            draft = await asker.draft(demand_id)
            agreement_id = await asker.propose_agreement(draft)
            status, answer = await asker.ask("POST", f"{MARKET}/agreements/{agreement_id}/wait")
            assert (status, answer["message"]) == (410, "Rejected")
            await asker.counter(demand_id, draft["proposalId"])
            (second,) = await asker.proposals(demand_id)
            accepted = await asker.propose_agreement(second)
            await asker.must("POST", f"{MARKET}/agreements/{accepted}/wait")

    asyncio.run(main())


def test_an_agreement_for_one_activity_ends_with_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with requestor(alone(), tmp_path) as asker:
            agreement_id = await asker.agree(await asker.subscribe(**{"golem.srv.caps.multi-activity": False}))
            activity_id = await asker.activity(agreement_id)
            assert (await asker.ask("POST", f"{ACTIVITY}/activity", agreement_id))[0] == 400
            await asker.destroy(activity_id)
            assert asker.devnet.market.agreements[agreement_id].state == "Terminated"
            assert await asker.invoice() is not None

    asyncio.run(main())


def test_an_agreement_for_many_activities_goes_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with requestor(alone(), tmp_path) as asker:
            agreement_id = await asker.agree(await asker.subscribe())
            activities = [await asker.activity(agreement_id) for _ in range(2)]
            for activity_id in activities:
                await asker.results(activity_id, await asker.execute(activity_id))
                assert await asker.must("GET", f"{ACTIVITY}/activity/{activity_id}/agreement") == agreement_id
                await asker.destroy(activity_id)
                await asker.destroy(activity_id)
            await asker.terminate(agreement_id)
            invoice = await asker.invoice()
            assert invoice is not None and invoice["activityIds"] == activities

    asyncio.run(main())


@pytest.mark.parametrize("setting", ["idle_seconds", "silent_seconds"])
def test_a_provider_leaves_a_requestor_that_does_nothing(tmp_path: Path, setting: str) -> None:
    async def main() -> None:
        async with requestor(alone(**{setting: 0.3}), tmp_path) as asker:
            agreement_id = await asker.agree(await asker.subscribe())
            if setting == "silent_seconds":
                await asker.activity(agreement_id)
            agreement = asker.devnet.market.agreements[agreement_id]
            await until(lambda: agreement.state == "Terminated")
            assert agreement.terminator == "Provider"

    asyncio.run(main())


def test_a_slow_approval_is_waited_for_and_can_be_cancelled(tmp_path: Path) -> None:
    async def main() -> None:
        async with requestor(alone(Fault(kind="slow-approval", seconds=0.3)), tmp_path) as asker:
            demand_id = await asker.subscribe()
            path = f"{MARKET}/agreements/{await asker.propose_agreement(await asker.draft(demand_id))}"
            assert (await asker.ask("POST", f"{path}/wait", timeout=0.01))[0] == 408
            await asker.must("POST", f"{path}/cancel", {"message": "too slow"})
            status, answer = await asker.ask("POST", f"{path}/wait")
            assert (status, answer["message"]) == (410, "Cancelled")
            # It is free again, and a wait without a limit lasts until the approval.
            path = f"{MARKET}/agreements/{await asker.propose_agreement(await asker.draft(demand_id))}"
            await asker.must("POST", f"{path}/wait", timeout=0)

    asyncio.run(main())


def test_a_provider_that_never_answers_or_never_starts(tmp_path: Path) -> None:
    async def main() -> None:
        faults = (Fault(kind="no-answer", times=1), Fault(kind="no-activity", times=1))
        async with requestor(alone(*faults), tmp_path) as asker:
            demand_id = await asker.subscribe()
            (initial,) = await asker.proposals(demand_id)
            await asker.counter(demand_id, initial["proposalId"])
            assert await is_silent(asker, demand_id)
            await asker.counter(demand_id, initial["proposalId"])
            (draft,) = await asker.proposals(demand_id)
            agreement_id = await asker.propose_agreement(draft)
            await asker.must("POST", f"{MARKET}/agreements/{agreement_id}/wait")
            assert (await asker.ask("POST", f"{ACTIVITY}/activity", agreement_id))[0] == 500
            await asker.activity(agreement_id)

    asyncio.run(main())


def test_an_agreement_is_dropped_in_mid_batch(tmp_path: Path) -> None:
    async def main() -> None:
        async with requestor(alone(Fault(kind="drop-agreement", after=1)), tmp_path) as asker:
            agreement_id = await asker.agree(await asker.subscribe())
            activity_id = await asker.activity(agreement_id)
            await asker.execute(activity_id)
            run = {"run": {"entry_point": "/bin/true", "args": []}}
            batch_id = await asker.execute(activity_id, run)
            assert (await asker.results(activity_id, batch_id))[0]["result"] == "Ok"
            sleep = {"run": {"entry_point": "/bin/sleep", "args": ["60"]}}
            batch_id = await asker.execute(activity_id, sleep)
            path = f"{ACTIVITY}/activity/{activity_id}"
            status, _ = await asker.ask("GET", f"{path}/exec/{batch_id}", timeout=30)
            assert status in (404, 410)
            state = await asker.must("GET", f"{path}/state")
            assert state["state"][0] == "Terminated" and state["reason"]
            assert asker.devnet.market.agreements[agreement_id].terminator == "Provider"

    asyncio.run(main())
