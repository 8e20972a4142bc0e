"""Sends the requests of a plan, each at its time, whether the earlier ones were answered or not.

A load that waits for answers before it sends more (a closed loop) becomes slower together with the server, and hides
how long clients would wait. Here a request's latency counts from the time at which it was to be sent, also where this
program itself was late, which is reported too.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from cli.load.plan import LoadImage, LoadPlan
from cli.tables import printable

#: Codes of failures that no server has sent.
NOT_SENT, TIMED_OUT, NO_CONNECTION, FAILED = "not_sent", "timeout", "no_connection", "failed"
#: Seconds that one read asks the server to hold the response.
_HOLD_SECONDS = 5.0
#: Pause before the next read, where the server does not hold them.
_POLL_SECONDS = 0.1
#: The longest code of a failure.
_MAX_CODE = 40


@dataclass(frozen=True, slots=True)
class LoadSample:
    """What became of one request."""

    #: When it was to be sent, in seconds after the start.
    planned: float
    #: How much later it was sent.
    late: float
    #: From the planned time to the end of the response, or of the answer; None if it failed.
    seconds: float | None
    #: Why it failed; empty if it did not.
    code: str = ""


async def run_plan(
    plan: LoadPlan,
    http: httpx.AsyncClient,
    on_sample: Callable[[LoadSample], object] = lambda sample: None,
) -> list[LoadSample]:
    """Send everything. When it is cancelled, it ends with what it has. :return: in the order of the ends."""
    samples: list[LoadSample] = []
    tasks: set[asyncio.Task[None]] = set()
    loop = asyncio.get_running_loop()
    started = loop.time()

    def add(sample: LoadSample) -> None:
        samples.append(sample)
        on_sample(sample)

    async def send(planned: float, image: LoadImage) -> None:
        late = loop.time() - started - planned
        try:
            async with asyncio.timeout(plan.timeout_seconds):
                code = await _send(plan, http, image)
        except TimeoutError:
            code = TIMED_OUT
        except httpx.HTTPError as error:
            code = TIMED_OUT if isinstance(error, httpx.TimeoutException) else NO_CONNECTION
        seconds = loop.time() - started - planned
        add(LoadSample(planned, late, None if code else seconds, code))

    try:
        for index, planned in enumerate(plan.offsets()):
            # Also without time to wait, so that responses are read.
            await asyncio.sleep(max(0.0, started + planned - loop.time()))
            if len(tasks) >= plan.max_in_flight:
                add(LoadSample(planned, 0.0, None, NOT_SENT))
                continue
            task = asyncio.create_task(send(planned, plan.images[index % len(plan.images)]))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
    except asyncio.CancelledError:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return samples


async def _send(plan: LoadPlan, http: httpx.AsyncClient, image: LoadImage) -> str:
    """Send one request, and wait for its answer if the plan says so. :return: the code of its failure, or nothing."""
    response = await http.post(plan.path, content=image.body, headers={"Content-Type": image.content_type})
    answer = _parse(response)
    if not response.is_success:
        return _code(response, answer)
    while plan.waits and answer.get("status") not in ("done", "failed", "cancelled", "expired"):
        # A server holds a limited number of reads; what it does not hold is read again after a pause.
        url = answer.get("status_url")
        if not isinstance(url, str) or not url.startswith("/readPrediction/"):
            return FAILED
        before = asyncio.get_running_loop().time()
        response = await http.get(url, params={"wait": _HOLD_SECONDS})
        answer = {"status_url": url, **_parse(response)}
        if not response.is_success:
            return _code(response, answer)
        if asyncio.get_running_loop().time() - before < _POLL_SECONDS:
            await asyncio.sleep(_POLL_SECONDS)
    status = answer.get("status", "done") if plan.waits else "done"
    return "" if status == "done" else printable(str(answer.get("code") or status))[:_MAX_CODE]


def _parse(response: httpx.Response) -> dict[str, Any]:
    try:
        found = json.loads(response.content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _code(response: httpx.Response, answer: dict[str, Any]) -> str:
    return printable(f"{response.status_code} {answer.get('code') or ''}".strip())[:_MAX_CODE]
