"""The calls of /activity-api/v1 that a requestor makes."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from aiohttp import web

from devnet.api import EventStream, read_json, read_object, read_timeout_seconds
from devnet.errors import ApiError, NotFound
from devnet.market import MarketService
from devnet.provider.activities import Activities, Activity
from devnet.provider.agent import Provider

_ROOT = "/activity-api/v1"


class ActivityRoutes:
    """The handlers of the activity API.

    :param providers: node id -> provider.
    """

    def __init__(self, activities: Activities, market: MarketService, providers: dict[str, Provider]) -> None:
        self._activities = activities
        self._market = market
        self._providers = providers

    def routes(self) -> list[web.RouteDef]:
        """List the routes."""
        activity = f"{_ROOT}/activity/{{activity_id}}"
        return [
            web.post(f"{_ROOT}/activity", self._create),
            web.delete(activity, self._destroy),
            web.post(f"{activity}/exec", self._execute),
            web.get(f"{activity}/exec/{{batch_id}}", self._results),
            web.get(f"{activity}/state", self._state),
            web.get(f"{activity}/usage", self._usage),
            web.get(f"{activity}/agreement", self._agreement),
        ]

    async def _create(self, request: web.Request) -> web.Response:
        body = await read_json(request)
        is_object = isinstance(body, dict)
        agreement_id = body.get("agreementId") if isinstance(body, dict) else body
        if not isinstance(agreement_id, str):
            raise ApiError("The body must name an agreement.")
        agreement = self._market.agreements.find(agreement_id)
        provider = self._providers.get(agreement.provider_id)
        if provider is None:
            raise NotFound("The provider of this agreement no longer exists.")
        activity_id = provider.create_activity(agreement)
        return web.json_response({"activityId": activity_id} if is_object else activity_id, status=201)

    async def _destroy(self, request: web.Request) -> web.Response:
        activity_id = request.match_info["activity_id"]
        if self._activities.reason(activity_id) is None:
            unit = self._find(request).unit
            # Shielded, so that a requestor that disconnects does not keep the activity alive.
            await asyncio.shield(self._activities.destroy(activity_id, "The requestor destroyed the activity."))
            await unit.block_if_vanished()
        return web.json_response(None)

    async def _execute(self, request: web.Request) -> web.Response:
        activity = self._find(request)
        body = await read_object(request, "text")
        try:
            commands = json.loads(str(body["text"]))
        except ValueError as error:
            raise ApiError(f"The script is not JSON: {error}") from error
        if not isinstance(commands, list) or not all(isinstance(each, dict) for each in commands):
            raise ApiError("A script is a list of commands, each an object.")
        batch_id = await activity.unit.execute(commands)
        provider = self._providers[activity.agreement.provider_id]
        provider.batch_started(activity.agreement, commands)
        return web.json_response(batch_id)

    async def _results(self, request: web.Request) -> web.StreamResponse:
        activity = self._find(request)
        batch_id = request.match_info["batch_id"]
        if "text/event-stream" in request.headers.get("Accept", ""):
            await activity.unit.block_if_vanished()
            return await _stream(request, activity, batch_id)
        return web.json_response(await activity.unit.results(batch_id, read_timeout_seconds(request)))

    async def _state(self, request: web.Request) -> web.Response:
        reason = self._activities.reason(request.match_info["activity_id"])
        if reason is not None:
            return web.json_response(_state_body(("Terminated", None), reason))
        unit = self._find(request).unit
        await unit.block_if_vanished()
        return web.json_response(_state_body(unit.state, unit.reason))

    async def _usage(self, request: web.Request) -> web.Response:
        activity_id = request.match_info["activity_id"]
        if self._activities.reason(activity_id) is None:
            await self._find(request).unit.block_if_vanished()
        usage = self._activities.usage(activity_id)
        return web.json_response({"currentUsage": usage, "timestamp": int(time.time())})

    async def _agreement(self, request: web.Request) -> web.Response:
        agreement = self._activities.agreement_of(request.match_info["activity_id"])
        return web.json_response(agreement.agreement_id)

    def _find(self, request: web.Request) -> Activity:
        activity = self._activities.find(request.match_info["activity_id"])
        activity.owner.record_contact()
        return activity


async def _stream(request: web.Request, activity: Activity, batch_id: str) -> web.StreamResponse:
    events = activity.unit.stream(batch_id)
    response = EventStream()
    await response.prepare(request)
    async for event in events:
        await response.send("runtime", event)
    return response


def _state_body(state: tuple[str, str | None], reason: str | None) -> dict[str, Any]:
    body: dict[str, Any] = {"state": list(state)}
    return body if reason is None else {**body, "reason": reason}
