"""The calls of /market-api/v1 that a requestor makes."""

from __future__ import annotations

from typing import Any

from devnet.agreements import STATES
from devnet.api import IncomingCall, Routes
from devnet.errors import ApiError
from devnet.market import MarketService
from devnet.timing import read_time


def market_routes(market: MarketService) -> Routes:
    """List the routes of the market API."""
    agreements = market.agreements

    def reject(call: IncomingCall) -> None:
        call.reason()
        market.reject(*_proposal_ids(call))

    def list_agreements(call: IncomingCall) -> list[dict[str, Any]]:
        state = call.query("state")
        if state is not None and state not in STATES:
            raise ApiError(f"state must be one of {', '.join(STATES)}, not {state!r}.")
        return [each.to_api_summary() for each in agreements.list_all() if state in (None, each.state)]

    def create_agreement(call: IncomingCall) -> str:
        body = call.object("proposalId", "validTo")
        valid_to = read_time("validTo", body["validTo"])
        return market.create_agreement(str(body["proposalId"]), valid_to).agreement_id

    def contact(call: IncomingCall) -> str:
        """Record the contact with an agreement's provider. :return: the agreement's id."""
        agreement = agreements.get(call["agreement_id"])
        provider = market.providers.get(agreement.provider_id) if agreement is not None else None
        if provider is not None and provider.agreement is agreement:
            provider.record_contact()
        return call["agreement_id"]

    def wait(call: IncomingCall) -> Any:
        # As published: a timeout of 0 waits without a limit.
        return agreements.wait_for_approval(contact(call), call.timeout_seconds() or None)

    def demand_events(call: IncomingCall) -> Any:
        return market.poll(call["demand_id"], call.timeout_seconds(), call.max_items("maxEvents"))

    routes = Routes("/market-api/v1")
    routes.add("GET", "/demands", lambda call: [demand.to_api() for demand in market.list_open_demands()])
    routes.add("POST", "/demands", lambda call: market.subscribe(*_terms(call)).demand_id, 201)
    demand = "/demands/{demand_id}"
    routes.add("DELETE", demand, lambda call: market.unsubscribe(call["demand_id"]), 204)
    routes.add("GET", f"{demand}/events", demand_events)
    proposal = f"{demand}/proposals/{{proposal_id}}"
    routes.add("POST", proposal, lambda call: market.counter(*_proposal_ids(call), *_terms(call)).proposal_id, 201)
    routes.add("POST", f"{proposal}/reject", reject, 204)
    routes.add("GET", "/agreements", list_agreements)
    routes.add("POST", "/agreements", create_agreement, 201)
    agreement = "/agreements/{agreement_id}"
    routes.add("GET", agreement, lambda call: agreements.find(contact(call)).to_api())
    routes.add("POST", f"{agreement}/confirm", lambda call: agreements.confirm(contact(call)), 204)
    routes.add("POST", f"{agreement}/wait", wait, 204)
    routes.add("POST", f"{agreement}/cancel", lambda call: agreements.cancel(contact(call), call.reason()), 204)
    routes.add("POST", f"{agreement}/terminate", lambda call: agreements.terminate(contact(call), call.reason()), 204)
    return routes


def _proposal_ids(call: IncomingCall) -> tuple[str, str]:
    return call["demand_id"], call["proposal_id"]


def _terms(call: IncomingCall) -> tuple[dict[str, object], str]:
    body = call.object("properties", "constraints")
    if not isinstance(body["properties"], dict) or not isinstance(body["constraints"], str):
        raise ApiError("properties must be an object, and constraints a string.")
    return body["properties"], body["constraints"]
