"""The calls of /activity-api/v1 that a requestor makes."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from devnet.api import IncomingCall, Routes
from devnet.errors import ApiError, NotFound
from devnet.market import MarketService
from devnet.provider.activities import Activities, Activity


def activity_routes(activities: Activities, market: MarketService) -> Routes:
    """List the routes of the activity API."""

    def find(call: IncomingCall) -> Activity:
        activity = activities.find(call["activity_id"])
        activity.owner.record_contact()
        return activity

    def create(call: IncomingCall) -> Any:
        body = call.body()
        agreement_id = body.get("agreementId") if isinstance(body, dict) else body
        if not isinstance(agreement_id, str):
            raise ApiError("The body must name an agreement.")
        agreement = market.agreements.find(agreement_id)
        provider = market.providers.get(agreement.provider_id)
        if provider is None:
            raise NotFound("The provider of this agreement no longer exists.")
        activity_id = provider.create_activity(agreement)
        return {"activityId": activity_id} if isinstance(body, dict) else activity_id

    async def destroy(call: IncomingCall) -> None:
        activity_id = call["activity_id"]
        if activities.reason(activity_id) is None:
            unit = find(call).unit
            # Shielded, so that a requestor that disconnects does not keep the activity alive.
            await asyncio.shield(activities.destroy(activity_id, "The requestor destroyed the activity."))
            await unit.block_if_vanished()

    async def execute(call: IncomingCall) -> str:
        activity = find(call)
        try:
            commands = json.loads(str(call.object("text")["text"]))
        except ValueError as error:
            raise ApiError(f"The script is not JSON: {error}") from error
        if not isinstance(commands, list) or not all(isinstance(each, dict) for each in commands):
            raise ApiError("A script is a list of commands, each an object.")
        batch_id = await activity.unit.execute(commands)
        activity.owner.batch_started(activity.agreement, commands)
        return batch_id

    async def results(call: IncomingCall) -> Any:
        if "text/event-stream" in call.request.headers.get("Accept", ""):
            raise ApiError("The devnet does not stream the events of a batch; poll for its results.")
        return await find(call).unit.results(call["batch_id"], call.timeout_seconds())

    async def state(call: IncomingCall) -> dict[str, Any]:
        reason = activities.reason(call["activity_id"])
        if reason is not None:
            return {"state": ["Terminated", None], "reason": reason}
        unit = find(call).unit
        await unit.block_if_vanished()
        return {"state": [unit.state, None], **({} if unit.reason is None else {"reason": unit.reason})}

    async def usage(call: IncomingCall) -> dict[str, Any]:
        if activities.reason(call["activity_id"]) is None:
            await find(call).unit.block_if_vanished()
        return {"currentUsage": activities.usage(call["activity_id"]), "timestamp": int(time.time())}

    routes = Routes("/activity-api/v1")
    routes.add("POST", "/activity", create, 201)
    activity = "/activity/{activity_id}"
    routes.add("DELETE", activity, destroy)
    routes.add("POST", f"{activity}/exec", execute)
    routes.add("GET", f"{activity}/exec/{{batch_id}}", results)
    routes.add("GET", f"{activity}/state", state)
    routes.add("GET", f"{activity}/usage", usage)
    return routes
