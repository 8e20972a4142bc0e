"""The devnet against the daemon's published API: requests of yapapi and the executor, and the responses."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from devnet.api.application import ApiCall
from tests.devnet.api_recordings import (
    Recordings,
    record_every_call,
    record_executor,
    record_yapapi,
    without_parameter_names,
)
from tests.devnet.published_api import PUBLISHED_API, RESULTS, Violation, find_violations, published_name
from tests.devnet.requestor import ACTIVITY, MARKET, PAYMENT, RequestorRunner, single_provider

_NULL = "The daemon writes null for what a result does not have."
_VECTOR = "The daemon passes on what the provider sends: a list, in the order of the offer's usage vector."
#: Where the daemon differs from its description, and the devnet follows the daemon:
#: (call, location, rule) -> reason.
KNOWN_DEVIATIONS = {
    (RESULTS, "answer[].stdout", "type"): _NULL,
    (RESULTS, "answer[].stderr", "type"): _NULL,
    (RESULTS, "answer[].message", "type"): _NULL,
    (f"GET {PAYMENT}/debitNotes", "answer[].usageCounterVector", "type"): _VECTOR,
    (f"GET {PAYMENT}/debitNotes/{{debitNoteId}}", "answer.usageCounterVector", "type"): _VECTOR,
}
_SCAN = "For tools that inspect the market; neither yapapi nor the executor does."
_UNUSED = "Neither yapapi nor the executor makes this call."
_NOT_THERE = "According to the description itself, the daemon does not implement it."
#: Published calls of a requestor that the devnet does not implement -> reason.
UNIMPLEMENTED = {
    f"POST {MARKET}/scan": _SCAN,
    f"GET {MARKET}/scan/{{subscriptionId}}/events": _SCAN,
    f"DELETE {MARKET}/scan/{{subscriptionId}}/events": _SCAN,
    f"POST {MARKET}/demands/{{subscriptionId}}/propertyQuery/{{queryId}}": "Providers do not query properties later.",
    f"GET {PAYMENT}/debitNotes/{{debitNoteId}}/payments": _NOT_THERE,
    f"GET {PAYMENT}/invoices/{{invoiceId}}/payments": _NOT_THERE,
    f"POST {PAYMENT}/invoices": "For providers; those of the devnet do not use HTTP.",
    f"POST {ACTIVITY}/activity/{{activityId}}/encrypted": "The providers have no enclaves.",
    f"GET {ACTIVITY}/activity/{{activityId}}/command": _UNUSED,
    f"GET {ACTIVITY}/activity/{{activityId}}/agreement": _UNUSED,
    f"GET {MARKET}/demands/{{subscriptionId}}/proposals/{{proposalId}}": _UNUSED,
    f"GET {MARKET}/agreementEvents": _UNUSED,
    f"POST {MARKET}/agreements/{{agreementId}}/terminate/reason": _UNUSED,
    f"PUT {PAYMENT}/allocations/{{allocationId}}": _UNUSED,
    f"GET {PAYMENT}/payments": _UNUSED,
    f"GET {PAYMENT}/payments/status": _UNUSED,
    f"GET {PAYMENT}/payments/{{paymentId}}": _UNUSED,
}
#: The same for one of the types of an answer: (call, type) -> reason.
UNIMPLEMENTED_TYPES = {
    (RESULTS, "text/event-stream"): "Only yapapi with stream_output=True asks for events; the executor polls.",
}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory, models_folder: Path) -> Recordings:
    """Record all three requestors at the same time, each on its own devnet."""
    made, folder = Recordings(), tmp_path_factory.mktemp("published")

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(record_executor(made, folder / "executor", models_folder))
            group.create_task(record_yapapi(made, folder / "yapapi"))
            group.create_task(record_every_call(made, folder / "every-call"))

    asyncio.run(asyncio.wait_for(main(), 300))
    return made


def _format_violations(found: list[Violation]) -> str:
    return "\n".join(sorted({f"{each.key}: {each.message}" for each in found}))


# The published descriptions


def test_requests_and_responses_are_as_published(recordings: Recordings) -> None:
    found = [violation for call in recordings.calls for violation in find_violations(call)]

    unknown = [violation for violation in found if violation.key not in KNOWN_DEVIATIONS]

    assert not unknown, "\n" + _format_violations(unknown)


def test_every_known_deviation_occurs(recordings: Recordings) -> None:
    found = {violation.key for call in recordings.calls for violation in find_violations(call)}

    assert set(KNOWN_DEVIATIONS) - found == set()


def test_the_devnet_has_exactly_the_published_calls(recordings: Recordings) -> None:
    published = {without_parameter_names(name) for name in PUBLISHED_API["calls"] if name not in UNIMPLEMENTED}

    assert set(UNIMPLEMENTED) <= set(PUBLISHED_API["calls"])
    assert recordings.routes == published


@pytest.mark.parametrize(("name", "accepted"), UNIMPLEMENTED_TYPES)
async def test_an_unimplemented_type_is_refused(requestor: RequestorRunner, name: str, accepted: str) -> None:
    async with requestor(single_provider()) as client:
        activity_id = await client.activity(await client.agree(await client.subscribe()))
        batch_id = await client.execute(activity_id)
        method, path = name.format(activityId=activity_id, batchId=batch_id).split()

        status, answer = await client.request(method, path, accept=accepted)

        assert (status, "does not stream" in answer["message"]) == (400, True)
        assert len(await client.results(activity_id, batch_id)) == 2


@pytest.mark.parametrize(
    ("pattern", "status"),
    [
        (f"POST {MARKET}/demands/*/proposals/*/reject", 204),
        (f"POST {MARKET}/agreements/*/wait", 410),
        (f"POST {PAYMENT}/debitNotes/*/accept", 200),
        (f"POST {PAYMENT}/invoices/*/accept", 200),
        (f"GET {MARKET}/agreements", 200),
        (f"DELETE {PAYMENT}/allocations/*", 200),
    ],
)
def test_the_executors_recording_covers_the_call(recordings: Recordings, pattern: str, status: int) -> None:
    calls = [call for call in recordings.executor if fnmatchcase(f"{call.method} {call.path}", pattern)]

    assert status in {call.status for call in calls}


def test_the_recordings_contain_every_call_with_success(recordings: Recordings) -> None:
    made = {
        without_parameter_names(published_name(call.method, call.path) or "")
        for call in recordings.calls
        if (call.status or 500) < 300
    }

    assert recordings.routes - made == set()


@pytest.mark.parametrize(
    ("method", "path", "field", "value", "keys"),
    [
        ("GET", "/me", "answer", '{"identity": "0x1", "name": "devnet"}', {("answer.role", "required")}),
        ("GET", "/me", "status", 204, {("status 204", "unknown")}),
        ("GET", "/me", "query", "since=now", {("query.since", "unknown")}),
        ("GET", "/mine", "status", 404, {("path", "unknown")}),
        ("GET", f"{PAYMENT}/invoices", "query", "maxItems=101", {("query.maxItems", "maximum")}),
        ("GET", f"{PAYMENT}/invoices", "query", "maxItems=all", {("query.maxItems", "type")}),
        ("GET", f"{PAYMENT}/invoices", "query", "afterTimestamp=2026-11-20", {("query.afterTimestamp", "format")}),
        ("GET", f"{PAYMENT}/demandDecorations", "query", "", {("query.allocationIds", "required")}),
        ("GET", f"{PAYMENT}/allocations/1", "answer", '{"totalAmount": "much"}', {("answer.totalAmount", "format")}),
        ("GET", f"{MARKET}/demands/1/events", "answer", '[{"eventType": "NoEvent"}]', {("answer[]", "oneOf")}),
        (
            "POST",
            f"{ACTIVITY}/activity/1/exec",
            "request",
            json.dumps({"text": json.dumps([{"run": {"args": "ls"}}, {"dance": {}}])}),
            {
                ("request.text[].run.entry_point", "required"),
                ("request.text[].run.args", "type"),
                ("request.text[].dance", "unknown"),
            },
        ),
    ],
)
def test_violations_are_found(method: str, path: str, field: str, value: Any, keys: set[tuple[str, str]]) -> None:
    facts: dict[str, Any] = {"query": "", "request": "", "answer": "{}", "status": 200, field: value}
    call = ApiCall(
        at=datetime.now(UTC), method=method, path=path, seconds=0.1, request_bytes=0, answer_bytes=0, **facts
    )

    found = {(violation.location, violation.rule) for violation in find_violations(call)}

    assert keys <= found


# yapapi's own models


def _response_types() -> dict[str, tuple[Any, str]]:
    """Read from the source of yapapi's clients the type of each response: client and name of the type."""
    import ya_activity
    import ya_market
    import ya_payment

    found = {}
    for root, package, kinds in (
        (MARKET, ya_market, (ya_market.RequestorApi,)),
        (PAYMENT, ya_payment, (ya_payment.RequestorApi,)),
        (ACTIVITY, ya_activity, (ya_activity.RequestorControlApi, ya_activity.RequestorStateApi)),
    ):
        client = package.ApiClient.__new__(package.ApiClient)
        client.configuration = package.Configuration()
        for kind in kinds:
            calls = re.findall(
                r"""call_api\(\s*["'](\S+)["'],\s*["'](\w+)["'].*?response_type=(?:None|["']([^"']*)["'])""",
                inspect.getsource(kind),
                re.DOTALL,
            )
            found.update(
                {f"{method} {root}{without_parameter_names(path)}": (client, type_) for path, method, type_ in calls}
            )
    return found


def test_yapapis_models_accept_every_response(recordings: Recordings) -> None:
    types = _response_types()
    read = set()

    for call in recordings.calls:
        name = without_parameter_names(published_name(call.method, call.path) or "")
        client, type_ = types.get(name, (None, ""))
        if not type_ or call.status is None or call.status >= 300:
            continue
        value = client.deserialize(SimpleNamespace(data=call.answer), type_)
        expected = json.loads(call.answer)
        assert value is not None and (not isinstance(expected, list) or len(value) == len(expected)), call
        read.add(name)

    assert {name for name in recordings.routes if types.get(name, (None, ""))[1]} == read
