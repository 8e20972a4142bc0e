"""The market: demands, and the negotiation that leads to the agreements of `agreements.py`.

The API calls it for the requestor, `provider/agent.py` for the providers. It knows nothing of payments and activities.
An invalid call raises an `ApiError` with the status of the published API description.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from devnet.agreements import Agreements
from devnet.constraints import parse
from devnet.errors import ApiError, Conflict, Gone, NotFound
from devnet.gftp import REQUESTOR_ID
from devnet.records import Agreement, Demand, Proposal, from_rows, to_rows
from devnet.timing import ChangeNotifier, format_time, utc_now

if TYPE_CHECKING:
    from devnet.provider.agent import Provider

#: Number of closed demands whose ids are kept, so that closing them again is answered with 410 and not 404.
MAX_CLOSED_DEMANDS = 200


class MarketService:
    """All demands, proposals and agreements of a devnet.

    :param on_change: called after every change of the state that is kept over a restart.
    """

    def __init__(self, *, on_change: Callable[[], None]) -> None:
        self.demands: dict[str, Demand] = {}
        self.proposals: dict[str, Proposal] = {}
        #: Node id -> provider. They hear of what happens in the requestor's call, so they return at once.
        self.providers: dict[str, Provider] = {}
        self.agreements = Agreements(providers=self.providers, on_change=on_change)
        self._on_change = on_change
        self._notifier = ChangeNotifier()

    # Demands

    def subscribe(self, properties: Mapping[str, Any], constraints: str) -> Demand:
        """Open a demand. :raises ApiError: the constraints or the expiration are invalid."""
        parse(constraints)
        demand = Demand(
            requestor_id=REQUESTOR_ID,
            properties=dict(properties),
            constraints=constraints,
            expires_at=expiration(properties),
        )
        self.demands[demand.demand_id] = demand
        self._changed()
        for provider in list(self.providers.values()):
            provider.demand_opened(demand)
        return demand

    def unsubscribe(self, demand_id: str) -> None:
        """Close a demand; polls that wait for its events fail."""
        demand = self.demands.get(demand_id)
        if demand is None:
            raise NotFound(f"There is no demand {demand_id}.")
        if not demand.is_open:
            raise Gone(f"The demand {demand_id} has already been closed.")
        self._close(demand)
        self._changed()

    def list_open_demands(self) -> list[Demand]:
        """Return the demands that are neither closed nor expired."""
        self._expire()
        return [demand for demand in self.demands.values() if demand.is_open]

    def find_open_demand(self, demand_id: str) -> Demand:
        """Return a demand. :raises NotFound: there is none, or it is closed or expired."""
        self._expire()
        demand = self.demands.get(demand_id)
        if demand is None or not demand.is_open:
            raise NotFound(f"There is no demand {demand_id}, or it is closed or expired.")
        return demand

    async def poll(self, demand_id: str, seconds: float, max_items: int) -> list[dict[str, Any]]:
        """Remove and return the events of a demand; wait for so many seconds if there are none."""
        demand = self.find_open_demand(demand_id)
        if demand.expires_at is not None:
            seconds = min(seconds, max(0.0, (demand.expires_at - utc_now()).total_seconds()))
        await self._notifier.wait_until(lambda: bool(demand.events) or not demand.is_open, seconds)
        self.find_open_demand(demand_id)
        events = demand.events[:max_items]
        del demand.events[: len(events)]
        if events:
            self._on_change()
        return events

    # Negotiation

    def propose(self, proposal: Proposal) -> None:
        """Send a provider's proposal to the requestor."""
        self.proposals[proposal.proposal_id] = proposal
        event = {"eventType": "ProposalEvent", "eventDate": format_time(utc_now()), "proposal": proposal.to_api()}
        self.demands[proposal.demand_id].events.append(event)
        self._changed()

    def counter(self, demand_id: str, proposal_id: str, properties: Mapping[str, Any], constraints: str) -> Proposal:
        """Answer a provider's proposal with a counter-proposal of the requestor."""
        received = self.proposal(demand_id, proposal_id)
        if received.state == "Rejected":
            raise Gone(f"The proposal {proposal_id} was rejected.")
        parse(constraints)
        expiration(properties)
        proposal = Proposal(
            issuer_id=REQUESTOR_ID,
            demand_id=demand_id,
            offer_id=received.offer_id,
            state="Draft",
            properties=dict(properties),
            constraints=constraints,
            previous_id=proposal_id,
        )
        self.proposals[proposal.proposal_id] = proposal
        self._changed()
        provider = self.providers.get(received.issuer_id)
        if provider is not None:
            provider.proposal_countered(proposal)
        return proposal

    def reject(self, demand_id: str, proposal_id: str) -> None:
        """Reject a provider's proposal for the requestor."""
        proposal = self.proposal(demand_id, proposal_id)
        if proposal.state == "Rejected":
            raise Gone(f"The proposal {proposal_id} has already been rejected.")
        proposal.state = "Rejected"
        self._changed()

    def proposal(self, demand_id: str, proposal_id: str) -> Proposal:
        """Return a provider's proposal for an open demand. :raises NotFound: there is none."""
        self.find_open_demand(demand_id)
        proposal = self.proposals.get(proposal_id)
        if proposal is None or proposal.demand_id != demand_id or proposal.issuer_id == REQUESTOR_ID:
            raise NotFound(f"There is no proposal {proposal_id} for this demand.")
        return proposal

    def create_agreement(self, proposal_id: str, valid_to: datetime) -> Agreement:
        """Make an agreement from a provider's draft proposal. :raises Conflict: the proposal was not negotiated."""
        self._expire()
        draft = self.proposals.get(proposal_id)
        if draft is None or draft.issuer_id == REQUESTOR_ID:
            raise NotFound(f"There is no proposal {proposal_id}, or its demand is closed or expired.")
        if draft.state == "Rejected":
            raise Gone(f"The proposal {proposal_id} was rejected.")
        if draft.state == "Initial":
            raise Conflict(f"The proposal {proposal_id} has not been negotiated yet.")
        counter = self.proposals[draft.previous_id or ""]
        agreement = self.agreements.create(self.demands[draft.demand_id], counter, draft, valid_to)
        draft.state = "Accepted"
        self._changed()
        return agreement

    # Across restarts

    def dump(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {
            "demands": to_rows(self.demands),
            "proposals": to_rows(self.proposals),
            "agreements": to_rows(self.agreements),
        }

    def load(self, dumped: Mapping[str, Any]) -> None:
        """Restore the state from the result of `dump`."""
        self.demands = from_rows(Demand, dumped["demands"])
        self.proposals = from_rows(Proposal, dumped["proposals"])
        self.agreements.update(from_rows(Agreement, dumped["agreements"]))

    # Changes

    def _changed(self) -> None:
        self._notifier.notify()
        self._on_change()

    def _close(self, demand: Demand) -> None:
        demand.is_open = False
        demand.events.clear()
        # Agreements have copies of what was negotiated; other proposals can no longer be requested.
        self.proposals = {key: each for key, each in self.proposals.items() if each.demand_id != demand.demand_id}
        closed = [each.demand_id for each in self.demands.values() if not each.is_open]
        for demand_id in closed[:-MAX_CLOSED_DEMANDS]:
            del self.demands[demand_id]

    def _expire(self) -> None:
        now = utc_now()
        expired = [
            each for each in self.demands.values() if each.is_open and each.expires_at and each.expires_at <= now
        ]
        for demand in expired:
            self._close(demand)
        if expired:
            self._changed()


def expiration(properties: Mapping[str, Any]) -> datetime | None:
    """Return the time in golem.srv.comp.expiration, which is in milliseconds since 1970; None if it is not a number."""
    value = properties.get("golem.srv.comp.expiration")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return datetime.fromtimestamp(value / 1000, UTC)
    except (OverflowError, OSError, ValueError) as error:
        raise ApiError(f"golem.srv.comp.expiration must be a time in milliseconds, not {value!r}.") from error
