"""The calls of /market-api/v1 that a requestor makes."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from devnet.agreements import STATES
from devnet.api import Call, route, to_time
from devnet.errors import ApiError
from devnet.market import MarketService
from devnet.provider.agent import Provider

_ROOT = "/market-api/v1"
_DEMAND = f"{_ROOT}/demands/{{demand_id}}"
_PROPOSAL = f"{_DEMAND}/proposals/{{proposal_id}}"
_AGREEMENT = f"{_ROOT}/agreements/{{agreement_id}}"


def market_routes(market: MarketService, providers: dict[str, Provider]) -> list[web.RouteDef]:
    """List the routes of the market API.

    :param providers: node id -> provider.
    """
    agreements = market.agreements

    def reject(call: Call) -> None:
        call.reason()
        market.reject(*_proposal_ids(call))

    def list_agreements(call: Call) -> list[dict[str, Any]]:
        state = call.query("state")
        if state is not None and state not in STATES:
            raise ApiError(f"state must be one of {', '.join(STATES)}, not {state!r}.")
        found = agreements.search(
            state=state,
            after=call.time("afterDate"),
            before=call.time("beforeDate"),
            session_id=call.query("appSessionId"),
        )
        return [agreement.to_api_summary() for agreement in found]

    def create_agreement(call: Call) -> str:
        body = call.object("proposalId", "validTo")
        valid_to = to_time("validTo", str(body["validTo"]))
        return market.create_agreement(str(body["proposalId"]), valid_to).agreement_id

    def agreement_id(call: Call) -> str:
        """Return the agreement's id, and record the contact with its provider."""
        agreement = agreements.get(call["agreement_id"])
        provider = providers.get(agreement.provider_id) if agreement is not None else None
        if provider is not None and provider.agreement is agreement:
            provider.record_contact()
        return call["agreement_id"]

    def agreement_events(call: Call) -> Any:
        session_id = call.query("appSessionId")
        return agreements.events.poll(
            call.time("afterTimestamp"),
            call.timeout_seconds(),
            call.max_items("maxEvents"),
            lambda event: session_id is None or agreements[event["agreementId"]].session_id == session_id,
        )

    return [
        route("GET", f"{_ROOT}/demands", lambda call: [demand.to_api() for demand in market.list_open_demands()]),
        route("POST", f"{_ROOT}/demands", lambda call: market.subscribe(*_terms(call)).demand_id, 201),
        route("DELETE", _DEMAND, lambda call: market.unsubscribe(call["demand_id"]), 204),
        route(
            "GET",
            f"{_DEMAND}/events",
            lambda call: market.poll(call["demand_id"], call.timeout_seconds(), call.max_items("maxEvents")),
        ),
        route("GET", _PROPOSAL, lambda call: market.proposal(*_proposal_ids(call)).to_api()),
        route("POST", _PROPOSAL, lambda call: market.counter(*_proposal_ids(call), *_terms(call)).proposal_id, 201),
        route("POST", f"{_PROPOSAL}/reject", reject, 204),
        route("GET", f"{_ROOT}/agreements", list_agreements),
        route("POST", f"{_ROOT}/agreements", create_agreement, 201),
        route("GET", _AGREEMENT, lambda call: agreements.find(agreement_id(call)).to_api()),
        route(
            "POST",
            f"{_AGREEMENT}/confirm",
            lambda call: agreements.confirm(agreement_id(call), call.query("appSessionId")),
            204,
        ),
        # As published: a timeout of 0 waits without a limit.
        route(
            "POST",
            f"{_AGREEMENT}/wait",
            lambda call: agreements.wait_for_approval(agreement_id(call), call.timeout_seconds() or None),
            204,
        ),
        route("POST", f"{_AGREEMENT}/cancel", lambda call: agreements.cancel(agreement_id(call), call.reason()), 204),
        route(
            "POST",
            f"{_AGREEMENT}/terminate",
            lambda call: agreements.terminate(agreement_id(call), "Requestor", call.reason()),
            204,
        ),
        route("POST", f"{_AGREEMENT}/terminate/reason", lambda call: agreements.termination(agreement_id(call))),
        route("GET", f"{_ROOT}/agreementEvents", agreement_events),
    ]


def _proposal_ids(call: Call) -> tuple[str, str]:
    return call["demand_id"], call["proposal_id"]


def _terms(call: Call) -> tuple[dict[str, object], str]:
    body = call.object("properties", "constraints")
    if not isinstance(body["properties"], dict) or not isinstance(body["constraints"], str):
        raise ApiError("properties must be an object, and constraints a string.")
    return body["properties"], body["constraints"]
