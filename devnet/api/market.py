"""The calls of /market-api/v1 that a requestor makes."""

from __future__ import annotations

from aiohttp import web

from devnet.agreements import STATES
from devnet.api import read_max_items, read_object, read_reason, read_time, read_timeout_seconds
from devnet.errors import ApiError, NotFound
from devnet.market import MarketService
from devnet.provider.agent import Provider
from devnet.timing import parse_time

_ROOT = "/market-api/v1"


class MarketRoutes:
    """The handlers of the market API.

    :param providers: node id -> provider.
    """

    def __init__(self, market: MarketService, providers: dict[str, Provider]) -> None:
        self._market = market
        self._providers = providers

    def routes(self) -> list[web.RouteDef]:
        """List the routes."""
        demand = f"{_ROOT}/demands/{{demand_id}}"
        proposal = f"{demand}/proposals/{{proposal_id}}"
        agreement = f"{_ROOT}/agreements/{{agreement_id}}"
        return [
            web.get(f"{_ROOT}/demands", self._list_demands),
            web.post(f"{_ROOT}/demands", self._subscribe),
            web.delete(demand, self._unsubscribe),
            web.get(f"{demand}/events", self._demand_events),
            web.get(proposal, self._proposal),
            web.post(proposal, self._counter),
            web.post(f"{proposal}/reject", self._reject),
            web.get(f"{_ROOT}/agreements", self._list_agreements),
            web.post(f"{_ROOT}/agreements", self._create_agreement),
            web.get(agreement, self._agreement),
            web.post(f"{agreement}/confirm", self._confirm),
            web.post(f"{agreement}/wait", self._wait),
            web.post(f"{agreement}/cancel", self._cancel),
            web.post(f"{agreement}/terminate", self._terminate),
            web.post(f"{agreement}/terminate/reason", self._termination),
            web.get(f"{_ROOT}/agreementEvents", self._agreement_events),
        ]

    # Demands and proposals

    async def _list_demands(self, request: web.Request) -> web.Response:
        return web.json_response([demand.to_api() for demand in self._market.list_open_demands()])

    async def _subscribe(self, request: web.Request) -> web.Response:
        properties, constraints = await _properties_and_constraints(request)
        return web.json_response(self._market.subscribe(properties, constraints).demand_id, status=201)

    async def _unsubscribe(self, request: web.Request) -> web.Response:
        self._market.unsubscribe(request.match_info["demand_id"])
        return web.Response(status=204)

    async def _demand_events(self, request: web.Request) -> web.Response:
        max_items = read_max_items(request, "maxEvents")
        events = await self._market.poll(request.match_info["demand_id"], read_timeout_seconds(request), max_items)
        return web.json_response(events)

    async def _proposal(self, request: web.Request) -> web.Response:
        return web.json_response(self._market.proposal(*_proposal_ids(request)).to_api())

    async def _counter(self, request: web.Request) -> web.Response:
        properties, constraints = await _properties_and_constraints(request)
        proposal = self._market.counter(*_proposal_ids(request), properties, constraints)
        return web.json_response(proposal.proposal_id, status=201)

    async def _reject(self, request: web.Request) -> web.Response:
        await read_reason(request)
        self._market.reject(*_proposal_ids(request))
        return web.Response(status=204)

    # Agreements

    async def _list_agreements(self, request: web.Request) -> web.Response:
        state = request.query.get("state")
        if state is not None and state not in STATES:
            raise ApiError(f"state must be one of {', '.join(STATES)}, not {state!r}.")
        agreements = self._market.agreements.search(
            state=state,
            after=read_time(request, "afterDate"),
            before=read_time(request, "beforeDate"),
            session_id=request.query.get("appSessionId"),
        )
        return web.json_response([agreement.to_api_summary() for agreement in agreements])

    async def _create_agreement(self, request: web.Request) -> web.Response:
        body = await read_object(request, "proposalId", "validTo")
        try:
            valid_to = parse_time(str(body["validTo"]))
        except ValueError as error:
            raise ApiError(f"validTo must be a time in ISO 8601, not {body['validTo']!r}.") from error
        agreement = self._market.create_agreement(str(body["proposalId"]), valid_to)
        return web.json_response(agreement.agreement_id, status=201)

    async def _agreement(self, request: web.Request) -> web.Response:
        return web.json_response(self._market.agreements.find(self._agreement_id(request)).to_api())

    async def _confirm(self, request: web.Request) -> web.Response:
        self._market.agreements.confirm(self._agreement_id(request), request.query.get("appSessionId"))
        return web.Response(status=204)

    async def _wait(self, request: web.Request) -> web.Response:
        timeout_seconds = read_timeout_seconds(request)
        # As published: 0 waits without a limit.
        await self._market.agreements.wait_for_approval(self._agreement_id(request), timeout_seconds or None)
        return web.Response(status=204)

    async def _cancel(self, request: web.Request) -> web.Response:
        self._market.agreements.cancel(self._agreement_id(request), await read_reason(request))
        return web.Response(status=204)

    async def _terminate(self, request: web.Request) -> web.Response:
        self._market.agreements.terminate(self._agreement_id(request), "Requestor", await read_reason(request))
        return web.Response(status=204)

    async def _termination(self, request: web.Request) -> web.Response:
        agreement_id = self._agreement_id(request)
        self._market.agreements.find(agreement_id)
        for event in self._market.agreements.events:
            if event["agreementId"] == agreement_id and event["eventType"] == "AgreementTerminatedEvent":
                return web.json_response(event)
        raise NotFound("The agreement was not terminated.")

    async def _agreement_events(self, request: web.Request) -> web.Response:
        events = await self._market.agreements.poll(
            read_time(request, "afterTimestamp"),
            read_timeout_seconds(request),
            read_max_items(request, "maxEvents"),
            request.query.get("appSessionId"),
        )
        return web.json_response(events)

    def _agreement_id(self, request: web.Request) -> str:
        """Return the agreement's id, and record the contact with its provider."""
        agreement_id = request.match_info["agreement_id"]
        agreement = self._market.agreements.get(agreement_id)
        provider = self._providers.get(agreement.provider_id) if agreement is not None else None
        if provider is not None and provider.agreement is agreement:
            provider.record_contact()
        return agreement_id


def _proposal_ids(request: web.Request) -> tuple[str, str]:
    return request.match_info["demand_id"], request.match_info["proposal_id"]


async def _properties_and_constraints(request: web.Request) -> tuple[dict[str, object], str]:
    body = await read_object(request, "properties", "constraints")
    if not isinstance(body["properties"], dict) or not isinstance(body["constraints"], str):
        raise ApiError("properties must be an object, and constraints a string.")
    return body["properties"], body["constraints"]
